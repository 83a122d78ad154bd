"""What the monitor costs its machine: `python -m tests.bench.monitor_cost [--seconds 30]`.

A real `monitor-node serve` on a private server, sampling memory once a second, beside a synthetic trainer
that tells ten steps a second and beats twice; a long run is on the streams before it. Memory (resident set)
and CPU time of that process alone, as psutil reads them, first with nobody watching, then with the page open
in a headless Chromium (without one: a reader of its events). Prints a table; asserts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.bench.live_page import Viewers
from tests.bench.live_run import LiveRun, machine, table
from tests.monitor.browser import Browser, chromium_path

SETTLE_SECONDS = 10.0  # the start, and the reading of what was on the streams, are told apart
MIB = 1 << 20


class Peak:
    """Highest resident set of a process and its children, looked at five times a second."""

    def __init__(self, process: psutil.Process) -> None:
        self.highest_bytes = 0
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.2):
            everyone = (self._process, *self._process.children(recursive=True))
            resident_bytes = sum(process.memory_info().rss for process in everyone)
            self.highest_bytes = max(self.highest_bytes, resident_bytes)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def measured(run: LiveRun, label: str, seconds: float) -> tuple[str, ...]:
    before_seconds, begun_seconds = cpu_seconds(run.monitor), time.perf_counter()
    with Peak(run.monitor) as peak:
        told = run.run_for(seconds)
    share = (cpu_seconds(run.monitor) - before_seconds) / (time.perf_counter() - begun_seconds)
    rate = len(told) / seconds
    return label, f"{peak.highest_bytes / MIB:.0f} MiB", f"{share:.1%}", f"{rate:.1f} steps/s"


@contextlib.contextmanager
def one_viewer(url: str) -> Iterator[str]:
    """Whoever it is, in words."""
    program = chromium_path()
    if program is None:
        with Viewers(url, 1):
            yield "1 reader of its events"
        return
    with Browser(program) as browser:
        browser.show(width=1280, height=900)
        browser.open(url)
        browser.wait_until("document.getElementById('run-id').innerText === 'bench'", deadline_seconds=60.0)
        yield "page open in Chromium"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each row")
    parser.add_argument("--earlier-steps", type=int, default=20_000, help="on the streams before")
    options = parser.parse_args()
    print(machine())
    with (
        tempfile.TemporaryDirectory() as folder,
        LiveRun(Path(folder), earlier_steps=options.earlier_steps) as run,
    ):
        run.run_for(SETTLE_SECONDS)
        start_seconds = cpu_seconds(run.monitor)
        rows = [measured(run, "nobody watches", options.seconds)]
        with one_viewer(run.url) as viewer:
            run.run_for(SETTLE_SECONDS)
            rows.append(measured(run, viewer, options.seconds))
    print(f"{options.earlier_steps:,} steps before, {options.seconds:.0f} s a row; CPU: share of one core\n")
    print(table(("", "resident, highest", "CPU", "told"), rows))
    print(f"\nstart and reading of what was on the streams: {start_seconds:.1f} s of CPU")


if __name__ == "__main__":
    main()
