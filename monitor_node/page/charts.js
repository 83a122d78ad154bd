// What all charts share: plotly itself, colours of the theme, the common layout, and when to draw.
// Plotly is 5 MB, so it is loaded only after the words have been painted. It draws one chart at a time, in turns
// and a quarter of a second apart: while it draws (50 ms and more) no word can change.
import { formatView, view } from "./view.js";

const DRAW_MILLISECONDS = 250; // between two charts
const RETRY_MILLISECONDS = 5000; // after plotly did not come, e.g. because the monitor went away
// Plotly bundles the stylesheet of a map and puts it into the page, which the content policy refuses;
// it does not try where an element with this id says that the sheet is there. We draw no maps.
const MAP_SHEET_ID = "9f215cf04c5486422605d13261cb87401f4e7763b6296af81e98efbc0130da53";

// And it adds its own rules to the sheet with this id: to ours, or else to an inline one, which is refused as well.
const RULES_SHEET_ID = "plotly.js-style-global";

const charts = new Map(); // element id -> describe() -> {data, layout} or null
const due = new Set();
let drawnAt = -DRAW_MILLISECONDS;
let isUrgent = true; // the first time, and when somebody changed the view: all charts at once
let isWaiting = false;
let isStarted = false;
let loading = null; // the promise of plotly
let failedAt = -Infinity;
let isDragging = false;
document.addEventListener("pointerdown", (event) => (isDragging = event.target.closest(".chart") !== null));
for (const end of ["pointerup", "pointercancel", "blur"]) window.addEventListener(end, () => (isDragging = false));

async function loadPlotly() {
  for (const old of [MAP_SHEET_ID, RULES_SHEET_ID]) document.getElementById(old)?.remove(); // of a try that failed
  const marker = document.createElement("template");
  marker.id = MAP_SHEET_ID;
  document.head.append(marker);
  await load("link", { rel: "stylesheet", id: RULES_SHEET_ID, href: "/static/plotly.css" });
  await load("script", { src: "/static/plotly.min.js" });
  return window.Plotly;
}

function load(tag, properties) {
  return new Promise((resolve, reject) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.addEventListener("load", resolve);
    made.addEventListener("error", () => {
      made.remove();
      reject(new Error(`${properties.src || properties.href} could not be loaded`));
    });
    document.head.append(made);
  });
}

// Two frames: the first paints the words, the second begins after it.
export const startCharts = () => requestAnimationFrame(() => setTimeout(() => {
  isStarted = true;
  drawWhenDue();
}, 0));

export function addChart(id, describe) {
  charts.set(id, describe);
}

export function drawSoon(ids = charts.keys()) {
  for (const id of ids) due.add(id);
  if (isStarted) drawWhenDue();
}

export function drawNow(ids = charts.keys()) {
  isUrgent = true;
  drawSoon(ids);
}

async function drawWhenDue() {
  if (isWaiting || !due.size || performance.now() < failedAt + RETRY_MILLISECONDS) return;
  isWaiting = true;
  try {
    await drawDue(await (loading ??= loadPlotly()));
  } catch (error) {
    [loading, failedAt] = [null, performance.now()]; // the next change tries again, after a while
    for (const id of charts.keys()) document.getElementById(id).dataset.empty = error.message;
  }
  isWaiting = false;
  drawWhenDue();
}

async function drawDue(plotly) {
  const [id] = due; // the one that waits longest
  while (!isUrgent && performance.now() < drawnAt + DRAW_MILLISECONDS) await pause(20);
  while (isDragging) await pause(50); // a redraw would end the drag
  due.delete(id);
  try {
    draw(plotly, id);
  } catch (error) {
    console.error(error); // one chart that fails leaves the others
    document.getElementById(id).dataset.empty = "could not be drawn";
  }
  drawnAt = performance.now();
  isUrgent &&= due.size > 0;
  await pause(0); // words and keys between two charts
}

function draw(plotly, id) {
  const place = document.getElementById(id);
  const described = charts.get(id)();
  if (described === null) {
    if (place.data) plotly.purge(place);
    place.dataset.empty = "nothing to draw yet";
    return;
  }
  delete place.dataset.empty;
  const isFirst = !place.data;
  plotly.react(place, described.data, described.layout, { displayModeBar: false, responsive: true, doubleClick: false });
  if (isFirst) for (const [event, listener] of Object.entries(described.on || {})) place.on(event, listener);
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export function palette() {
  const style = getComputedStyle(document.documentElement);
  return new Proxy({}, { get: (_, name) => style.getPropertyValue("--" + name).trim() });
}

// Texts of a run go into charts through this: plotly reads a few tags, a run must not use them.
export const escaped = (text) =>
  String(text).slice(0, 400).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\s+/g, " ");

// Long reasons in lines that fit beside the mouse.
export function wrapped(text, width = 56) {
  const lines = [""];
  for (const word of String(text).slice(0, 400).split(/\s+/)) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= width) lines.push("");
    lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
  }
  return lines.slice(0, 8).map(escaped).join("<br>");
}

// A touch screen scrolls the page with the finger that would zoom.
const canZoom = !window.matchMedia("(pointer: coarse)").matches;

export function baseLayout(colours, more = {}) {
  const axis = {
    gridcolor: colours.rule, linecolor: colours.rule, zeroline: false, automargin: true, fixedrange: !canZoom,
    tickfont: { color: colours.soft, size: 12 }, title: { font: { color: colours.soft, size: 12 }, standoff: 6 },
  };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, uirevision: formatView(view),
    font: { family: "system-ui, 'DejaVu Sans', sans-serif", size: 12, color: colours.ink },
    margin: { l: 56, r: 14, t: 10, b: 36 }, hovermode: "closest", dragmode: canZoom ? "zoom" : false,
    hoverlabel: { bgcolor: colours.panel, bordercolor: colours.rule, font: { color: colours.ink, size: 12 }, align: "left" },
    xaxis: axis, yaxis: axis,
  };
  for (const [key, value] of Object.entries(more))
    layout[key] = /^[xy]axis/.test(key) ? { ...axis, ...value, title: { ...axis.title, ...value.title } } : value;
  return layout;
}
