"""`monitor-node top`: keeps one screen of a terminal up to date with a run, for people on ssh.

Owns the terminal's mode and the pace of drawing; what is shown is top_screen.py. Reads the bus like
`status` does, writes nothing to it, and never waits for it longer than a key may wait.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live

from common.bus import Bus
from common.clock import Clock
from monitor_node.run_reader import RunReader, lengths_of_run, new_view
from monitor_node.serve import read_run
from monitor_node.snapshot import as_dict
from monitor_node.top_screen import screen

REFRESH_SECONDS = 0.5
_BLOCK_SECONDS = 0.2
_PLAIN_HEIGHT = 40  # lines of a screen that is printed once

Keys = Callable[[], str]  # what was pressed since the last call


def top(bus: Bus, run_id: str, clock: Clock, stop: threading.Event, console: Console | None = None) -> None:
    """Show a run until `stop` or the key q; without a capable terminal, print one screen and return.

    Raises BusUnavailable and BusRefused at the start only, EnvironmentFault without such a run.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        view = read_run(bus, run_id, clock)
        snapshot = as_dict(view, now_seconds=clock.monotonic())
        ascii_only = console.options.ascii_only
        console.print(screen(snapshot, console.width, _PLAIN_HEIGHT, footer="", ascii_only=ascii_only))
        return
    lengths_of_run(bus, run_id)
    with keyboard() as pressed:
        follow(bus, run_id, clock, stop, console, pressed)


def follow(
    bus: Bus, run_id: str, clock: Clock, stop: threading.Event, console: Console, pressed: Keys
) -> None:
    """Read and draw until `stop` or q. A server that goes away is said in the last line."""
    view = new_view(run_id)
    reader = RunReader(bus, view, clock)
    due_seconds = clock.monotonic()
    heard_at_seconds = due_seconds
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while not stop.is_set() and "q" not in pressed().lower():
            reader.read(block_seconds=_BLOCK_SECONDS)
            now_seconds = clock.monotonic()
            if reader.follower.connected:
                heard_at_seconds = now_seconds
            if now_seconds < due_seconds:
                continue
            due_seconds = now_seconds + REFRESH_SECONDS
            footer = _footer(reader, now_seconds - heard_at_seconds)
            snapshot = as_dict(view, now_seconds=now_seconds)
            width, height = console.size
            ascii_only = console.options.ascii_only
            live.update(screen(snapshot, width, height, footer=footer, ascii_only=ascii_only), refresh=True)


@contextlib.contextmanager
def keyboard() -> Iterator[Keys]:
    """Keys without Enter, while the body runs; the terminal's mode is given back afterwards."""
    try:
        import termios
        import tty

        descriptor = sys.stdin.fileno()
        former = termios.tcgetattr(descriptor)
    except (ImportError, ValueError, OSError, termios.error):  # no terminal to read from: Ctrl-C remains
        yield lambda: ""
        return
    tty.setcbreak(descriptor)
    try:
        yield lambda: _pressed(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, former)


def _pressed(descriptor: int) -> str:
    if not select.select([descriptor], [], [], 0.0)[0]:
        return ""
    try:
        return os.read(descriptor, 64).decode("ascii", "replace") or "q"  # the terminal was closed
    except OSError:
        return "q"


def _footer(reader: RunReader, away_seconds: float) -> str:
    if not reader.follower.connected:
        return f"q leaves · no answer for {away_seconds:.0f} s: {reader.follower.last_error}"
    return "q leaves · live" if reader.caught_up else "q leaves · reading what was said so far"
