// Wires the page of one run: the feed brings sections, words are drawn at once, charts soon after.
import { drawActions, listenForActions } from "./actions.js";
import { canShow } from "./axis.js";
import { addChart, drawNow, drawSoon, startCharts } from "./charts.js";
import { describeControls } from "./controls_chart.js";
import { button, byId } from "./dom.js";
import { save } from "./download.js";
import { follow, state } from "./feed.js";
import { listenForKeys } from "./keys.js";
import { describeLoss } from "./loss_chart.js";
import { describeMemory, showsLimits } from "./memory_chart.js";
import { describePace } from "./pace_chart.js";
import { drawWords } from "./sections.js";
import { describeTimeline } from "./timeline_chart.js";
import { changeView, isZoomed, onView, resetZoom, view } from "./view.js";
import { whole } from "./words.js";

// Chart -> the sections and curves it is drawn from; x by time or tokens needs two more.
const NEEDS = {
  "loss-chart": ["train", "held_out", "forecast", "jumps", "marks", "proposals"],
  "timeline-chart": ["phases", "proposals", "train"],
  "controls-chart": ["controls", "control_trials", "noise_scale", "train"],
  "pace-chart": ["pace", "train"],
  "memory-chart": ["memory", "holders", "holder_names", "order_marks"],
};

// --- keeping up ------------------------------------------------------------------------------

let isConnected = false;
let isStarted = false;

function take(changed) {
  drawWords(changed);
  drawNote();
  if (changed.has("actions") || changed.has("run")) drawActions();
  showLink(isConnected);
  const byOther = changed.has("seconds") || changed.has("units");
  drawSoon(Object.keys(NEEDS).filter((id) => (byOther && view.x !== "step") || NEEDS[id].some((name) => changed.has(name))));
  drawControls();
  if (!isStarted) startCharts();
  isStarted = true;
}

function showLink(isNow) {
  isConnected = isNow;
  const server = state.server || { connected: true };
  byId("link").dataset.ok = isConnected && server.connected ? "yes" : "no";
  byId("link").textContent = !isConnected ? "monitor not reachable, trying again"
    : server.connected ? "live" : `message server away for ${server.away_seconds} s`;
}

function drawNote() {
  const marks = [...(state.marks?.train || []), ...(state.marks?.held_out || [])];
  const last = marks.slice(-5).map(([step, marker]) => `${marker} at step ${whole(step)}`);
  byId("loss-note").textContent = last.length ? `Losses that are not numbers: ${last.join(", ")}` : "";
}

// --- controls --------------------------------------------------------------------------------

function drawControls() {
  byId("log-loss").checked = view.scale === "log";
  byId("smooth").value = String(view.smooth);
  byId("smooth-words").textContent = view.smooth.toFixed(2);
  byId("x-axis").value = view.x;
  byId("x-units").textContent = state.progress?.unit || "tokens";
  for (const option of byId("x-axis").options) option.disabled = !canShow(option.value);
  byId("reset-zoom").hidden = !isZoomed();
  byId("limits").checked = showsLimits();
}

function listenForControls() {
  byId("log-loss").addEventListener("change", (event) =>
    changeView({ scale: event.target.checked ? "log" : "linear", low: null, high: null }));
  byId("smooth").addEventListener("input", (event) => changeView({ smooth: Number(event.target.value) }));
  byId("x-axis").addEventListener("change", (event) => changeView({ x: event.target.value }));
  byId("limits").addEventListener("change", (event) => changeView({ limits: event.target.checked }));
  byId("reset-zoom").addEventListener("click", resetZoom);
  for (const place of document.querySelectorAll("[data-save]"))
    for (const kind of ["csv", "json"]) {
      const made = button(kind.toUpperCase(), () => save(place.dataset.save, kind));
      made.setAttribute("aria-label", `save ${place.dataset.save} as ${kind.toUpperCase()}`);
      place.append(made);
    }
  byId("save-all").addEventListener("click", () => save("snapshot", "json"));
}

addChart("loss-chart", describeLoss);
addChart("timeline-chart", describeTimeline);
addChart("controls-chart", describeControls);
addChart("pace-chart", describePace);
addChart("memory-chart", describeMemory);
listenForControls();
listenForActions();
listenForKeys();
onView(() => {
  drawControls();
  drawNow();
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawNow());
drawControls();
follow(take, showLink);
