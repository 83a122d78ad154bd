"""Many runs at once on one server: is each of them whole, and nobody's entries in another's streams?

For `python -m tests.bench.load runs`. A few runs have a predictor; a writer process writes several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from common import codec
from common.bus import STREAM_START, Bus
from common.embedded import start_server
from common.messages import Observation
from common.streams import HISTORY
from tests.bench.load_processes import (
    CATCH_UP_SECONDS,
    MIB,
    START_SECONDS,
    PredictorWatch,
    bus_of,
    predictor,
    server_facts,
    until,
    writer,
)


def runs(options: argparse.Namespace) -> dict[str, Any]:
    names = [f"run-{n:02d}" for n in range(options.runs)]
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        server = opened.enter_context(start_server())
        predictors = [predictor(name, server.url, folder) for name in names[: options.predictors]]
        for child in predictors:
            opened.callback(child.end)
        buses = {name: opened.enter_context(contextlib.closing(bus_of(server, name))) for name in names}
        watches = [PredictorWatch(buses[name]) for name in names[: options.predictors]]
        for watch in watches:
            until(lambda watch=watch: watch.look() or bool(watch.counters), START_SECONDS, "no predictor")
        shares = [names[n :: options.writers] for n in range(options.writers)]
        begun = time.monotonic()
        sources = [
            writer(
                share,
                server.url,
                folder / "w.log",
                rate=options.rate,
                seconds=options.seconds,
                policy="fixed",
            )
            for share in shares
        ]
        for source in sources:
            opened.callback(source.end)
        rows = []
        while any(source.process.poll() is None for source in sources):
            time.sleep(1.0)
            facts = server_facts(server, buses[names[0]], HISTORY)
            largest = max(source.rss_bytes for source in sources)
            rows.append({"second": time.monotonic() - begun, "largest_writer_rss_bytes": largest, **facts})
        for source in sources:
            source.wait(CATCH_UP_SECONDS)
        told = [run for source in sources for run in source.newest["end"]]
        for watch in watches:
            watch.look()
        streams = {name: _stream_facts(bus, name) for name, bus in buses.items()}
        said = [watch.said() for watch in watches]
        return {
            "rows": rows,
            "writers": told,
            "streams": streams,
            "predictors": said,
            "seconds": options.seconds,
        }


def _stream_facts(bus: Bus, run: str) -> dict[str, Any]:
    entries = bus.read_after({HISTORY: STREAM_START}, max_count=10**6, block_seconds=0.0)
    sequences = [entry.id.sequence for entry in entries]
    started = codec.decode_entry(entries[0]) if entries else None
    steps = [m.step for m in map(codec.decode_entry, entries) if isinstance(m, Observation)]
    return {
        "entries": len(entries),
        "missing": (sequences[-1] - sequences[0] + 1 - len(sequences)) if sequences else 0,
        "is_its_own": getattr(started, "run_id", None) in (run, None) and steps == sorted(set(steps)),
    }


def show_runs(found: dict[str, Any]) -> None:
    told, streams = found["writers"], found["streams"]
    steps = sum(run["step"] for run in told)
    seconds = found["seconds"]
    dropped = sum(run["dropped_observations"] for run in told)
    print(f"{len(told)} runs, {steps} observations, {steps / seconds:.0f} a second; dropped {dropped}")
    print(
        f"queued at the end {sum(run['queued'] for run in told)}, fenced {sum(run['fenced'] for run in told)}"
    )
    missing = sum(run["missing"] for run in streams.values())
    foreign = [name for name, run in streams.items() if not run["is_its_own"]]
    print(f"holes in the streams {missing}; streams with a foreign or repeated entry: {foreign or 'none'}")
    for row in found["rows"][:: max(1, len(found["rows"]) // 6)]:
        print(f"  {row['second']:5.0f} s  server {row['rss_bytes'] / MIB:.0f} MiB,"
              f" largest writer process {row['largest_writer_rss_bytes'] / MIB:.0f} MiB")  # fmt: skip
    by_name = sorted(told, key=lambda run: run["run_id"])  # the first ones have the predictors
    for run, said in zip(by_name, found["predictors"], strict=False):
        counters = said["counters"]
        print(f"  a predictor: step {counters.get('applied_sequence', 0):.0f}, lost"
              f" {counters.get('lost_entries', 0):.0f}, alerts {said['alerts']}; of its {run['points']}"
              f" points {run['answered']} were answered by the next step")  # fmt: skip
