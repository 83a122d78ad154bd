// The loss chart: training faint and smoothed, held-out, forecasts with their band, jumps, losses that are not numbers.
import { axisFor } from "./axis.js";
import { baseLayout, palette, wrapped } from "./charts.js";
import { curve, state } from "./feed.js";
import { smoothed } from "./smooth.js";
import { view } from "./view.js";
import { whole } from "./words.js";
import { xRange, zoomListeners } from "./zoom.js";

const KEPT = ["accepted"];
const UNDONE = ["refused", "ruined", "aborted"];

export function describeLoss() {
  const [train, heldOut, forecast] = ["train", "held_out", "forecast"].map(curve);
  if (!train.length && !heldOut.length && !marksOf().length) return null;
  const colours = palette();
  const axis = axisFor(view.x);
  const smooth = smoothed(train, view.smooth);
  const range = xRange(axis);
  const line = (points, more) => ({
    type: "scatter", mode: "lines", x: points.map((p) => axis.of(p[0])), y: points.map((p) => p[1]),
    customdata: points.map((p) => whole(p[0])), ...more,
  });
  const data = [
    line(train, {
      line: { color: colours.train, width: 1 }, opacity: view.smooth ? 0.55 : 1, name: "training",
      hovertemplate: view.smooth ? undefined : "step %{customdata}: %{y:.4f}<extra>training</extra>", hoverinfo: "skip",
    }),
    ...(view.smooth ? [line(smooth, {
      line: { color: colours["train-strong"], width: 2 }, name: "smoothed",
      hovertemplate: "step %{customdata}: %{y:.4f}<extra>training, smoothed</extra>",
    })] : []),
    ...forecastTraces(forecast, axis, colours, line),
    line(heldOut, {
      mode: "lines+markers", line: { color: colours["held-out"], width: 2.5 }, marker: { size: 5 }, name: "held-out",
      hovertemplate: "step %{customdata}: %{y:.4f}<extra>held-out</extra>",
    }),
    ...jumpTraces(axis, colours),
    markTrace(axis, colours),
  ];
  return { data, layout: layoutOf(axis, range, lossRange(range, axis), colours), on: zoomListeners(true) };
}

const marksOf = () => [...(state.marks?.train || []), ...(state.marks?.held_out || [])];

// Neighbouring forecasts share a dashed line and a band; a long time without one leaves a gap, not an invented line.
function groups(forecast) {
  const gaps = forecast.slice(1).map((p, index) => p[0] - forecast[index][0]).sort((a, b) => a - b);
  const longest = 3 * (gaps[gaps.length >> 1] || 0);
  const found = [];
  forecast.forEach((p, index) => {
    if (!index || p[0] - forecast[index - 1][0] > longest) found.push([]);
    found.at(-1).push(p);
  });
  return found;
}

function forecastTraces(forecast, axis, colours, line) {
  const band = { x: [], y: [] };
  const dashes = [];
  for (const group of groups(forecast)) {
    const around = [...group.map(([s, l, w]) => [s, l + w]), ...[...group].reverse().map(([s, l, w]) => [s, l - w])];
    band.x.push(...around.map(([step]) => axis.of(step)), null);
    band.y.push(...around.map(([, loss]) => loss), null);
    dashes.push(...group, [group.at(-1)[0], null]);
  }
  return [
    { type: "scatter", ...band, mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: colours.band, hoverinfo: "skip" },
    line(dashes, { line: { color: colours.forecast, width: 1.5, dash: "dash" }, hoverinfo: "skip" }),
    line(forecast, {
      mode: "markers", name: "forecast", marker: { color: colours.forecast, size: 5, symbol: "diamond" },
      error_y: { type: "data", array: forecast.map((p) => p[2]), color: colours.forecast, thickness: 1, width: 3 },
      hovertemplate: "step %{customdata}: %{y:.4f} ± %{error_y.array:.4f}<extra>forecast without the jump</extra>",
    }),
  ];
}

