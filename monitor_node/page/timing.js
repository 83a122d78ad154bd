// Where the trainer's time went, as a bar, and what that says about the run.
import { byId, stackedBar } from "./dom.js";
import { percent } from "./words.js";

// Each has its own colour, whatever its share is: one that changes its place keeps it.
const PURPOSES = [
  "compute", "data", "verification", "snapshots", "jumps", "windows", "waiting", "evaluation", "checkpoints", "other",
];
const placeOf = (purpose) => (PURPOSES.includes(purpose) ? PURPOSES.indexOf(purpose) : PURPOSES.length - 1);

export function drawTiming(timing) {
  const shares = Object.entries(timing?.shares || {}).filter(([, share]) => share > 0.0005);
  shares.sort((a, b) => b[1] - a[1]);
  stackedBar("timing-bar", "timing-legend", shares.map(([purpose, share]) =>
    [purpose.replaceAll("_", " "), share, percent(share), placeOf(purpose)]));
  byId("verdict").textContent = timing?.verdict || "no verdict yet";
  byId("verdict").dataset.known = timing?.verdict ? "yes" : "no";
  byId("timing-words").textContent = timing?.words || "Not known yet: the trainer has not said where its time went.";
}
