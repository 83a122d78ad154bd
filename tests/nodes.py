"""Real runs in real processes for the tests: start one, watch its folder, kill parts of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from common import sealed_folder

DEADLINE_SECONDS = 90.0
QUICK = (
    "trainer.threads=1",
    "trainer.batch.sequences=16",
    "trainer.model.channels=4",
    "trainer.statistics_steps=16",
    "trainer.window_steps=8",
    "trainer.probation_steps=8",
    "trainer.schedule.warmup_steps=8",
    "trainer.checkpoint.every_steps=40",
    "trainer.checkpoint.keep=1000",
    "predictor.rest_windows=0",
    "monitor.heartbeat_seconds=0.1",
    "monitor.silent_seconds=2.0",
    "monitor.http=",
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def up_command(runs_dir: Path, run_id: str, *overrides: str, steps: int) -> list[str]:
    settings = [part for text in (*QUICK, *overrides) for part in ("--set", text)]
    return command(
        "trainer_node", "up", "--preset", "digits", "--steps", str(steps), "--runs-dir", str(runs_dir),
        "--run-id", run_id, *settings,
    )  # fmt: skip


def run_to_end(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False, **options
    )


@contextlib.contextmanager
def running(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone afterwards, with all its children."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        family = children_of(process.pid) if process.poll() is None else []
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.communicate()


def children_of(process_id: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process_id).children(recursive=True)
    return []


def child_running(process_id: int, *words: str) -> psutil.Process:
    """The child whose command line holds all words."""

    def find() -> psutil.Process | None:
        for child in children_of(process_id):
            with contextlib.suppress(psutil.Error):
                if all(word in " ".join(child.cmdline()) for word in words):
                    return child
        return None

    return wait_for(find)


def wait_for(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """The first true answer; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.01)
    raise AssertionError(f"nothing after {seconds} s: {condition}")


def checkpoint_steps(run: Path, node: str = "trainer") -> list[int]:
    return [sealed_folder.age_key(f.name)[1] for f in sealed_folder.folders(run / "checkpoints" / node)]


def last_step(run: Path) -> int:
    lines = metric_lines(run, "Observation")
    return lines[-1]["step"] if lines else 0


def metric_lines(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record["kind"] == kind:
                found.append(record)
    return found


def kill(process: psutil.Process | subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())
