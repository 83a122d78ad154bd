// Memory in words: how full against the thresholds, who holds what, the outlook, what was ordered and what came of it.
import { byId, element, fillList, legendItem } from "./dom.js";
import { curve } from "./feed.js";
import { LEVELS, heldBy, showsLimits } from "./memory_chart.js";
import { DASH, bytes, clock, duration, isKnown, rate } from "./words.js";

export function drawMemory(memory) {
  if (!memory) return;
  const share = (part) => (isKnown(part) && memory.total_bytes ? (100 * part) / memory.total_bytes + "%" : null);
  byId("memory-used").style.width = share(memory.used_bytes) ?? "0";
  byId("memory-bar").dataset.unknown = isKnown(memory.used_bytes) ? "no" : "yes";
  byId("memory-used").dataset.level = memory.level;
  byId("memory-level").textContent = isKnown(memory.used_bytes) ? memory.level : "unknown";
  byId("memory-level").dataset.level = isKnown(memory.used_bytes) ? memory.level : "unknown";
  for (const level of LEVELS) {
    const mark = byId("bar-" + level);
    mark.hidden = share(memory[level + "_bytes"]) === null;
    mark.style.left = share(memory[level + "_bytes"]) ?? "0";
    mark.title = `${level} from ${bytes(memory[level + "_bytes"])}`;
  }
  byId("memory-words").textContent = words(memory).join(" · ");
  byId("limits").checked = showsLimits();
  drawHolders();
}

function words(memory) {
  const parts = [`${bytes(memory.used_bytes)} of ${bytes(memory.total_bytes)}`];
  if (memory.device) parts.push(`${memory.device}, read by ${memory.source}`);
  if (memory.unknown_reason) parts.push("unknown: " + memory.unknown_reason);
  if (isKnown(memory.trainer_bytes) && memory.trainer_bytes !== memory.used_bytes) parts.push("trainer " + bytes(memory.trainer_bytes));
  const limits = LEVELS.filter((level) => isKnown(memory[level + "_bytes"])).map((level) => `${level} ${bytes(memory[level + "_bytes"])}`);
  if (limits.length) parts.push("thresholds: " + limits.join(", "));
  if (isKnown(memory.seconds_until_emergency)) parts.push(`will cross emergency in about ${duration(memory.seconds_until_emergency)}`);
  if (memory.is_thrashing) parts.push("the allocator is thrashing");
  if (memory.in_force?.length) parts.push("in force: " + memory.in_force.join(", "));
  const away = ({ place }) => (place === "device" ? "" : " on " + place);
  const planned = (memory.planned || []).filter((holder) => holder.num_bytes > 0)
    .map((holder) => `${holder.name} ${bytes(holder.num_bytes)}${away(holder)}`);
  if (planned.length) parts.push("planned: " + planned.join(", "));
  const valueOf = (said) => {
    if (!isKnown(said.value)) return `unknown (${said.unknown_reason})`;
    if (said.unit === "B") return bytes(said.value);
    return rate(said.value) + (said.unit === "1" ? "" : " " + said.unit);
  };
  const readings = Object.entries(memory.readings || {}).slice(0, 12)
    .map(([name, said]) => `${name.replaceAll("_", " ")} ${valueOf(said)}`);
  return [...parts, ...readings];
}

function drawHolders() {
  const newest = curve("holders").at(-1)?.[1] || [];
  byId("holders").replaceChildren(...heldBy().map(([name, place]) => legendItem(name, bytes(newest[place]), `var(--c${place % 8})`)));
}

export function drawOrders(orders) {
  const line = (order) => {
    const freed = isKnown(order.bytes_before) && isKnown(order.bytes_after);
    const answer = !order.done ? ["not answered yet", "soft"]
      : order.refused ? ["refused" + (order.detail ? ": " + order.detail : ""), "bad"]
        : [freed ? `done, ${bytes(order.bytes_before)} → ${bytes(order.bytes_after)}` : order.detail || "done", "good"];
    const made = element("li");
    made.append(element("time", clock(order.at_unix_seconds) || DASH));
    made.append(element("span", `${order.action}: ${order.reason} `), element("span", ...answer));
    return made;
  };
  fillList("orders", orders.map(line), "no orders");
}
