// Saves what is shown as CSV or JSON, made in the browser: nothing is asked of the server.
import { curve, state } from "./feed.js";

const holders = () => state.holder_names || [];

// Name -> [columns, rows] of each chart and table.
const tables = {
  loss: () => [
    ["curve", "step", "loss", "spread"],
    [
      ...["train", "held_out", "forecast"].flatMap((name) => curve(name).map(([step, loss, spread]) => [name, step, loss, spread])),
      ...Object.entries(state.marks || {}).flatMap(([name, marks]) => marks.map(([step, marker]) => [name, step, marker])),
    ],
  ],
  timeline: () => [
    ["base_step", "horizon_steps", "verdict", "forecast_loss", "outcome_loss", "why"],
    curve("proposals"),
  ],
  controls: () => [
    ["line", "step", "rate_factor", "batch_factor", "context_tokens", "noise_scale_over_batch"],
    [
      ...curve("controls").map((row) => ["controls", ...row, null]),
      ...curve("noise_scale").map(([step, noise]) => ["noise_scale", step, null, null, null, noise]),
    ],
  ],
  trials: () => [["base_step", "change", "verdict", "why", "is_kept"], curve("control_trials")],
  pace: () => [["step", "progress_per_second", "plain_progress_per_second"], curve("pace")],
  memory: () => [
    ["unix_seconds", "used_bytes", ...holders()],
    [
      ...curve("memory").map(([at, used]) => [at, used]),
      ...curve("holders").map(([at, parts]) => [at, null, ...parts]),
    ],
  ],
  proposals: () => {
    const rows = state.proposals || [];
    const columns = Object.keys(rows[0] || {});
    return [columns, rows.map((proposal) => columns.map((name) => proposal[name]))];
  },
};

// A text that a spreadsheet would run as a formula gets an apostrophe: names and reasons come from the streams.
export function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(String(value)) ? "'" + value : String(value);
  return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

export function csvOf(name) {
  const [columns, rows] = tables[name]();
  return [columns, ...rows].map((cells) => columns.map((_, place) => csvCell(cells[place])).join(",")).join("\r\n") + "\r\n";
}

export function jsonOf(name) {
  if (name === "snapshot") return JSON.stringify(state, null, 1);
  const [columns, rows] = tables[name]();
  return JSON.stringify({ run_id: state.run?.run_id ?? null, columns, rows });
}

export function save(name, kind) {
  const text = kind === "csv" ? csvOf(name) : jsonOf(name);
  const url = URL.createObjectURL(new Blob([text], { type: kind === "csv" ? "text/csv" : "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = `${(state.run?.run_id || "run").replace(/[^\w.-]+/g, "_").slice(0, 80)}-${name}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
