// Keys of the page, and the list of them that '?' shows. They do nothing while a text is typed.
import { byId, element } from "./dom.js";
import { save } from "./download.js";
import { X_AXES, changeView, resetZoom, view } from "./view.js";
import { canShow } from "./axis.js";

const smoother = (by) => changeView({ smooth: Math.round(100 * Math.min(0.99, Math.max(0, view.smooth + by))) / 100 });

function nextAxis() {
  const shown = X_AXES.filter(canShow);
  changeView({ x: shown[(shown.indexOf(view.x) + 1) % shown.length] });
}

const keys = {
  l: ["loss on a log or a linear scale", () => changeView({ scale: view.scale === "log" ? "linear" : "log", low: null, high: null })],
  x: ["x axis: step, time, tokens", nextAxis],
  "[": ["less smoothing", () => smoother(-0.1)],
  "]": ["more smoothing", () => smoother(0.1)],
  r: ["whole run again (or double-click a chart)", resetZoom],
  c: ["save the loss as CSV", () => save("loss", "csv")],
  j: ["save everything as JSON", () => save("snapshot", "json")],
  "?": ["this list", () => byId("keys-dialog").showModal()],
};

export function listenForKeys() {
  byId("keys").replaceChildren(...Object.entries(keys).flatMap(([key, [words]]) => {
    const name = element("dt");
    name.append(element("kbd", key));
    return [name, element("dd", words)];
  }));
  byId("show-keys").addEventListener("click", keys["?"][1]);
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("textarea, select, input:not([type=checkbox]):not([type=range]), dialog");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key][1]();
  });
}
