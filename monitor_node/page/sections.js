// The words of the page: each section of the snapshot as text. They are painted before any chart.
import { drawControls } from "./controls_words.js";
import { byId, element, fillList, fillTable, row, tile } from "./dom.js";
import { state } from "./feed.js";
import { drawMemory, drawOrders } from "./memory_words.js";
import { drawProvenance } from "./provenance.js";
import { drawTiming } from "./timing.js";
import { DASH, bytes, clock, difference, duration, isKnown, measured, number, percent, rate, signed, whole } from "./words.js";

const WENT_WELL = { accepted: "good", refused: "bad", ruined: "bad", aborted: "warn", vetoed: "warn" };

function drawRun(run) {
  document.title = run.run_id + " · " + run.status;
  byId("run-id").textContent = run.run_id;
  byId("status").textContent = run.status;
  byId("status").dataset.status = run.status;
  byId("words").textContent = run.words;
}

function drawProposals(proposals) {
  const cells = (p) => {
    const gain = difference(p.loss_end, p.loss_forecast);
    const look = gain !== null && gain <= 0 ? "good" : WENT_WELL[p.verdict] === "bad" ? "bad" : "soft";
    return row([
      [whole(p.step)],
      ["+" + p.horizon_steps],
      [p.verdict + (p.lost_steps ? `, ${p.lost_steps} steps lost` : ""), WENT_WELL[p.verdict] || "soft"],
      [measured(p, "loss_end")],
      [measured(p, "loss_forecast") + (isKnown(p.loss_forecast) ? " ± " + number(p, "loss_spread") : "")],
      [signed(gain), look],
      [measured(p, "delta_cosine", 2)],
      [duration(p.cost_seconds)],
      [p.reason || DASH, "soft why", p.reason || ""],
    ]);
  };
  fillTable("proposals", proposals.map(cells));
}

function drawNodes(nodes) {
  const looks = { alive: "good", silent: "bad", stalled: "warn" };
  const cells = (n) =>
    row([
      [n.node],
      [n.liveness + (n.state && n.state !== "running" ? ` (${n.state})` : ""), looks[n.liveness] || "soft"],
      [whole(n.step)],
      [isKnown(n.heartbeat_age_seconds) ? duration(n.heartbeat_age_seconds) + " ago" : DASH],
    ]);
  fillTable("nodes", nodes.map(cells));
}

// Streams where readers fall behind, give up or meet gaps; without those numbers only their lengths.
function drawStreams() {
  const health = state.stream_health || Object.entries(state.streams || {}).map(([stream, entries]) => ({ stream, entries }));
  const badly = (value) => (value > 0 ? "bad" : "");
  const cells = (s) =>
    row([
      [s.stream], [whole(s.entries)], [whole(s.lag_steps), s.lag_steps > 20 ? "warn" : ""], [whole(s.pending)],
      [whole(s.dead_letters), badly(s.dead_letters)], [whole(s.fenced)], [whole(s.duplicates)], [whole(s.gaps), badly(s.gaps)],
      [whole(s.damaged), badly(s.damaged)],
    ]);
  fillTable("streams", health.map(cells), "not known yet");
}

const CHECKPOINT_LOOKS = { verified: "good", damaged: "bad", gone: "soft" };

function drawCheckpoints() {
  const last = state.checkpoint ? [{ ...state.checkpoint, state: null }] : [];
  const cells = (c) =>
    row([
      [whole(c.step)],
      [clock(c.at_unix_seconds)],
      [bytes(c.num_bytes)],
      [c.state || "not checked", CHECKPOINT_LOOKS[c.state] || "", c.why || ""],
      [c.name + (c.emergency ? " (emergency)" : ""), c.emergency ? "warn" : "soft"],
    ]);
  fillTable("checkpoints", (state.checkpoints || last).map(cells));
}

function drawAlerts() {
  const looks = { error: "bad", warning: "warn" };
  const line = (alert) => {
    const made = element("li");
    made.append(element("time", clock(alert.at_unix_seconds)));
    made.append(element("span", alert.text, looks[alert.severity] || ""));
    made.append(element("span", `  ${alert.node}, step ${whole(alert.step)}`, "soft"));
    return made;
  };
  fillList("alerts", (state.alerts || []).map(line));
  const raised = Object.entries(state.divergence?.kinds || {}).filter(([, level]) => level !== "normal");
  const signals = raised.map(([kind, level]) => `${kind.replaceAll("_", " ")} ${level}`).join(", ");
  byId("divergence").textContent = state.divergence ? `Divergence: ${signals || state.divergence.level}. ${state.divergence.text}` : "";
}

