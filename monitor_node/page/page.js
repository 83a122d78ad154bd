// Draws one run. The server sends a snapshot in sections and later only what changed (feed.py);
// everything shown is text (textContent), never markup.
import { drawChart } from "./chart.js";
import { DASH, bytes, clock, duration, isKnown, measured, number, percent, whole } from "./words.js";

const state = { series: { train: [], held_out: [], forecast: [], memory: [], phases: [], jumps: [] } };
const byId = (id) => document.getElementById(id);

// --- small pieces of page --------------------------------------------------------------------

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}
function row(cells) {
  const made = element("tr");
  for (const [text, className] of cells) made.append(element("td", text, className || ""));
  return made;
}
function fillTable(id, rows) {
  const empty = row([["none yet", "soft"]]);
  empty.firstChild.colSpan = 8;
  byId(id).replaceChildren(...(rows.length ? rows : [empty]));
}
function tile(name, value, detail = "") {
  const made = element("dl", "", "tile");
  made.append(element("dt", name), element("dd", value));
  made.lastChild.append(element("small", detail));
  return made;
}

// --- sections --------------------------------------------------------------------------------

const WENT_WELL = { accepted: "good", refused: "bad", ruined: "bad", aborted: "warn" };

const sections = {
  run(run) {
    document.title = run.run_id + " · " + run.status;
    byId("run-id").textContent = run.run_id;
    byId("status").textContent = run.status;
    byId("status").dataset.status = run.status;
    byId("words").textContent = run.words;
  },
  proposals(proposals) {
    const cells = (p) => {
      const known = isKnown(p.loss_end) && isKnown(p.loss_forecast);
      const gain = known ? p.loss_end - p.loss_forecast : null;
      const sign = gain > 0 ? "+" : "−";
      const look = known && gain <= 0 ? "good" : WENT_WELL[p.verdict] === "bad" ? "bad" : "soft";
      return row([
        [whole(p.step)],
        ["+" + p.horizon_steps],
        [p.verdict + (p.lost_steps ? `, ${p.lost_steps} steps lost` : ""), WENT_WELL[p.verdict] || "soft"],
        [measured(p, "loss_end")],
        [measured(p, "loss_forecast") + (isKnown(p.loss_forecast) ? " ± " + number(p, "loss_spread") : "")],
        [known ? sign + Math.abs(gain).toFixed(4) : DASH, look],
        [measured(p, "delta_cosine", 2)],
        [duration(p.cost_seconds)],
      ]);
    };
    fillTable("proposals", proposals.map(cells));
  },
  nodes(nodes) {
    const looks = { alive: "good", silent: "bad", stalled: "warn" };
    const cells = (n) =>
      row([
        [n.node],
        [n.liveness + (n.state && n.state !== "running" ? ` (${n.state})` : ""), looks[n.liveness] || "soft"],
        [whole(n.step)],
        [isKnown(n.heartbeat_age_seconds) ? duration(n.heartbeat_age_seconds) + " ago" : DASH],
      ]);
    fillTable("nodes", nodes.map(cells));
  },
  memory(memory) {
    const share = (part) => (isKnown(part) && memory.total_bytes ? (100 * part) / memory.total_bytes + "%" : "");
    byId("memory-used").style.width = share(memory.used_bytes) || "0";
    byId("memory-used").dataset.level = memory.level;
    byId("bar-cleanup").style.left = share(memory.cleanup_bytes) || "-9px";
    byId("bar-emergency").style.left = share(memory.emergency_bytes) || "-9px";
    const parts = [`${bytes(memory.used_bytes)} of ${bytes(memory.total_bytes)}`];
    if (memory.device) parts.push(`${memory.device}, read by ${memory.source}`);
    if (isKnown(memory.trainer_bytes) && memory.trainer_bytes !== memory.used_bytes)
      parts.push("trainer " + bytes(memory.trainer_bytes));
    parts.push("level " + memory.level);
    if (isKnown(memory.cleanup_bytes))
      parts.push(`clean-up at ${bytes(memory.cleanup_bytes)}, emergency at ${bytes(memory.emergency_bytes)}`);
    if (memory.unknown_reason) parts.push("unknown: " + memory.unknown_reason);
    byId("memory-words").textContent = parts.join(" · ");
  },
  orders(orders) {
    const line = (order) => {
      const freed = isKnown(order.bytes_before) && isKnown(order.bytes_after);
      const answer = !order.done ? "not answered yet"
        : freed ? `${bytes(order.bytes_before)} → ${bytes(order.bytes_after)}` : order.detail || "done";
      return element("li", `${order.action}: ${order.reason} (${answer})`);
    };
    byId("orders").replaceChildren(...orders.map(line));
  },
  alerts(alerts) {
    const looks = { error: "bad", warning: "warn" };
    const line = (alert) => {
      const made = element("li");
      made.append(element("time", clock(alert.at_unix_seconds)));
      made.append(element("span", alert.text, looks[alert.severity] || ""));
      made.append(element("span", `  ${alert.node}, step ${whole(alert.step)}`, "soft"));
      return made;
    };
    byId("alerts").replaceChildren(...(alerts.length ? alerts.map(line) : [element("li", "none", "soft")]));
  },
  streams(streams) {
    const lengths = Object.entries(streams).map(([name, length]) => `${name} ${whole(length)}`);
    byId("streams").textContent = lengths.length ? "Entries in the streams: " + lengths.join(", ") : "";
  },
  settings(settings) {
    byId("settings").textContent = settings.toml || "not known yet";
  },
};

