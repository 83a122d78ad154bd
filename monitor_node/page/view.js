// How the viewer looks at the run: scale, x axis, smoothing, zoom. Kept in the address, so a link shows the same.
// Zoom is kept in steps, seconds or tokens (whatever x is) and in loss, so it means the same on a longer run.

export const X_AXES = ["step", "time", "tokens"];
const FRESH = { scale: "log", x: "step", smooth: 0.8, from: null, to: null, low: null, high: null, limits: null, since: null, until: null };

export const view = { ...FRESH };
const listeners = [];

export const onView = (listener) => listeners.push(listener);

export function parseView(hash) {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const numberOf = (key) => (said.has(key) && Number.isFinite(Number(said.get(key))) ? Number(said.get(key)) : null);
  const pair = (a, b) => (numberOf(a) !== null && numberOf(b) > numberOf(a) ? [numberOf(a), numberOf(b)] : [null, null]);
  const [from, to] = pair("from", "to");
  const [low, high] = pair("low", "high");
  const [since, until] = pair("since", "until"); // of the memory chart, in unix seconds
  return {
    scale: said.get("scale") === "linear" ? "linear" : "log",
    x: X_AXES.includes(said.get("x")) ? said.get("x") : "step",
    smooth: Math.min(0.99, Math.max(0, numberOf("smooth") ?? FRESH.smooth)),
    from, to, low, high, since, until,
    limits: { yes: true, no: false }[said.get("limits")] ?? null,
  };
}

export function formatView(shown) {
  const said = new URLSearchParams();
  for (const [key, value] of Object.entries(shown)) {
    if (value === null || value === FRESH[key]) continue;
    if (typeof value === "boolean") said.set(key, value ? "yes" : "no");
    else said.set(key, typeof value === "number" ? String(Number(value.toPrecision(12))) : value);
  }
  return said.toString();
}

export const isZoomed = () => view.from !== null || view.low !== null || view.since !== null;
export const resetZoom = () => changeView({ from: null, to: null, low: null, high: null, since: null, until: null });

export function changeView(change) {
  if (change.x && change.x !== view.x) change = { ...change, from: null, to: null };
  Object.assign(view, change);
  const said = formatView(view);
  history.replaceState(null, "", said ? "#" + said : location.pathname + location.search);
  listeners.forEach((listener) => listener());
}

function fromAddress() {
  Object.assign(view, parseView(location.hash));
  listeners.forEach((listener) => listener());
}
fromAddress();
window.addEventListener("hashchange", fromAddress);