function savedWords(share) {
  if (!isKnown(share)) return isKnown(state.pace?.progress_per_second) ? "controls were changed" : "not known yet";
  return share >= 0 ? `saves ${percent(share)}` : `costs ${percent(-share)}`;
}

function drawPace() {
  const pace = state.pace;
  if (!pace) return;
  const known = isKnown(pace.progress_per_second);
  const against = isKnown(pace.plain_progress_per_second) ? ` against ${rate(pace.plain_progress_per_second)} of plain training` : "";
  byId("pace-words").textContent = known
    ? `${rate(pace.progress_per_second)} steps of progress a second${against}${isKnown(pace.saved_share) ? `: prediction ${savedWords(pace.saved_share)}` : ""}.`
    : "Not known yet.";
  byId("pace-because").textContent = pace.because || "";
}

function drawTiles() {
  const { progress, counters, memory, checkpoint, pace } = state;
  if (!progress || !counters || !memory) return;
  const total = isKnown(progress.total_steps) ? "of " + whole(progress.total_steps) : "";
  const heldOut = isKnown(progress.held_out_step) ? "at step " + whole(progress.held_out_step) : "";
  const undone = counters.refused + counters.ruined + counters.aborted;
  const lost = progress.lost_steps ? whole(progress.lost_steps) + " steps lost" : "";
  byId("tiles").replaceChildren(
    tile("step", whole(progress.step), total),
    tile("phase", progress.phase || DASH, checkpoint ? "saved at " + whole(checkpoint.step) : ""),
    tile("training loss", number(progress, "loss")),
    tile("held-out loss", number(progress, "held_out_loss"), heldOut),
    tile(progress.unit + "/s", whole(progress.units_per_second),
      isKnown(progress.steps_per_second) ? rate(progress.steps_per_second) + " steps/s" : ""),
    tile("time left", duration(progress.eta_seconds), endOf(progress.eta_seconds)),
    savedTile(pace?.saved_share),
    tile("virtual steps", whole(progress.virtual_steps), percent(progress.virtual_share) + " of all"),
    tile("kept / undone", `${whole(counters.accepted)} / ${whole(undone)}`, lost),
    tile("memory", bytes(memory.used_bytes),
      isKnown(memory.used_bytes) ? "of " + bytes(memory.total_bytes) : memory.unknown_reason || ""),
  );
  const rest = ["vetoed", "failed", "stale", "missing", "malformed", "used", "rest"].map((name) => `${name} ${counters[name]}`);
  byId("counters").textContent = `${counters.proposals} proposals${state.controls ? " of jumps and controls" : ""}; decision points without a jump: ${rest.join(", ")}`;
}

const NOTHING_SHARE = 0.005; // as in verdict.py: neither good nor bad

function savedTile(share) {
  if (!isKnown(share)) return tile("against plain", DASH, savedWords(share));
  const colour = Math.abs(share) < NOTHING_SHARE ? "" : share > 0 ? "good" : "bad";
  return tile("against plain", (share >= 0 ? "+" : "−") + percent(Math.abs(share)), savedWords(share), colour);
}

const endOf = (seconds) => (isKnown(seconds) ? "until " + clock(Date.now() / 1000 + seconds).slice(0, 5) : "");

const TILES_NEED = ["progress", "counters", "memory", "checkpoint", "pace"];
// Section -> what it draws.
const drawn = {
  run: () => drawRun(state.run),
  proposals: () => drawProposals(state.proposals),
  controls: () => drawControls(state.controls),
  control_trials: () => drawControls(state.controls),
  nodes: () => drawNodes(state.nodes),
  memory: () => drawMemory(state.memory),
  orders: () => drawOrders(state.orders),
  holder_names: () => drawMemory(state.memory),
  holders: () => drawMemory(state.memory),
  alerts: drawAlerts,
  divergence: drawAlerts,
  streams: drawStreams,
  stream_health: drawStreams,
  checkpoint: drawCheckpoints,
  checkpoints: drawCheckpoints,
  timing: () => drawTiming(state.timing),
  pace: drawPace,
  settings: drawProvenance,
  provenance: drawProvenance,
};

// Draws the words of what changed. A section the monitor does not send (yet) stays as it is.
export function drawWords(changed) {
  const isSaid = (name) => (state[name] ?? state.series[name]) !== undefined;
  new Set([...changed].filter(isSaid).map((name) => drawn[name])).forEach((job) => job?.());
  if (!state.controls) drawControls(null);
  if (TILES_NEED.some((name) => changed.has(name))) drawTiles();
}
