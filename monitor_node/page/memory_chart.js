// Memory over time: who holds it, stacked; the device's own reading; the four thresholds; every order.
import { baseLayout, palette, wrapped } from "./charts.js";
import { curve, state } from "./feed.js";
import { changeView, resetZoom, view } from "./view.js";
import { clock, isKnown } from "./words.js";

export const LEVELS = ["notice", "cleanup", "high", "emergency"];
const TICKS = [
  { dtickrange: [null, 60000], value: "%H:%M:%S" }, { dtickrange: [60000, 43200000], value: "%H:%M" },
  { dtickrange: [43200000, null], value: "%b %e" },
];
const ORDER_LOOKS = { asked: ["circle-open", "soft"], done: ["circle", "good"], refused: ["x", "bad"] };

// [name, place in a row] of everyone who ever held something, the lowest first.
export const heldBy = () =>
  (state.holder_names || []).map((name, place) => [name, place]).filter(([, place]) => curve("holders").some((row) => row[1][place] !== 0));

export const limitOf = (level) => state.memory?.[level + "_bytes"];

// Thresholds far above what is used would flatten the curve: shown by themselves only where they are near.
export function showsLimits() {
  if (view.limits !== null) return view.limits;
  return isKnown(limitOf("notice")) && highest() > 0.4 * limitOf("notice");
}

const highest = () => [
  ...curve("memory").map((row) => row[1]), ...curve("holders").map((row) => row[1].reduce((sum, part) => sum + (part || 0), 0)),
].reduce((a, b) => Math.max(a, b), 0);

export function describeMemory() {
  const [used, holders, orders] = ["memory", "holders", "order_marks"].map(curve);
  if (!used.length && !holders.length) return null;
  const colours = palette();
  const top = showsLimits() && isKnown(limitOf("emergency")) ? Math.max(highest(), limitOf("emergency")) : highest();
  const [unit, per] = top >= 2 ** 31 ? ["GiB", 2 ** 30] : ["MiB", 2 ** 20];
  const at = (row) => new Date(1000 * row[0]);
  const inUnits = (value) => (isKnown(value) ? value / per : null);
  const hover = (name) => `%{x|%H:%M:%S} %{y:.2f} ${unit}<extra>${wrapped(name)}</extra>`;
  const stacked = heldBy().map(([name, place]) => ({
    type: "scatter", mode: "lines", stackgroup: "holders", stackgaps: "interpolate", x: holders.map(at),
    y: holders.map((row) => inUnits(row[1][place])), line: { width: 0.5, color: colours["c" + (place % 8)] },
    fillcolor: colours["c" + (place % 8)], hovertemplate: hover(name),
  }));
  const reading = {
    type: "scatter", mode: "lines", x: used.map(at), y: used.map((row) => inUnits(row[1])),
    line: { color: colours.ink, width: 1.5 }, hovertemplate: hover("read from the device"),
  };
  return {
    data: [...stacked, reading, ...orderTraces(orders, at, colours)],
    layout: layoutOf(orders, at, inUnits, top, unit, colours),
    on: { plotly_relayout: takeZoom, plotly_doubleclick: resetZoom },
  };
}

// Plotly says dates as local time without a zone, which is how Date reads them.
function takeZoom(event) {
  if (!("xaxis.range[0]" in event)) return;
  const seconds = (end) => new Date(String(event[`xaxis.range[${end}]`]).replace(" ", "T")).getTime() / 1000;
  changeView({ since: seconds(0), until: seconds(1) });
}

function orderTraces(orders, at, colours) {
  return Object.entries(ORDER_LOOKS).map(([answer, [symbol, color]]) => {
    const rows = orders.filter((row) => row[2] === answer);
    return {
      type: "scatter", mode: "markers", yaxis: "y2", x: rows.map(at), y: rows.map(() => 0.97), cliponaxis: false,
      marker: { symbol, color: colours[color], size: 9 }, hoverinfo: "text",
      hovertext: rows.map((row) => wrapped(`${clock(row[0])} ${row[1]} (${answer})`)),
    };
  });
}

function layoutOf(orders, at, inUnits, top, unit, colours) {
  const levels = showsLimits() ? LEVELS.filter((level) => isKnown(limitOf(level))) : [];
  const lines = levels.map((level) => ({
    type: "line", x0: 0, x1: 1, xref: "paper", y0: inUnits(limitOf(level)), y1: inUnits(limitOf(level)),
    line: { color: colours["level-" + level], width: 1.5, dash: "dot" },
  }));
  const asked = orders.map((row) => ({
    type: "line", x0: at(row), x1: at(row), y0: 0, y1: 1, yref: "paper", layer: "below", line: { color: colours.soft, width: 1, dash: "dot" },
  }));
  const range = view.since === null ? undefined : [at([view.since]), at([view.until])];
  return baseLayout(colours, {
    hovermode: "x unified",
    xaxis: { type: "date", range, tickformatstops: TICKS, nticks: window.innerWidth < 600 ? 3 : 7, tickangle: 0, hoverformat: "%H:%M:%S" },
    yaxis: { range: [0, 1.1 * inUnits(top)], title: { text: unit }, fixedrange: true, automargin: false, nticks: 6 },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    shapes: [...lines, ...asked],
    annotations: levels.map((level, place) => ({
      text: level, xref: "paper", x: 0, xshift: 68 * place, xanchor: "left", y: inUnits(limitOf(level)), yanchor: "bottom", showarrow: false,
      font: { color: colours["level-" + level], size: 11 }, bgcolor: colours.panel, borderpad: 1,
    })),
  });
}
