"""Run folders as a trainer leaves them, in a few lines, for tests of the reader and of the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.config import dump_settings, parse_settings
from monitor_node.runs import Run, RunsFolder

ATTACK = "<img src=x onerror=document.title='stolen'>"


def evaluation(step: int, loss: float | str) -> dict[str, Any]:
    said = {"step": step, "virtual_steps": 0, "loss": loss, "accuracy": None, "train_seconds": step / 10}
    return {"kind": "Evaluation", **said}


def observation(step: int, virtual_share: float = 0.0) -> dict[str, Any]:
    return {"kind": "Observation", "step": step, "attempt": 0, "virtual_share_of_run": virtual_share}


def outcome(verdict: str) -> dict[str, Any]:
    return {"kind": "Outcome", "verdict": verdict, "loss_end": "nan"}


ENDED = {"kind": "RunEnded", "step": 100, "reason": "finished"}
LINES = (
    evaluation(0, 7.0), observation(50), outcome("accepted"), outcome("refused"), outcome("rest"),
    evaluation(50, 4.0), observation(100, 0.2), evaluation(100, 3.0), ENDED,
)  # fmt: skip
SUMMARY = {
    "status": "finished", "task": "digits", "real_steps": 100, "seconds_total": 12.5, "accepted": 5,
    "refused": 2, "virtual_share": 0.25, "val_loss_first": 7.0, "val_loss_last": 2.9,
}  # fmt: skip


def add_lines(folder: Path, *lines: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def make_run(
    runs: Path,
    name: str,
    *lines: dict[str, Any],
    summary: dict[str, Any] | None = None,
    values: dict[str, Any] | None = None,
) -> Path:
    folder = runs / name
    folder.mkdir()
    (folder / "config.toml").write_text(dump_settings(parse_settings(values or {})))
    add_lines(folder, *(lines or LINES))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def read(folder: Path) -> dict[str, Run]:
    found, _ = RunsFolder(folder).read()
    return {run.name: run for run in found}
