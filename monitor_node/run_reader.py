"""Reads all streams of a run in order and folds them into a view.

Follows from the start of the streams with `read_after`, so it acknowledges nothing and delays nobody. Owns
the reading positions and the time of receipt; raises nothing because the server is away; decides nothing.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable

from common.bus import DAMAGED, Bus, Entry
from common.clock import Clock
from common.errors import EnvironmentFault
from common.follower import Follower, decoded
from common.messages import Alert
from common.settings import MonitorSettings
from common.streams import MONITOR, STREAMS
from monitor_node.liveness import Watch
from monitor_node.run_view import AlertRow, RunView


class RunReader:
    def __init__(
        self, bus: Bus, view: RunView, clock: Clock, *, tell: Callable[[AlertRow], None] = lambda row: None
    ) -> None:
        """`tell` gets each alert that was raised since the reader was made, once; it must not wait."""
        self.caught_up = False  # everything that was there at the start has been read
        self._tell = tell
        self._made_unix_seconds = clock.unix()
        self.follower = Follower(bus, STREAMS, clock=clock, rng=random.Random())
        self._view = view
        self._clock = clock

    def read(self, *, block_seconds: float) -> None:
        """Fold what there is, or wait for `block_seconds` once all that was there has been read."""
        entries = self.follower.read(block_seconds if self.caught_up else 0.0)
        now_seconds, now_unix_seconds = self._clock.monotonic(), self._clock.unix()
        for entry in entries:
            is_damaged = entry.kind == DAMAGED
            self._view.streams.read(
                entry.stream, entry.id.generation, entry.id.sequence, is_damaged=is_damaged
            )
            if is_damaged:
                self._warn_of(entry, now_unix_seconds)
        for entry, message in decoded(entries):
            # An old entry did not arrive just now: its age by the sender's clock is the best estimate.
            age_seconds = 0.0 if self.caught_up else max(0.0, now_unix_seconds - entry.sent_unix_seconds)
            last_alert = self._view.alerts[-1] if self._view.alerts else None
            self._view.fold(
                message, sent_unix_seconds=entry.sent_unix_seconds, at_seconds=now_seconds - age_seconds
            )
            for row in rows_after(self._view.alerts, last_alert):
                if self.caught_up or row.at_unix_seconds >= self._made_unix_seconds:
                    self._tell(row)
        if not entries and self.follower.connected:
            self.caught_up = True

    def _warn_of(self, entry: Entry, now_unix_seconds: float) -> None:
        """At the first damaged entry of a stream and at each doubling: a bad disk must not fill the list."""
        count = self._view.streams.counts[entry.stream].damaged
        if count & (count - 1):
            return
        text = (
            f"{entry.stream}: {count:,} damaged so far, the newest is {entry.id}; their checksums differ and"
            " they are left out: check the memory and the disk of the server"
        )
        alert = Alert(node=MONITOR, severity="error", kind="damaged_entry", text=text, step=self._view.step)
        row = AlertRow(alert=alert, at_unix_seconds=now_unix_seconds)
        self._view.alerts.append(row)
        self._tell(row)


def lengths_of_run(bus: Bus, run_id: str) -> dict[str, int]:
    """Raises EnvironmentFault where there is nothing of such a run; BusUnavailable, BusRefused, for which a
    reader would wait.
    """
    lengths = stream_lengths(bus)
    if not any(lengths.values()):
        raise EnvironmentFault(f"there is no run '{run_id}' on this server; check --run-id and --redis")
    return lengths


def stream_lengths(bus: Bus) -> dict[str, int]:
    return {stream: bus.length(stream) for stream in STREAMS}


def new_view(run_id: str) -> RunView:
    return RunView(run_id=run_id, watch=Watch(silent_seconds=MonitorSettings().silent_seconds))


def rows_after(rows: deque[AlertRow], last: AlertRow | None) -> list[AlertRow]:
    """Those that were appended after `last`, oldest first."""
    newer = list(itertools.takewhile(lambda row: row is not last, reversed(rows)))
    return newer[::-1]
