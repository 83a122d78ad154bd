"""How much of the history stays on the server: what somebody still needs, and a generous rest.

Readers of the history say in their heartbeats up to where they have saved what they made of it
(`saved_generation`, `saved_sequence`). Entries below the lowest of these offsets may go, but the
newest KEPT_ENTRIES always stay, for people who come late. Should a reader fall far behind, the
length fuse of common/streams.py protects the server. Decides only; the inbox does the trimming.
"""

from __future__ import annotations

import math
from typing import TypeGuard

from common.bus import EntryId
from common.messages import Heartbeat

KEPT_ENTRIES = 20_000  # about 30 MB
CHECK_SECONDS = 30.0


class Retention:
    """The durable offsets of the readers of one stream."""

    def __init__(self) -> None:
        self._saved: dict[str, EntryId] = {}

    def note(self, heartbeat: Heartbeat) -> None:
        values = {metric.name: metric.value for metric in heartbeat.counters}
        generation, sequence = values.get("saved_generation"), values.get("saved_sequence")
        if _is_number(generation) and _is_number(sequence):
            self._saved[heartbeat.node] = EntryId(int(generation), int(sequence))

    def trim_below(self, newest: EntryId) -> EntryId | None:
        """The lowest id to keep, or None if nothing may go. `newest` is the stream's last id."""
        if not self._saved or newest.sequence <= KEPT_ENTRIES:
            return None
        kept = EntryId(newest.generation, newest.sequence - KEPT_ENTRIES)
        below = min(kept, *self._saved.values())
        return below if below.sequence > 0 else None


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
