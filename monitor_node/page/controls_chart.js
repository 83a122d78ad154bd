// The controls over steps: factors on rate and batch in powers of two, the noise scale beside them, the context
// below, and every trial with what was said for it and what was seen.
import { axisFor } from "./axis.js";
import { baseLayout, palette, wrapped } from "./charts.js";
import { hasContext, hasMoved } from "./controls_words.js";
import { curve, state } from "./feed.js";
import { view } from "./view.js";
import { whole } from "./words.js";
import { xRange, zoomListeners } from "./zoom.js";

// Verdict -> [symbol, colour, height in the chart]; every other one: not taken.
const KEPT = ["triangle-up", "kept", 0.03];
const SET_BACK = ["triangle-down", "undone", 0.97];
const LOOKS = { refused: SET_BACK, ruined: SET_BACK, aborted: SET_BACK };
const NOT_TAKEN = ["circle", "soft", 0.97];
const MOST_NOISE = 32;
const MOST_GAP_STEPS = 16;

export function describeControls() {
  const [rows, trials] = [curve("controls"), curve("control_trials")];
  if (!trials.length && !hasMoved()) return null;
  const colours = palette();
  const axis = axisFor(view.x);
  const withContext = hasContext();
  const data = [
    noiseTrace(axis, colours),
    stepTrace(rows, 1, "rate", axis, { color: colours.c1, width: 5 }, "y"), // seen below the batch where they are equal
    stepTrace(rows, 2, "batch", axis, { color: colours["held-out"], width: 2 }, "y"),
    ...(withContext ? [stepTrace(rows, 3, "context", axis, { color: colours.c2, width: 2.5 }, "y3")] : []),
    trialTrace(trials, axis, colours),
  ];
  const layout = baseLayout(colours, {
    xaxis: { range: xRange(axis), title: { text: axis.title }, anchor: withContext ? "y3" : "y" },
    yaxis: { type: "log", domain: [withContext ? 0.34 : 0, 1], fixedrange: true, automargin: false, ...factorTicks(rows) },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    ...(withContext ? { yaxis3: { type: "log", domain: [0, 0.24], fixedrange: true, automargin: false, ...contextTicks(rows) } } : {}),
  });
  return { data, layout, on: zoomListeners() };
}

// The last row holds up to the newest step.
function stepTrace(rows, place, name, axis, line, yaxis) {
  const known = rows.filter((now) => now[place] !== null);
  const last = known.length ? [[Math.max(known.at(-1)[0], state.progress?.step || 0), ...known.at(-1).slice(1)]] : [];
  const shown = [...known, ...last];
  const unit = place === 3 ? "%{y} tokens" : "×%{y}";
  return {
    type: "scatter", mode: "lines", name, line: { ...line, shape: "hv" }, yaxis,
    x: shown.map((now) => axis.of(now[0])), y: shown.map((now) => now[place]), customdata: shown.map((now) => whole(now[0])),
    hovertemplate: `step %{customdata}: ${unit}<extra>${name}</extra>`,
  };
}

function noiseTrace(axis, colours) {
  const rows = withGaps(curve("noise_scale"));
  return {
    type: "scatter", mode: "lines", name: "noise scale / batch", line: { color: colours.c3, width: 1.2 },
    x: rows.map((now) => axis.of(now[0])), y: rows.map((now) => now[1]), customdata: rows.map((now) => whole(now[0])),
    hovertemplate: "step %{customdata}: %{y:.3~g}× batch<extra>noise scale</extra>",
  };
}

// No line through steps at which it was not known.
function withGaps(rows) {
  const spacing = rows.length > 1 ? (rows.at(-1)[0] - rows[0][0]) / (rows.length - 1) : 0;
  const isGap = (place) => place > 0 && rows[place][0] - rows[place - 1][0] > Math.max(MOST_GAP_STEPS, 4 * spacing);
  return rows.flatMap((now, place) => (isGap(place) ? [[rows[place - 1][0], null], now] : [now]));
}

function trialTrace(trials, axis, colours) {
  const looks = trials.map(([, , verdict, , isKept]) => (isKept ? KEPT : LOOKS[verdict] || NOT_TAKEN));
  return {
    type: "scatter", mode: "markers", yaxis: "y2", cliponaxis: false, x: trials.map(([step]) => axis.of(step)), y: looks.map((look) => look[2]),
    marker: { symbol: looks.map((look) => look[0]), color: looks.map((look) => colours[look[1]]), size: 10 },
    hoverinfo: "text", hovertext: trials.map(([step, , , why]) => wrapped(`step ${whole(step)}: ${why}`)),
  };
}

// Powers of two that hold every factor and most of the noise scale, with half a power to spare. A noise scale far
// from every batch leaves the chart: how the controls stand would be a flat line beside it.
function factorTicks(rows) {
  const noise = curve("noise_scale").map((now) => now[1]).sort((a, b) => a - b);
  const inner = [noise[Math.floor(0.02 * noise.length)], noise[Math.floor(0.98 * noise.length)]].filter((value) => value > 0)
    .map((value) => Math.min(MOST_NOISE, Math.max(1 / MOST_NOISE, value)));
  return logTicks([0.5, 2, ...inner, ...rows.flatMap((now) => [now[1], now[2]])], (power) => (power < 0 ? `÷${2 ** -power}` : `×${2 ** power}`));
}

const contextTicks = (rows) => logTicks(rows.map((now) => now[3]).filter((tokens) => tokens > 0), (power) => String(2 ** power), 0.3);

function logTicks(values, words, spare = 0.5) {
  const [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log2);
  const every = Math.max(1, Math.ceil((high - low) / 8));
  const powers = [];
  for (let power = Math.ceil(low / every) * every; power <= high; power += every) powers.push(power);
  return {
    range: [low - spare, high + spare].map((power) => power * Math.log10(2)), tickmode: "array",
    tickvals: powers.map((power) => 2 ** power), ticktext: powers.map(words),
  };
}
