// The phase timeline: which phase ruled when, and every proposal with its horizon, its verdict and why.
import { axisFor } from "./axis.js";
import { baseLayout, palette, wrapped } from "./charts.js";
import { curve } from "./feed.js";
import { view } from "./view.js";
import { difference, isKnown, signed, whole } from "./words.js";
import { xRange, zoomListeners } from "./zoom.js";

const PHASES = { warmup: "warm-up", full: "full training", predict: "jump", correct: "probation after a jump" };
// Verdict -> [symbol, colour]; every other one means that no jump was made.
const LOOKS = {
  accepted: ["triangle-up", "kept"], refused: ["triangle-down", "undone"], ruined: ["x", "undone"],
  aborted: ["triangle-down", "warn"], vetoed: ["square", "vetoed"],
};
const NO_JUMP = ["circle", "soft"];

export function describeTimeline() {
  const [phases, proposals] = [curve("phases"), curve("proposals")];
  if (!phases.length && !proposals.length) return null;
  const colours = palette();
  const axis = axisFor(view.x);
  const data = [...phaseBars(phases, axis, colours), ...horizonTraces(proposals, axis, colours), ...differenceTraces(proposals, axis, colours)];
  const layout = baseLayout(colours, {
    xaxis: { range: xRange(axis), title: { text: axis.title }, anchor: "y3" },
    yaxis: { domain: [0.56, 1], title: { text: "horizon" }, rangemode: "tozero", fixedrange: true, automargin: false, nticks: 4 },
    yaxis2: {
      domain: [0.14, 0.48], title: { text: "vs. forecast" }, fixedrange: true, automargin: false, nticks: 4,
      zeroline: true, zerolinecolor: colours.soft,
    },
    yaxis3: { domain: [0, 0.07], visible: false, range: [-0.5, 0.5], fixedrange: true },
    barmode: "overlay", bargap: 0,
  });
  return { data, layout, on: zoomListeners() };
}

function phaseBars(phases, axis, colours) {
  return Object.entries(PHASES).map(([phase, words]) => {
    const shown = phases.filter((segment) => segment[2] === phase);
    const start = (segment) => axis.of(Math.max(0, segment[0] - 1));
    return {
      type: "bar", orientation: "h", yaxis: "y3", width: 1, marker: { color: colours[phase], line: { width: 0 } }, hoverinfo: "text",
      base: shown.map(start), x: shown.map((segment) => axis.of(segment[1]) - start(segment)), y: shown.map(() => 0),
      hovertext: shown.map(([first, last]) => `${words}, steps ${whole(first)} to ${whole(last)}`),
    };
  });
}

export function proposalWords([step, horizon, verdict, forecast, outcome, why]) {
  const lines = [`step ${whole(step)}: horizon ${whole(horizon)} steps, ${verdict}`];
  if (isKnown(forecast)) lines.push(`forecast without the jump ${forecast.toFixed(4)}`);
  if (isKnown(outcome)) lines.push(`outcome ${outcome.toFixed(4)} (${signed(difference(outcome, forecast))})`);
  return [...lines, why].filter(Boolean).map((line) => wrapped(line)).join("<br>");
}

// Stems from 0 to a value, so single proposals show on a long axis.
function stems(rows, axis, valueOf, yaxis, color) {
  return {
    type: "scatter", mode: "lines", yaxis, hoverinfo: "skip", line: { color, width: 1 },
    x: rows.flatMap((p) => [axis.of(p[0]), axis.of(p[0]), null]), y: rows.flatMap((p) => [0, valueOf(p), null]),
  };
}

function horizonTraces(proposals, axis, colours) {
  const known = [...Object.keys(LOOKS), null];
  return [
    stems(proposals, axis, (p) => p[1], "y", colours.rule),
    ...known.map((verdict) => {
      const rows = proposals.filter((p) => (verdict === null ? !(p[2] in LOOKS) : p[2] === verdict));
      const [symbol, color] = LOOKS[verdict] || NO_JUMP;
      return {
        type: "scatter", mode: "markers", x: rows.map((p) => axis.of(p[0])), y: rows.map((p) => p[1]),
        marker: { symbol, color: colours[color], size: verdict === null ? 6 : 10 }, hoverinfo: "text", hovertext: rows.map(proposalWords),
      };
    }),
  ];
}

// Below zero: the loss after probation was lower than forecast without the jump.
function differenceTraces(proposals, axis, colours) {
  const rows = proposals.filter((p) => difference(p[4], p[3]) !== null);
  const gain = (p) => difference(p[4], p[3]);
  return [
    stems(rows, axis, gain, "y2", colours.rule),
    {
      type: "scatter", mode: "markers", yaxis: "y2", x: rows.map((p) => axis.of(p[0])), y: rows.map(gain),
      marker: { size: 7, color: rows.map((p) => (gain(p) <= 0 ? colours.good : colours.bad)) },
      hoverinfo: "text", hovertext: rows.map(proposalWords),
    },
  ];
}
