"""What a run bears: `python -m tests.bench.load {sustained,runs,days} [--out FILE.json]`.

    sustained   20 000 observations a second into one predictor's stream; the server stands still for a while
    runs        64 runs at once on one server
    days        72 hours of messages through each node, at full speed

Servers, predictors and recorders are the real processes; writers are the trainer's outbox, inbox and
heartbeats without a network (load_writer.py). Prints machine, date and figures; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench import load_days
from tests.bench.live_run import machine, table
from tests.bench.load_processes import MIB, server_name
from tests.bench.load_runs import runs, show_runs
from tests.bench.load_sustained import show_sustained, sustained


def days(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for node in options.nodes.split(","):
        flags = [flag for flag, on in (("--learns", options.learns), ("--traced", options.traced)) if on]
        command = [
            sys.executable, "-m", "tests.bench.load", "days", "--in-this-process", node, *flags,
            "--hours", str(options.hours), "--steps-per-second", str(options.steps_per_second),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        samples = [line for line in lines if "rss_bytes" in line]
        slope, error, after_warm_up = load_days.slope_per_day(samples)
        found[node] = {
            **lines[-1],
            "samples": samples,
            "bytes_per_day": slope,
            "bytes_per_day_error": error,
            "rss_after_warm_up": after_warm_up,
            "rss_at_the_end": samples[-1]["rss_bytes"],
        }
    return found


def show_days(found: dict[str, Any]) -> None:
    heads = (
        "node",
        "messages",
        "steps",
        "wall s",
        "a second",
        "RSS after a quarter",
        "at the end",
        "a day",
        "disk",
    )
    rows = [
        (
            node,
            f"{f['entries']:,}",
            f"{f['steps']:,}",
            f"{f['wall_seconds']:.0f}",
            f"{f['entries'] / f['wall_seconds']:,.0f}",
            f"{f['rss_after_warm_up'] / MIB:.1f} MiB",
            f"{f['rss_at_the_end'] / MIB:.1f} MiB",
            f"{f['bytes_per_day'] / 1024:+.0f} +- {f['bytes_per_day_error'] / 1024:.0f} KiB",
            f"{f['disk_bytes'] / MIB:.0f} MiB",
        )
        for node, f in found.items()
    ]
    print(table(heads, rows))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = whole.add_subparsers(dest="which", required=True)
    one = which.add_parser("sustained")
    one.add_argument("--rate", type=float, default=20_000.0, help="observations a second")
    one.add_argument("--seconds", type=float, default=60.0)
    one.add_argument("--stall-seconds", type=float, default=5.0, help="for which the server stands still")
    one.add_argument("--policy", default="learned")
    many = which.add_parser("runs")
    many.add_argument("--runs", type=int, default=64)
    many.add_argument("--writers", type=int, default=8, help="processes that the runs' writers are in")
    many.add_argument("--predictors", type=int, default=4)
    many.add_argument("--rate", type=float, default=10.0, help="observations a second, of each run")
    many.add_argument("--seconds", type=float, default=60.0)
    long = which.add_parser("days")
    long.add_argument("--hours", type=float, default=72.0)
    long.add_argument("--steps-per-second", type=float, default=2.5)
    long.add_argument("--nodes", default=",".join(load_days.NODES))
    long.add_argument("--learns", action="store_true", help="the world model learns, too: slow")
    long.add_argument("--traced", action="store_true", help="tell which lines of code hold more than before")
    long.add_argument("--in-this-process", default="", help=argparse.SUPPRESS)
    for command in (one, many, long):
        command.add_argument("--out", type=Path, help="JSON with everything that was measured")
    return whole


COMMANDS = {
    "sustained": (sustained, show_sustained),
    "runs": (runs, show_runs),
    "days": (days, show_days),
}


def main() -> None:
    options = parser().parse_args()
    if options.which == "days" and options.in_this_process:
        load_days.watch(
            options.in_this_process,
            options.hours,
            options.steps_per_second,
            learns=options.learns,
            traced=options.traced,
        )
        return
    about = f"{machine()}; {server_name()}"
    print(about)
    run, show = {
        "sustained": (sustained, show_sustained),
        "runs": (runs, show_runs),
        "days": (days, show_days),
    }[options.which]
    found = run(options)
    show(found)
    if options.out:
        asked = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({"machine": about, "asked": asked, **found}, indent=1))
        print(f"\n{options.out}")


if __name__ == "__main__":
    main()
