// Where a step lies on the x axis the viewer chose: by step, by time since the start, or by tokens (examples).
import { curve, state } from "./feed.js";
import { isKnown } from "./words.js";

// Value at a step from rows [step, value] sorted by step; straight lines between them, the last slope beyond.
export function valueAt(rows, step) {
  if (!rows.length) return null;
  if (rows.length === 1) return rows[0][1];
  let low = 0;
  let high = rows.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (rows[middle][0] <= step) low = middle;
    else high = middle;
  }
  const [[x0, y0], [x1, y1]] = [rows[low], rows[high]];
  return x1 === x0 ? y1 : y0 + ((y1 - y0) * (step - x0)) / (x1 - x0);
}

const TIME_UNITS = [[2 * 86400, 86400, "days"], [2 * 3600, 3600, "hours"], [180, 60, "minutes"], [0, 1, "seconds"]];

// {of(step) in shown units, per: base units in one shown unit, title, kind}; by step where the wanted one is not known.
export function axisFor(kind) {
  const rows = curve({ time: "seconds", tokens: "units" }[kind] || "");
  if (kind === "time" && rows.length > 1) {
    const begun = state.run?.started_unix_seconds; // of the newest start: a resumed run has steps from before it
    const start = isKnown(begun) ? Math.min(begun, rows[0][1]) : rows[0][1];
    const elapsed = rows.at(-1)[1] - start;
    const [, per, unit] = TIME_UNITS.find(([least]) => elapsed >= least) || TIME_UNITS.at(-1);
    return { kind, per, title: `${unit} since the start`, of: (step) => Math.max(0, valueAt(rows, step) - start) / per };
  }
  if (kind === "tokens" && rows.length > 1)
    return { kind, per: 1, title: state.progress?.unit || "units", of: (step) => Math.max(0, valueAt(rows, step)) };
  return { kind: "step", per: 1, title: "step", of: (step) => step };
}

export const canShow = (kind) => kind === "step" || curve({ time: "seconds", tokens: "units" }[kind]).length > 1;