// Kept ones point up from the foot of the chart, undone ones down from its top, so they never hide the curve.
function jumpTraces(axis, colours) {
  const why = new Map(curve("proposals").map((p) => [p[0], p[5]]));
  const trace = (verdicts, symbol, color, words, height) => {
    const jumps = curve("jumps").filter(([, verdict]) => verdicts.includes(verdict));
    return {
      type: "scatter", mode: "markers", yaxis: "y2", x: jumps.map(([step]) => axis.of(step)), y: jumps.map(() => height),
      marker: { symbol, color, size: 9 }, hoverinfo: "text", cliponaxis: false,
      hovertext: jumps.map(([step, verdict, horizon]) =>
        wrapped(`step ${whole(step)}: jump of ${horizon} steps ${words} (${verdict})${why.get(step) ? ": " + why.get(step) : ""}`)),
    };
  };
  return [
    trace(KEPT, "triangle-up", colours.kept, "kept", 0.02),
    trace(UNDONE, "triangle-down", colours.undone, "undone", 0.98),
  ];
}

function markTrace(axis, colours) {
  const marks = marksOf();
  return {
    type: "scatter", mode: "markers+text", yaxis: "y2", x: marks.map(([step]) => axis.of(step)), y: marks.map(() => 0.92),
    text: marks.map(([, marker]) => marker), textposition: "bottom center", textfont: { color: colours.bad },
    marker: { symbol: "x", color: colours.bad, size: 8 }, cliponaxis: false,
    hovertemplate: "step %{customdata}: %{text}<extra>not a number</extra>", customdata: marks.map(([step]) => whole(step)),
  };
}

// Lowest and highest loss of what is shown, so a zoom along x fits y by itself.
function lossRange([first, last], axis) {
  const isLog = view.scale === "log";
  const seen = (value) => (isLog ? Math.log10(value) : value);
  if (view.low !== null && (view.low > 0 || !isLog)) return [seen(view.low), seen(view.high)];
  const losses = ["train", "held_out", "forecast"].flatMap(curve)
    .filter((p) => axis.of(p[0]) >= first && axis.of(p[0]) <= last && (!isLog || p[1] > 0)).map((p) => seen(p[1]));
  if (!losses.length) return undefined;
  const [low, high] = [losses.reduce((a, b) => Math.min(a, b)), losses.reduce((a, b) => Math.max(a, b))];
  const margin = 0.05 * (high - low) || 0.05;
  return [low - margin, high + margin];
}

function layoutOf(axis, range, losses, colours) {
  const rule = (step) => ({
    type: "line", x0: axis.of(step), x1: axis.of(step), y0: 0, y1: 1, yref: "paper",
    line: { color: colours.bad, width: 1, dash: "dot" }, layer: "below",
  });
  return baseLayout(colours, {
    hovermode: "x unified",
    xaxis: { range, title: { text: axis.title } },
    yaxis: { type: view.scale, range: losses, automargin: false, nticks: 7, ...logTicks(losses) },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    shapes: marksOf().map(([step]) => rule(step)),
  });
}

// Plotly's ticks of a narrow log axis are many bare digits; a few round losses read better.
function logTicks(losses) {
  if (view.scale !== "log" || !losses || losses[1] - losses[0] > 2) return {};
  const [low, high] = losses.map((end) => 10 ** end);
  const raw = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(raw));
  const round = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const spread = high / low > 8 ? [1, 1.5, 2, 3, 4, 5, 7] : null;
  const ticks = [];
  if (spread)
    for (let ten = Math.floor(losses[0]); ten <= losses[1]; ten++) ticks.push(...spread.map((digit) => digit * 10 ** ten));
  else for (let tick = Math.ceil(low / round) * round; tick <= high; tick += round) ticks.push(tick);
  const shown = ticks.filter((tick) => tick >= low && tick <= high);
  return { tickmode: "array", tickvals: shown, ticktext: shown.map((tick) => String(Number(tick.toPrecision(4)))) };
}
