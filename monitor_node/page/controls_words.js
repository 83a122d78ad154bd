// The controls in words, and the table of the newest trials. Nothing of it is shown while no control is switched on.
import { byId, fillTable, row } from "./dom.js";
import { curve } from "./feed.js";
import { DASH, isKnown, measured, number, whole } from "./words.js";

const LOOKS = { refused: "bad", ruined: "bad", aborted: "warn" };

// Rows of series.controls that are not as configured. A context is as configured where it never changes.
export const hasMoved = () => curve("controls").some((now) => now[1] !== 1 || now[2] !== 1) || hasContext();
export const hasContext = () => new Set(curve("controls").map((now) => now[3])).size > 1;

// Why one was not taken is not to be read anywhere else; why one was set back stands in the next columns.
function becameWords(trial) {
  const words = trial.is_kept || LOOKS[trial.verdict] ? trial.became.split(":")[0] : trial.became;
  return words + (trial.lost_steps ? `, ${trial.lost_steps} steps lost` : "");
}

export function drawControls(controls) {
  byId("controls-panel").hidden = !controls;
  if (!controls) return;
  byId("controls-words").textContent = controls.words;
  byId("controls-drawn").hidden = !curve("control_trials").length && !hasMoved();
  byId("context-key").hidden = !hasContext();
  const cells = (trial) =>
    row([
      [whole(trial.step)],
      [trial.change],
      [becameWords(trial), trial.is_kept ? "good" : LOOKS[trial.verdict] || "soft", trial.became],
      [measured(trial, "loss_end")],
      [measured(trial, "loss_forecast") + (isKnown(trial.loss_forecast) ? " ± " + number(trial, "loss_spread") : "")],
      [trial.seen || DASH],
      [trial.reason || DASH, "soft why", trial.words],
    ]);
  fillTable("control-trials", (controls.trials || []).map(cells));
}
