// The newest snapshot of a run, kept up by server-sent events (feed.py): first everything, then what changed.

export const state = { series: {} };

// Takes a delta {whole, set: {section: value}, curves: {name: {keep, add}}}; the names of all that changed.
// A whole one may come from another monitor: what was known before it is forgotten.
export function take(delta) {
  const changed = new Set();
  if (delta.whole) {
    for (const name of Object.keys(state)) delete state[name];
    state.series = {};
  }
  for (const [name, section] of Object.entries(delta.set)) {
    state[name] = section;
    changed.add(name);
  }
  for (const [name, tail] of Object.entries(delta.curves)) {
    state.series[name] = (state.series[name] || []).slice(0, tail.keep).concat(tail.add);
    changed.add(name);
  }
  return changed;
}

export const curve = (name) => state.series[name] || [];

// `onChange(changed names)` after each delta, `onLink(isConnected)` when the server comes or goes.
// EventSource reconnects by itself and says which event it saw last, so nothing is missed or doubled.
export function follow(onChange, onLink) {
  const events = new EventSource("/api/events");
  events.addEventListener("delta", (event) => {
    onLink(true);
    onChange(take(JSON.parse(event.data)));
  });
  events.addEventListener("open", () => onLink(true));
  events.addEventListener("error", () => onLink(false));
}
