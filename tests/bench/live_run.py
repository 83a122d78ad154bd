"""A run that is told by this process on a private server, and the real monitor process that watches it.

For benchmarks of the monitor: the trainer is synthetic (its numbers are invented), server and monitor are
what a user has. Says when each step was told; measures nothing else.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil

from common import messages as m
from common.embedded import start_server
from common.open_bus import open_bus
from common.streams import PREDICTOR, TRAINER
from tests.monitor import fake_run as fake

RUN_ID = "bench"
TOTAL_STEPS = 1_000_000
HEARTBEAT_SECONDS = 0.5
START_SECONDS = 120.0


class LiveRun:
    """Use as a context manager: then the monitor has bound its page at `url`."""

    def __init__(self, folder: Path, *, earlier_steps: int, monitor_options: tuple[str, ...] = ()) -> None:
        """`earlier_steps` are on the streams before the monitor starts: a run that is long under way."""
        self._folder, self._earlier_steps, self._monitor_options = folder, earlier_steps, monitor_options
        self._opened = contextlib.ExitStack()
        self.step = 0
        self.url = ""

    def __enter__(self) -> LiveRun:
        try:
            self._open()
        except BaseException:
            self._opened.close()
            raise
        return self

    def _open(self) -> None:
        server = self._opened.enter_context(start_server())
        self._bus = self._opened.enter_context(contextlib.closing(open_bus(server.url, RUN_ID)))
        self._tell_earlier_steps()
        self._publishers = {
            node: fake.publisher_of(self._bus, node, generation=2) for node in (TRAINER, PREDICTOR)
        }
        self._beat_at_seconds = 0.0
        self._beat()
        self.monitor = self._opened.enter_context(self._monitor(server.url))
        self.url = self._page_url()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def run_for(self, seconds: float, *, per_second: float = 10.0) -> dict[int, float]:
        """Tell steps in even time. Step -> unix seconds just before it was handed to the server."""
        told: dict[int, float] = {}
        begun_seconds = time.monotonic()
        while (passed_seconds := time.monotonic() - begun_seconds) < seconds:
            due_seconds = len(told) / per_second
            if passed_seconds < due_seconds:
                time.sleep(due_seconds - passed_seconds)
            self._beat()
            self.step += 1
            told[self.step] = time.time()
            self._send(TRAINER, fake.observation(self.step, 1.7 + 0.01 * (self.step % 7)))
        return told

    def _tell_earlier_steps(self) -> None:
        said = list(fake.fake_run(RUN_ID, steps=self._earlier_steps, total_steps=TOTAL_STEPS))
        fake.publish(
            self._bus, iter(said), now_unix_seconds=time.time(), ago_seconds=said[-1].at_seconds + 1.0
        )
        # Above all that were told, also the undone ones: what is told from here on never goes back.
        self.step = max(item.message.step for item in said if isinstance(item.message, m.Observation))

    def _beat(self) -> None:
        """Heartbeats of the trainer, for which this process stands, and of the predictor."""
        if time.monotonic() - self._beat_at_seconds < HEARTBEAT_SECONDS:
            return
        self._beat_at_seconds = time.monotonic()
        uptime_seconds = time.time() - psutil.Process().create_time()
        for node in (TRAINER, PREDICTOR):
            beat = fake.heartbeat(
                node, self.step, generation=2, process_id=os.getpid(), uptime_seconds=uptime_seconds
            )
            self._send(node, beat)

    def _send(self, writer: str, message: m.Message) -> None:
        publisher = self._publishers[writer]
        publisher.send([publisher.prepare(message)], give_up_seconds=10.0)

    @contextlib.contextmanager
    def _monitor(self, server_url: str) -> Iterator[psutil.Process]:
        address_file = self._folder / "page.txt"
        command = [
            sys.executable, "-m", "monitor_node", "serve", "--run-id", RUN_ID, "--http", "127.0.0.1:0",
            "--address-file", str(address_file), "--stop-with-parent", *self._monitor_options,
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HPT_")}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"HPT_REDIS_URL": server_url},
        )
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(20)

    def _page_url(self) -> str:
        address_file = self._folder / "page.txt"
        deadline = time.monotonic() + START_SECONDS
        while not address_file.exists():
            if time.monotonic() > deadline or not self.monitor.is_running():
                raise SystemExit("the monitor did not start; run `monitor-node serve` by hand to see why")
            time.sleep(0.05)
        return address_file.read_text(encoding="utf-8").strip()


def machine() -> str:
    """One line about this machine, now: a busy one shows in its load."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{time.strftime('%Y-%m-%d')}, {processor}, {os.cpu_count()} cores, {memory_gib:.0f} GiB,"
        f" Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
