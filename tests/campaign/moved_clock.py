"""Runs a node's command with a wall clock that a file moves: `-m tests.campaign.moved_clock FILE MODULE ...`.

The file holds seconds to add to the wall time and may change while the node runs. Patches
common.clock.SystemClock, through which all of the product asks for wall time, and nothing else: the
monotonic clock goes on, as it does when ntpd or a person sets the clock of a machine.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

from common.clock import SystemClock


def move_clock(offset_file: Path) -> None:
    """From now on SystemClock.unix() is off by what the file says."""

    def moved_unix(_: SystemClock) -> float:
        return time.time() + offset_seconds(offset_file)

    SystemClock.unix = moved_unix  # type: ignore[method-assign]


def offset_seconds(offset_file: Path) -> float:
    """0 for a file that is not there, or half written."""
    try:
        return float(offset_file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0.0


if __name__ == "__main__":
    _, offset_path, module, *arguments = sys.argv
    move_clock(Path(offset_path))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
