// What the run was made of: settings, git commit and diff, versions. Shown as it was said, never run.
import { byId, element } from "./dom.js";
import { state } from "./feed.js";

const MAX_DIFF_LINES = 3000; // what a browser lays out at once

export function drawProvenance() {
  const { provenance, settings } = state;
  byId("settings").textContent = provenance?.config_toml || settings?.toml || "not known yet";
  byId("commit").textContent = provenance?.git_commit || "not known";
  const versions = provenance?.versions;
  byId("versions").textContent = !versions ? "not known" : typeof versions === "string" ? versions
    : Object.entries(versions).map(([name, version]) => `${name} ${version}`).join("\n");
  drawDiff(provenance?.git_diff);
}

function drawDiff(diff) {
  if (diff === null || diff === undefined) return byId("diff").replaceChildren("not known");
  if (diff === "") return byId("diff").replaceChildren("no changes since the commit");
  const lines = diff.split("\n");
  const left = lines.length - MAX_DIFF_LINES;
  byId("diff").replaceChildren(
    ...lines.slice(0, MAX_DIFF_LINES).map((line) => element("span", line + "\n", lookOf(line))),
    left > 0 ? `(${left} more lines are not shown)` : "",
  );
}

function lookOf(line) {
  if (line.startsWith("+++") || line.startsWith("---") || line.startsWith("diff ")) return "file";
  return line.startsWith("+") ? "good" : line.startsWith("-") ? "bad" : line.startsWith("@@") ? "soft" : "";
}
