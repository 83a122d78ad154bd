"""The real processes of a load benchmark on one private server, and what can be seen of them from outside.

Owns writers (tests/bench/load_writer.py), predictors and recorders as child processes, their resident sets,
and the newest heartbeat counters of each predictor. Measures; judges nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from common import codec
from common.bus import STREAM_START, Bus, EntryId
from common.embedded import EmbeddedServer, find_binary
from common.messages import Alert, Heartbeat
from common.open_bus import open_bus
from common.streams import PREDICTOR, notes_of

MIB = 1 << 20
START_SECONDS = 60.0
CATCH_UP_SECONDS = 120.0
END_SECONDS = 30.0


class Child:
    """A process whose address of the server is in its environment, never on its command line."""

    def __init__(
        self, name: str, arguments: Sequence[str], url: str, log: Path, *, says: bool = False
    ) -> None:
        self.name = name
        self.lines: list[Any] = []  # JSON that it printed, if it `says` something
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HPT_")}
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if says else self._log,
            stderr=self._log,
            env=environment | {"HPT_REDIS_URL": url, "OMP_NUM_THREADS": "1"},
        )
        if says:
            assert self.process.stdin is not None
            self.process.stdin.write(f"{url}\n".encode())
            self.process.stdin.flush()
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.lines.append(json.loads(line))

    @property
    def newest(self) -> Any:
        return self.lines[-1] if self.lines else None

    @property
    def rss_bytes(self) -> int:
        return rss_bytes_of(self.process.pid)

    def wait(self, seconds: float) -> None:
        self.process.wait(seconds)
        if hasattr(self, "_reader"):
            self._reader.join(seconds)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(END_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            if pipe is not None:
                pipe.close()


def rss_bytes_of(process_id: int | None) -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(process_id).memory_info().rss)
    return 0


def writer(runs: Sequence[str], url: str, log: Path, *, rate: float, seconds: float, policy: str) -> Child:
    arguments = ("tests.bench.load_writer", "--runs", ",".join(runs), "--rate", str(rate))
    more = ("--seconds", str(seconds), "--policy", policy)
    return Child(f"writer of {len(runs)}", (*arguments, *more), url, log, says=True)


def predictor(run: str, url: str, folder: Path) -> Child:
    states = str(folder / f"{run}-states")
    arguments = ("predictor_node", "serve", "--run-id", run, "--state-dir", states)
    return Child(f"predictor {run}", arguments, url, folder / "predictor.log")


def recorder(run: str, url: str, folder: Path) -> Child:
    file = str(folder / f"{run}.hpt")
    return Child(
        "recorder", ("monitor_node", "record", "--run-id", run, "--out", file), url, folder / "rec.log"
    )


class PredictorWatch:
    """Follows a predictor's notes: its counters, and how often it told of what."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self._read_up_to = bus, STREAM_START
        self.counters: dict[str, float] = {}
        self.step = 0
        self.alerts: dict[str, int] = {}

    def look(self) -> None:
        stream = notes_of(PREDICTOR)
        while entries := self._bus.read_after({stream: self._read_up_to}, max_count=500, block_seconds=0.0):
            for entry in entries:
                message = codec.decode_entry(entry)
                if isinstance(message, Heartbeat):
                    self.step = message.step
                    self.counters = {m.name: m.value for m in message.counters if m.value is not None}
                elif isinstance(message, Alert):
                    self.alerts[message.kind] = self.alerts.get(message.kind, 0) + 1
            self._read_up_to = entries[-1].id

    def said(self) -> dict[str, Any]:
        return {"counters": self.counters, "alerts": self.alerts}

    @property
    def applied(self) -> EntryId:
        return EntryId(
            int(self.counters.get("applied_generation", 0)), int(self.counters.get("applied_sequence", 0))
        )


def server_facts(server: EmbeddedServer, bus: Bus, stream: str) -> dict[str, int]:
    return {
        "length": bus.length(stream),
        "newest": bus.last_id(stream).sequence,
        "rss_bytes": rss_bytes_of(server.process_id),
    }


def bus_of(server: EmbeddedServer, run: str) -> Bus:
    return open_bus(server.url, run)


def server_name() -> str:
    return Path(find_binary()).name


def until(law: Callable[[], object], seconds: float, words: str) -> None:
    """Poll until `law()` holds; else end with `words`."""
    until_seconds = time.monotonic() + seconds
    while not law():
        if time.monotonic() > until_seconds:
            raise SystemExit(words)
        time.sleep(0.05)