function drawTiles() {
  const { progress, counters, memory, checkpoint } = state;
  if (!progress || !counters || !memory) return;
  const total = isKnown(progress.total_steps) ? "of " + whole(progress.total_steps) : "";
  const heldOut = isKnown(progress.held_out_step) ? "at step " + whole(progress.held_out_step) : "";
  const undone = counters.refused + counters.ruined + counters.aborted;
  byId("tiles").replaceChildren(
    tile("step", whole(progress.step), total),
    tile("phase", progress.phase || DASH, checkpoint ? "saved at " + whole(checkpoint.step) : ""),
    tile("training loss", number(progress, "loss")),
    tile("held-out loss", number(progress, "held_out_loss"), heldOut),
    tile(progress.unit + "/s", whole(progress.units_per_second),
      isKnown(progress.steps_per_second) ? progress.steps_per_second.toFixed(2) + " steps/s" : ""),
    tile("time left", duration(progress.eta_seconds)),
    tile("virtual steps", whole(progress.virtual_steps), percent(progress.virtual_share) + " of all"),
    tile("kept / undone", `${whole(counters.accepted)} / ${whole(undone)}`,
      progress.lost_steps ? whole(progress.lost_steps) + " steps lost" : ""),
    tile("memory", bytes(memory.used_bytes), "of " + bytes(memory.total_bytes)),
  );
  const rest = ["vetoed", "failed", "stale", "missing", "malformed", "used", "rest"].map((name) => `${name} ${counters[name]}`);
  byId("counters").textContent = `${counters.proposals} proposals; decision points without a jump: ${rest.join(", ")}`;
}

// --- keeping up ------------------------------------------------------------------------------

let chartIsDue = false;
function redrawChart() {
  if (chartIsDue) return;
  chartIsDue = true;
  requestAnimationFrame(() => {
    chartIsDue = false;
    byId("chart-note").textContent = drawChart(byId("chart"), state, byId("log-loss").checked);
  });
}

function take(delta) {
  for (const [name, section] of Object.entries(delta.set)) {
    state[name] = section;
    if (sections[name]) sections[name](section);
  }
  for (const [name, tail] of Object.entries(delta.curves))
    state.series[name] = (state.series[name] || []).slice(0, tail.keep).concat(tail.add);
  drawTiles();
  showLink();
  redrawChart();
}

let isConnected = false;
function showLink() {
  const server = state.server || { connected: true };
  const ok = isConnected && server.connected;
  byId("link").dataset.ok = ok ? "yes" : "no";
  byId("link").textContent = !isConnected ? "monitor not reachable, trying again"
    : server.connected ? "live" : `message server away for ${server.away_seconds} s`;
}

// EventSource reconnects by itself and says which event it saw last, so nothing is missed.
const events = new EventSource("/api/events");
events.addEventListener("delta", (event) => {
  isConnected = true;
  take(JSON.parse(event.data));
});
events.addEventListener("open", () => { isConnected = true; showLink(); });
events.addEventListener("error", () => { isConnected = false; showLink(); });
byId("log-loss").addEventListener("change", redrawChart);
window.addEventListener("resize", redrawChart);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawChart);
