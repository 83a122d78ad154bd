"""72 hours of a run's messages at full speed through each node: does anything grow?

Each node is a process of its own, so that its resident set says something: the predictor (its states in a
folder, pruned as in a run), the monitor (reader, view, health, snapshots, feed of the page) and the recorder
(file of the run). The messages are made up as they are read (tests/long_run.py), so the generator's few rows
are in the figures; no server is. Prints JSON lines; load.py reads them.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import psutil

from common import codec
from common.clock import FakeClock
from common.recorder import Recorder
from common.recording_writer import RecordingWriter
from common.streams import HISTORY, STREAMS
from monitor_node.feed import Feed
from monitor_node.health import HealthWatch
from monitor_node.run_reader import RunReader, new_view
from monitor_node.snapshot import as_dict
from predictor_node.node import Predictor
from predictor_node.state import FolderStore
from tests.long_run import START_UNIX_SECONDS, LongRun, Tape, long_settings
from tests.predictor.scripted import RUN_ID

NODES = ("predictor", "monitor", "recorder")
SAMPLES = 100
SNAPSHOT_READS = 8  # a snapshot for every so many reads: about one a minute of the run
WARM_UP_SHARE = 0.25
SAMPLED_WEIGHTS = 512  # of each group; the per-weight forecaster is on
_GROWN_LINES = 12


def run_of(hours: float, steps_per_second: float, *, learns: bool) -> tuple[LongRun, int]:
    steps = round(hours * 3600 * steps_per_second)
    settings = long_settings(
        'predictor.policy="learned"',
        "trainer.basis.history_snapshots=3",
        f"predictor.learn_share={4.0 if learns else 0.05}",
        steps=steps,
    )
    run = LongRun(
        settings=settings,
        steps_per_second=steps_per_second,
        sampled_weights=SAMPLED_WEIGHTS,
        shape=(256, 256) if learns else (2, 3),
    )
    return run, steps


def predictor_turns(tape: Tape, folder: Path) -> Iterator[None]:
    """By the real codec; each read is a turn."""
    predictor = Predictor(FolderStore(folder / "predictor"))
    while not tape.ended:
        for entry in tape.entries(500):
            if entry.stream == HISTORY:
                for answer in predictor.handle(codec.decode_entry(entry), entry.id):
                    codec.encode(answer)
        yield


def monitor_turns(tape: Tape, folder: Path) -> Iterator[None]:
    """What node.MonitorNode does with what it reads; it has no device and gives no orders."""
    clock = FakeClock(START_UNIX_SECONDS)
    view, health, feed = new_view(RUN_ID), HealthWatch(), Feed("boot")
    reader = RunReader(tape, view, clock)  # type: ignore[arg-type]
    turns = 0
    while not tape.ended:
        reader.read(block_seconds=0.0)
        reader.caught_up = True  # or every message would count as an old one
        clock.advance(max(0.0, tape.run.unix_seconds - clock.unix()))
        turns += 1
        if turns % SNAPSHOT_READS == 0:
            health.changes(view, clock.monotonic())
            feed.publish(as_dict(view, now_seconds=clock.monotonic()))
            feed.json_since(max(0, feed.revision - 3))
        yield


def recorder_turns(tape: Tape, folder: Path) -> Iterator[None]:
    path = folder / "recording.hpt"
    writer = RecordingWriter(path, run_id=RUN_ID, created_unix_seconds=START_UNIX_SECONDS)
    recorder = Recorder(tape, writer, tuple(STREAMS), clock=FakeClock(START_UNIX_SECONDS))  # type: ignore[arg-type]
    while not tape.ended:
        recorder.run_once(0.0)
        yield
    recorder.seal()


TURNS = {"predictor": predictor_turns, "monitor": monitor_turns, "recorder": recorder_turns}


def watch(node: str, hours: float, steps_per_second: float, *, learns: bool, traced: bool) -> None:
    """In this process; prints a JSON line per sample and one at the end."""
    run, steps = run_of(hours, steps_per_second, learns=learns)
    tape = Tape(run, steps=steps)
    me, started_seconds, done = psutil.Process(), time.perf_counter(), 0
    before: tracemalloc.Snapshot | None = None
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for _ in TURNS[node](tape, Path(folder)):
            if run.told_steps * SAMPLES < done * steps:
                continue
            done += 1
            gc.collect()
            tell(node=node, hour=run.seconds / 3600, entries=tape.num_entries, rss_bytes=me.memory_info().rss)
            if traced and before is None and run.told_steps > WARM_UP_SHARE * steps:
                tracemalloc.start(8)
                before = tracemalloc.take_snapshot()
            elif before is not None and done == 60:
                before = tracemalloc.take_snapshot()
        file_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    if before is not None:
        for line in tracemalloc.take_snapshot().compare_to(before, "lineno")[:_GROWN_LINES]:
            print(line, file=sys.stderr)
    wall_seconds = time.perf_counter() - started_seconds
    tell(node=node, wall_seconds=wall_seconds, entries=tape.num_entries, steps=steps, disk_bytes=file_bytes)


def tell(**values: object) -> None:
    print(json.dumps(values), flush=True)


def slope_per_day(samples: list[dict[str, float]]) -> tuple[float, float, float]:
    """(bytes per day of the run, standard error, bytes after warm-up), by least squares after the warm-up."""
    last_hour = samples[-1]["hour"]
    kept = [s for s in samples if s["hour"] >= WARM_UP_SHARE * last_hour]
    x = [s["hour"] / 24 for s in kept]
    y = [float(s["rss_bytes"]) for s in kept]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    square = math.fsum((a - mean_x) ** 2 for a in x) or 1.0
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / square
    residual = math.fsum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(residual / max(1, len(x) - 2) / square), y[0]
