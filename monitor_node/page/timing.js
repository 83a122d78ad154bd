// Where the trainer's time went, as a bar, and what that says about the run.
import { byId, stackedBar } from "./dom.js";
import { percent } from "./words.js";

export function drawTiming(timing) {
  const shares = Object.entries(timing?.shares || {}).filter(([, share]) => share > 0.0005);
  shares.sort((a, b) => b[1] - a[1]);
  stackedBar("timing-bar", "timing-legend", shares.map(([purpose, share], place) =>
    [purpose.replaceAll("_", " "), share, percent(share), place]));
  byId("verdict").textContent = timing?.verdict || "no verdict yet";
  byId("verdict").dataset.known = timing?.verdict ? "yes" : "no";
  byId("timing-words").textContent = timing?.words || "Not known yet: the trainer has not said where its time went.";
}
