"""A page of a made-up long run in a process of its own, and viewers that read its stream of events.

    python -m tests.bench.live_page STEPS [--every-series]     serves until stdin ends; one JSON line first

For benchmarks; owns who saw which step when. The numbers of the run are invented.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from common import messages as m
from common.streams import NODES
from monitor_node.feed import Feed
from monitor_node.run_reader import new_view
from monitor_node.snapshot import as_dict
from monitor_node.web import PageServer
from tests.monitor import fake_run as fake

_STEP = re.compile(rb'"words":"[^"]*?step ([\d,]+)')  # of the verdict in words (snapshot section `run`)
_CONNECT_SECONDS = 30.0
BATCH = 10_000  # messages made up before they are folded: only the folding is timed


def every_series(steps: int) -> Iterator[fake.Said]:
    """Each step with a training loss and a held-out loss; each tenth with heartbeats and a memory reading."""
    yield fake.Said(writer="trainer", message=fake.started("bench", steps=steps), at_seconds=0.0)
    for step in range(1, steps + 1):
        at_seconds = fake.STEP_SECONDS * step
        loss = 1.7 + 5.2 * math.exp(-step / 60) + 0.06 * math.sin(1e4 * step)
        said: list[m.Message] = [fake.observation(step, loss), fake.evaluation(step, loss + 0.1)]
        if step % 10 == 0:
            said += [fake.heartbeat(node, step, uptime_seconds=at_seconds) for node in NODES]
            said.append(fake.sample(int((8.9 + 0.1 * math.sin(step / 20)) * 2**30)))
        yield from (fake.Said(writer="trainer", message=item, at_seconds=at_seconds) for item in said)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the process says of itself once its page is up."""

    url: str
    fold_seconds: float  # of a processor, without making the messages up
    snapshot_seconds: float  # to make one and publish it
    snapshot_bytes: int  # as JSON
    rows: dict[str, int]  # by curve, in the snapshot


@contextlib.contextmanager
def page_process(steps: int, *, has_every_series: bool = False) -> Iterator[Shown]:
    command = [sys.executable, "-m", "tests.bench.live_page", str(steps)]
    command += ["--every-series"] * has_every_series
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the page did not start; its error is above")
        yield Shown(**json.loads(line))
    finally:
        process.stdin.close()
        process.wait(20)


class Viewers:
    """Readers of one stream of events, all in one thread, as asyncio streams; they parse the step alone."""

    def __init__(self, url: str, count: int) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self.seen: list[list[tuple[int, float]]] = [[] for _ in range(count)]  # (step, unix seconds)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._read_all()), daemon=True)
        self._stop = threading.Event()

    def __enter__(self) -> Viewers:
        self._thread.start()
        deadline = time.monotonic() + _CONNECT_SECONDS
        while not all(self.seen):
            if time.monotonic() > deadline:
                raise SystemExit(f"{sum(map(bool, self.seen))} of {len(self.seen)} viewers got an event")
            time.sleep(0.05)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(10)

    async def _read_all(self) -> None:
        readers = [asyncio.create_task(self._read(seen)) for seen in self.seen]
        while not self._stop.is_set():
            await asyncio.sleep(0.1)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    async def _read(self, seen: list[tuple[int, float]]) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 26)
        request = f"GET /api/events HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n\r\n"
        writer.write(request.encode())
        with contextlib.closing(writer):
            while True:
                event = await reader.readuntil(b"\n\n")
                arrived_seconds = time.time()
                if (found := _STEP.search(event)) is not None:
                    seen.append((int(found[1].replace(b",", b"")), arrived_seconds))


def delays(told: Mapping[int, float], seen: Sequence[tuple[int, float]]) -> list[float]:
    """Seconds from telling a step until a viewer had it or a later one; inf where it never had."""
    found, place = [], 0
    in_time = sorted(seen, key=lambda row: row[1])
    for step, told_seconds in sorted(told.items()):
        while place < len(in_time) and in_time[place][0] < step:
            place += 1
        found.append(in_time[place][1] - told_seconds if place < len(in_time) else math.inf)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by this share of them."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int)
    parser.add_argument("--every-series", action="store_true")
    options = parser.parse_args()
    said = (
        every_series(options.steps)
        if options.every_series
        else fake.fake_run("bench", steps=options.steps, total_steps=2 * options.steps)
    )
    view, feed, fold_seconds = new_view("bench"), Feed("bench"), 0.0
    origin_unix_seconds, at_seconds = time.time(), 0.0
    while batch := list(itertools.islice(said, BATCH)):
        begun_seconds = time.process_time()
        for item in batch:
            at_seconds = item.at_seconds
            view.fold(item.message, sent_unix_seconds=origin_unix_seconds + at_seconds, at_seconds=at_seconds)
        fold_seconds += time.process_time() - begun_seconds
    folded_seconds = time.perf_counter()
    snapshot: dict[str, Any] = as_dict(view, now_seconds=at_seconds)
    feed.publish(snapshot | {"server": {"connected": True, "away_seconds": 0}})
    published_seconds = time.perf_counter()
    page = PageServer(feed, host="127.0.0.1", port=0)
    page.start()
    facts = {
        "url": page.url,
        "fold_seconds": fold_seconds,
        "snapshot_seconds": published_seconds - folded_seconds,
        "snapshot_bytes": len(json.dumps(snapshot)),
        "rows": {name: len(rows) for name, rows in snapshot["series"].items()},
    }
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
    page.stop()


if __name__ == "__main__":
    main()
