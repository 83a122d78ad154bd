// The runs of a folder side by side: one chart, one table. Polls, because the files of a run change slowly.
import { addChart, baseLayout, drawNow, drawSoon, escaped, palette, startCharts } from "./charts.js";
import { byId, element } from "./dom.js";
import { DASH, duration, isKnown, percent, whole } from "./words.js";

const POLL_MILLISECONDS = 5000;
const SHOWN_LETTERS = 40; // of a cell; the whole text is its tooltip
const COLOURS = ["#3b76d6", "#d9822b", "#2f9e63", "#c94f7c", "#8a63d2", "#1f9aa8", "#a8842c", "#d1495b"];
const DASHES = ["solid", "dash", "dot", "dashdot"]; // with the colours 32 runs that can be told apart

const wish = new URLSearchParams(location.hash.slice(1)); // the view as a permalink
const view = {
  x: wish.get("x") === "seconds" ? "seconds" : "step",
  log: wish.get("log") !== "no",
  sort: wish.get("sort") || "name",
  down: wish.get("down") === "yes",
  hidden: new Set(wish.getAll("hide")),
};
let found = { revision: "", runs: [], setting_keys: [], note: "", folder: "" };

const loss = (run) => (isKnown(run.loss_last) ? run.loss_last.toFixed(4) : run.loss_last_marker || DASH);
const short = (text) => (text.length > SHOWN_LETTERS ? text.slice(0, SHOWN_LETTERS - 1) + "…" : text);
const share = (run) => (isKnown(run.virtual_share) ? percent(run.virtual_share) : DASH);
// [key, heading, text of a run, value to sort by]
const COLUMNS = [
  ["name", "run", (run) => run.name, (run) => run.name],
  ["status", "status", (run) => run.status || DASH, (run) => run.status],
  ["steps", "steps", (run) => whole(run.steps), (run) => run.steps],
  ["loss", "final loss", loss, (run) => run.loss_last],
  ["seconds", "time", (run) => duration(run.seconds), (run) => run.seconds],
  ["kept", "kept", (run) => whole(run.kept), (run) => run.kept],
  ["refused", "refused", (run) => whole(run.refused), (run) => run.refused],
  ["virtual", "virtual", share, (run) => run.virtual_share],
];
const TASK = ["task", "task", (run) => run.task || DASH, (run) => run.task];
const columns = () => [
  ...COLUMNS,
  ...found.setting_keys.map((key) => {
    const of = (run) => run.settings[key];
    return ["set." + key, key, (run) => of(run) ?? DASH, (run) => (of(run) !== "" && isFinite(of(run) ?? NaN) ? Number(of(run)) : of(run))];
  }),
  TASK, // last: it is the widest
];

// Unknown comes last, whichever way is sorted.
function ordered(runs) {
  const [, , , valueOf] = columns().find(([key]) => key === view.sort) || COLUMNS[0];
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  return [...runs].sort((one, other) => {
    const [a, b] = [valueOf(one), valueOf(other)];
    if (!isKnown(a) || !isKnown(b)) return isKnown(b) - isKnown(a);
    return (view.down ? -1 : 1) * compare(a, b);
  });
}

const look = (run) => {
  const place = found.runs.filter((other) => other.curve.length).indexOf(run);
  return { color: COLOURS[place % COLOURS.length], dash: DASHES[Math.floor(place / COLOURS.length) % DASHES.length] };
};

function drawHeading() {
  byId("heading").replaceChildren(element("th", ""), ...columns().map(([key, heading]) => {
    const cell = element("th");
    const sorter = element("button", heading, "sort");
    sorter.type = "button";
    sorter.dataset.key = key;
    sorter.addEventListener("click", () => {
      view.down = view.sort === key && !view.down;
      view.sort = key;
      drawTable();
      document.querySelector(`#heading button[data-key="${CSS.escape(key)}"]`).focus();
      remember();
    });
    cell.append(sorter);
    if (view.sort === key) cell.ariaSort = view.down ? "descending" : "ascending";
    if (view.sort === key) sorter.append(view.down ? " ▼" : " ▲");
    return cell;
  }));
}

