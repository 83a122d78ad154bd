"""One predictor's stream at full speed, through a real server that stands still for a while in the middle.

Says what becomes of the stream's length, of what waits in the writer, of what was dropped, of how far behind
the predictor is, and of the resident set of every process. For `python -m tests.bench.load sustained`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import codec
from common.embedded import start_server
from common.messages import Observation
from common.recording import open_scan, scan_entries
from common.streams import DECISIONS, HISTORY
from tests.bench.live_run import table
from tests.bench.load_processes import (
    CATCH_UP_SECONDS,
    MIB,
    START_SECONDS,
    Child,
    PredictorWatch,
    bus_of,
    predictor,
    recorder,
    server_facts,
    until,
    writer,
)


def sustained(options: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        server = opened.enter_context(start_server())
        bus = opened.enter_context(contextlib.closing(bus_of(server, "load")))
        children = [predictor("load", server.url, folder)]
        opened.callback(children[0].end)
        watch = PredictorWatch(bus)
        until(lambda: watch.look() or bool(watch.counters), START_SECONDS, "the predictor does not start")
        rate, seconds = options.rate, options.seconds
        source = writer(
            ["load"], server.url, folder / "w.log", rate=rate, seconds=seconds, policy=options.policy
        )
        children.append(source)
        opened.callback(source.end)
        until(lambda: bus.length(HISTORY) > 0, START_SECONDS, "the writer does not start")
        children.append(recorder("load", server.url, folder))
        opened.callback(children[-1].end)
        rows = _watch_sustained(options, server, bus, watch, children)
        source.wait(CATCH_UP_SECONDS)
        told = source.newest["end"][0]
        behind = _catch_up(bus, watch)
        children[-1].process.wait(CATCH_UP_SECONDS)
        found = _recorded(folder / "load.hpt")
        return {
            "rows": rows,
            "writer": told,
            "recorded": found,
            "predictor": watch.said(),
            "seconds": options.seconds,
            **behind,
        }


def _watch_sustained(
    options: argparse.Namespace, server: Any, bus: Any, watch: PredictorWatch, children: list[Child]
) -> list[dict[str, Any]]:
    """A row a second or so. In the middle the server stands still: that is when back-pressure drops."""
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    stopped = False
    while children[1].process.poll() is None:
        time.sleep(1.0)
        now_seconds = time.monotonic() - begun
        if not stopped and now_seconds > options.seconds / 2 and options.stall_seconds:
            stopped = True
            os.kill(server.process_id, signal.SIGSTOP)
            time.sleep(options.stall_seconds)
            os.kill(server.process_id, signal.SIGCONT)
        with contextlib.suppress(Exception):  # the server may be slow to come back
            watch.look()
            facts = server_facts(server, bus, HISTORY)
            newest = children[1].newest or [{}]
            newest = newest["end"] if isinstance(newest, dict) else newest
            rows.append({
                "second": now_seconds,
                **facts,
                "step": newest[0].get("step"),
                "queued": newest[0].get("queued"),
                "dropped": newest[0].get("dropped_observations"),
                "behind": facts["newest"] - watch.applied.sequence,
                "answers": bus.last_id(DECISIONS).sequence,
                "rss": {child.name: child.rss_bytes for child in children},
            })  # fmt: skip
    return rows


def _catch_up(bus: Any, watch: PredictorWatch) -> dict[str, Any]:
    """How long after the end of writing until the predictor has read all there is."""
    begun = time.monotonic()
    newest = bus.last_id(HISTORY)
    while time.monotonic() - begun < CATCH_UP_SECONDS:
        watch.look()
        if watch.applied >= newest:
            return {"caught_up_seconds": time.monotonic() - begun}
        time.sleep(0.2)
    return {"caught_up_seconds": None, "still_behind": newest.sequence - watch.applied.sequence}


def _recorded(path: Path) -> dict[str, Any]:
    """What of the history came into the file: kinds, decision points, holes in the numbering."""
    kinds: Counter[str] = Counter()
    newest = missing = points = 0
    with path.open("rb") as file:
        for entry in scan_entries(file, path, open_scan(file, path)):
            if entry.stream != HISTORY:
                continue
            kinds[entry.kind] += 1
            missing += entry.id.sequence - newest - 1
            newest = entry.id.sequence
            if entry.kind == Observation.__name__:
                points += codec.decode_entry(entry).decision_point is not None  # type: ignore[union-attr]
    return {"kinds": dict(kinds), "missing": missing, "points": points, "bytes": path.stat().st_size}


def show_sustained(found: dict[str, Any]) -> None:
    heads = ("s", "steps", "on the stream", "unsent", "dropped", "behind", "answers", "RSS MiB")
    rows = found["rows"][:: -(-len(found["rows"]) // 20) or 1]
    print(table(heads, [_row(row) for row in rows]))
    end = found["writer"]
    seconds = found["seconds"]
    print(f"\nwritten {end['step']} observations, {end['step'] / max(seconds, 1e-9):.0f} a second;"
          f" dropped {end['dropped_observations']} observations, {end['dropped_notes']} notes")  # fmt: skip
    print(f"told {end['points']} decision points and {end['outcomes']} outcomes; recorded"
          f" {found['recorded']['points']} and {found['recorded']['kinds'].get('Outcome', 0)};"
          f" {found['recorded']['missing']} entries missing in the recording")  # fmt: skip
    print(f"answers in time {end['answered']}, late {end['stale']}; caught up after"
          f" {found['caught_up_seconds']} s; predictor: {found['predictor']}")  # fmt: skip


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    rss = {"server": row["rss_bytes"], **row["rss"]}
    sizes = ", ".join(f"{name} {size / MIB:.0f}" for name, size in rss.items())
    names = ("step", "length", "queued", "dropped", "behind", "answers")
    return (f"{row['second']:.0f}", *(str(row[name]) for name in names), sizes)
