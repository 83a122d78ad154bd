// Zoom of the charts that share the x axis of steps. The view owns it; plotly only says what was dragged.
import { axisFor } from "./axis.js";
import { curve, state } from "./feed.js";
import { changeView, resetZoom, view } from "./view.js";

// Shown x range in the axis' own units: the viewer's zoom, else the whole run.
export function xRange(axis) {
  if (view.from !== null) return [view.from / axis.per, view.to / axis.per];
  const last = Math.max(10, state.progress?.step || 0, curve("train").at(-1)?.[0] || 0);
  const [low, high] = [axis.of(0), axis.of(last)];
  return [low, high + 0.01 * (high - low || 1)];
}

// What a chart with this x axis does when it is dragged or double-clicked.
export function zoomListeners(withLoss = false) {
  const listeners = {
    plotly_relayout(event) {
      const axis = axisFor(view.x);
      const change = {};
      if ("xaxis.range[0]" in event)
        [change.from, change.to] = [event["xaxis.range[0]"] * axis.per, event["xaxis.range[1]"] * axis.per];
      if (withLoss && "yaxis.range[0]" in event) {
        const loss = (end) => (view.scale === "log" ? 10 ** end : end);
        [change.low, change.high] = [loss(event["yaxis.range[0]"]), loss(event["yaxis.range[1]"])];
      }
      if (Object.keys(change).length) changeView(change);
    },
    plotly_doubleclick: resetZoom,
  };
  return listeners;
}
