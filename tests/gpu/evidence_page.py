"""docs/evidence-gpu.md from the files of docs/evidence-gpu/ (`python -m tests.gpu.evidence_page`).

A part whose file is missing says that it was not run. Every figure is of a file; a bar that is missed is said
to be missed. Runs nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path("docs/evidence-gpu")
PAGE = Path("docs/evidence-gpu.md")
FILES = ("pieces.jsonl", "tests.json", "bare_loop.jsonl", "apply_delta.jsonl", "race.json")
NOT_RUN = "Not run."
APPLY_BAR_SHARE = 0.70
BARRED = ("apply: compiled", "snapshot", "restore")
HEAD = """# Evidence from a GPU

Rendered from the files of `docs/evidence-gpu/` by `make gpu`; never typed, and a test fails when page and
files differ. `make gpu` runs in pieces of at most 8 minutes and goes on where the last call ended.
"""


def render(folder: Path) -> str:
    if not any((folder / name).is_file() for name in FILES):
        return f"{HEAD}\n**Nothing was run**: no GPU was at hand. No figure for a GPU is claimed anywhere.\n"
    parts = [
        ("Tests that need a GPU", _tests(_one(folder / "tests.json"))),
        ("Overhead against a bare loop", _bare_loop(_lines(folder / "bare_loop.jsonl"))),
        (
            "A jump, a snapshot, a restore: share of the bandwidth",
            _apply(_lines(folder / "apply_delta.jsonl")),
        ),
        ("The race of `gpt2-small`", _race(_one(folder / "race.json"))),
        ("What was run", _attempts(_lines(folder / "pieces.jsonl"))),
    ]
    return "\n".join([HEAD, *(f"## {title}\n\n{text}\n" for title, text in parts)])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _one(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tests(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return NOT_RUN
    bad = found["failures"] + found["errors"]
    passed = found["tests"] - bad - found["skipped"]
    verdict = "" if not bad else " **Not all pass.**"
    return (
        f"{passed} passed, {bad} failed, {found['skipped']} skipped, {found['seconds']:.0f} s,"
        f" on {found['machine']}.{verdict}"
    )


def _bare_loop(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return NOT_RUN
    first = found[0]
    rows = []
    for name in first["arms"]:
        arms = [line["arms"][name] for line in found]
        spreads = [arm[f"{first['clock']}_overhead_percent"] for arm in arms]
        overhead = statistics.median(spread["median"] for spread in spreads)
        least, most = min(s["least"] for s in spreads), max(s["most"] for s in spreads)
        is_barred = name == "trainer, prediction off"
        verdict = ("yes" if overhead <= first["bar_percent"] else "**missed**") if is_barred else ""
        speed = statistics.median(arm["tokens_per_second"] for arm in arms)
        share = statistics.median(arm["mfu"] for arm in arms)
        spread_text = f"{least:+.2f} to {most:+.2f}"
        rows.append([name, f"{overhead:+.2f} %", spread_text, f"{speed:,.0f}", f"{share:.1%}", verdict])
    rounds = sum(line["rounds"] for line in found)
    return (
        f"`{first['preset']}` on {first['machine']}; {rounds} rounds of {first['steps_per_round']} steps,"
        f" arms in turns, {first['clock']} time. Peak for MFU: {first['peak_flops'] / 1e12:.1f} TFLOP/s"
        f" ({first['peak_is']}); a large product reached {first['measured_peak_flops'] / 1e12:.1f}."
        f" Bar: prediction off at most {first['bar_percent']:g} %.\n\n"
        + _table(["arm", "overhead", "rounds", "tokens/s", "MFU", "bar"], rows)
    )


def _apply(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return NOT_RUN
    rows = []
    for line in found:
        for name, arm in line["arms"].items():
            share = arm["share_of_copy"]
            verdict = ("yes" if share >= APPLY_BAR_SHARE else "**missed**") if name in BARRED else ""
            speed = f"{arm['gigabytes_per_second']:,.0f} GB/s"
            spread = f"{arm['share_least']:.0%} to {arm['share_most']:.0%}"
            rows.append([f"{line['parameters']:,}", name, speed, f"{share:.0%}", spread, verdict])
    return (
        f"{found[0]['machine']}. Bar: {APPLY_BAR_SHARE:.0%} of a plain copy, of a copy over the bus for"
        " snapshot and restore. Small sizes are in the cache.\n\n"
        + _table(["weights", "what", "speed", "of a copy", "rounds", "bar"], rows)
    )


def _race(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return NOT_RUN
    race = found["race"]
    rows = []
    for name, arm in found["arms"].items():
        misses, seconds = arm["misses"], arm["seconds_median"]
        time = f"{seconds:,.0f} s" if _is_number(seconds) else "never"
        rows.append([name, time, f"{misses} of {len(race['seeds'])}"])
    pairs = [
        f"{pair['arm']} against {pair['versus']}: {pair['median']:.3f}×"
        f" ({pair['low95']:.3f} – {pair['high95']:.3f})"
        for pair in found["pairs"]
        if all(_is_number(pair[key]) for key in ("median", "low95", "high95"))
    ]
    is_whole = race["target"] is not None and not race["incomplete"]
    state = "" if is_whole else " **Not finished**: arms or runs are missing."
    target = f"{race['target']:.4f}" if race["target"] is not None else "not set"
    return (
        f"`{race['command']}` on {race['machine']}, {race['date']}; target {target},"
        f" {len(race['seeds'])} seeds, {race['trials']} trials.{state}\n\n"
        + _table(["arm", "to the target", "missed"], rows)
        + "".join(f"\n\n{line}" for line in pairs)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _attempts(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return NOT_RUN
    rows = [[a["date"], a["piece"], f"{a['seconds']:.0f} s", str(a["code"])] for a in found]
    return _table(["day", "piece", "took", "exit code"], rows)


if __name__ == "__main__":
    PAGE.write_text(render(FOLDER), encoding="utf-8")
