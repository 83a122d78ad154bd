// Progress per second, kept real and accepted virtual steps with all costs counted, against plain training.
import { axisFor } from "./axis.js";
import { baseLayout, palette } from "./charts.js";
import { curve } from "./feed.js";
import { view } from "./view.js";
import { isKnown, whole } from "./words.js";
import { xRange, zoomListeners } from "./zoom.js";

export function describePace() {
  const rows = curve("pace");
  if (!rows.some((row) => isKnown(row[1]))) return null;
  const colours = palette();
  const axis = axisFor(view.x);
  const trace = (place, name, line) => ({
    type: "scatter", mode: "lines", name, line, connectgaps: false,
    x: rows.map((row) => axis.of(row[0])), y: rows.map((row) => row[place]), customdata: rows.map((row) => whole(row[0])),
    hovertemplate: `step %{customdata}: %{y:.3f} steps/s<extra>${name}</extra>`,
  });
  const layout = baseLayout(colours, {
    hovermode: "x unified",
    xaxis: { range: xRange(axis), title: { text: axis.title } },
    yaxis: { title: { text: "steps/s" }, range: rangeOf(rows), fixedrange: true, automargin: false, nticks: 5 },
  });
  return {
    data: [
      trace(2, "plain training", { color: colours.soft, width: 1.5, dash: "dash" }),
      trace(1, "this run", { color: colours["held-out"], width: 2.5 }),
    ],
    layout,
    on: zoomListeners(),
  };
}

// Fits the curves with a tenth to spare: the difference is what one wants to see.
function rangeOf(rows) {
  const rates = rows.flatMap((row) => [row[1], row[2]]).filter(isKnown);
  return [0.9 * Math.min(...rates), 1.1 * Math.max(...rates)];
}