function drawTable() {
  drawHeading();
  byId("rows").replaceChildren(...ordered(found.runs).map((run) => {
    const made = element("tr");
    const box = element("input");
    box.type = "checkbox";
    box.checked = !view.hidden.has(run.name);
    box.ariaLabel = "show the curve of " + run.name;
    box.style.accentColor = look(run).color;
    box.addEventListener("change", () => {
      view.hidden[box.checked ? "delete" : "add"](run.name);
      drawNow();
      remember();
    });
    const first = element("td");
    if (run.curve.length) first.append(box);
    made.append(first, ...columns().map(([key, , textOf]) => {
      const text = String(textOf(run));
      const cell = element("td", key === "name" ? text : short(text));
      if (cell.textContent !== text) cell.title = text;
      return cell;
    }));
    const name = made.children[1];
    if (run.curve.length) name.style.color = look(run).color;
    for (const problem of run.problems) name.append(element("div", problem, "bad problem"));
    return made;
  }));
}

function describeChart() {
  const drawn = found.runs.filter((run) => run.curve.length && !view.hidden.has(run.name));
  if (!drawn.length) return null;
  const data = drawn.map((run) => {
    const points = run.curve.filter((row) => view.x === "step" || isKnown(row[2]));
    return {
      type: "scatter", mode: points.length < 60 ? "lines+markers" : "lines", name: escaped(run.name), line: look(run),
      marker: { size: 4 }, x: points.map((row) => row[view.x === "step" ? 0 : 2]), y: points.map((row) => row[1]),
      hovertemplate: "%{fullData.name}<br>%{x:,.0f}: %{y:.4f}<extra></extra>",
    };
  });
  const title = view.x === "step" ? "step" : "seconds of training";
  return { data, layout: baseLayout(palette(), {
    xaxis: { title: { text: title } }, yaxis: { type: view.log ? "log" : "linear" }, uirevision: view.x + view.log,
  }) };
}

function drawWords() {
  const damaged = found.runs.filter((run) => run.problems.length).length;
  const words = [`${found.runs.length === 1 ? "1 run" : whole(found.runs.length) + " runs"} in ${found.folder}.`];
  if (damaged) words.push(`${whole(damaged)} could not be read in whole; the reason stands below the name.`);
  if (found.note) words.push(found.note + ".");
  byId("words").textContent = words.join(" ");
  const marks = found.runs.flatMap((run) => run.marks.slice(-2).map(([step, marker]) => `${run.name}: ${marker} at step ${whole(step)}`));
  byId("chart-note").textContent = marks.length ? "Losses that are not numbers: " + marks.slice(-8).join(", ") : "";
}

function remember() {
  const said = new URLSearchParams({ x: view.x, log: view.log ? "yes" : "no", sort: view.sort, down: view.down ? "yes" : "no" });
  for (const name of view.hidden) said.append("hide", name);
  history.replaceState(null, "", "#" + said);
}

function show(answer) {
  // A redrawn table loses the focus, so it is redrawn only when something in it changed.
  found = answer;
  drawTable();
  drawWords();
  drawSoon();
}

async function refresh() {
  try {
    const answer = await fetch("/api/runs?have=" + found.revision);
    if (answer.status === 200) show(await answer.json());
    if (answer.status === 404) {
      byId("words").textContent = "This address shows one run. For a folder of them: monitor-node compare RUNS_DIR";
      return;
    }
    const failed = answer.ok ? "" : (await answer.json()).error;
    byId("link").textContent = failed || "reading every 5 s";
    byId("link").dataset.ok = failed ? "no" : "yes";
  } catch {
    byId("link").textContent = "monitor-node compare is not reachable, trying again";
    byId("link").dataset.ok = "no";
  }
  setTimeout(refresh, POLL_MILLISECONDS);
}

byId("x-axis").value = view.x;
byId("log-loss").checked = view.log;
byId("x-axis").addEventListener("change", () => { view.x = byId("x-axis").value; drawNow(); remember(); });
byId("log-loss").addEventListener("change", () => { view.log = byId("log-loss").checked; drawNow(); remember(); });
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawNow());
addChart("chart", describeChart);
startCharts();
refresh();
