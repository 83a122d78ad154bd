"""Reads all streams of a run straight from the server, past the proxy, and keeps every entry.

The campaign's own memory of what was said: a server that loses its data, or a recorder that was killed, loses
nothing of it. Notes when steps and applied decisions were seen. Acknowledges nothing; judges nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from common import codec
from common.bus import STREAM_START, Bus, Entry, EntryId
from common.errors import BusError, CodecError
from common.messages import APPLIED_VERDICTS, Message, Observation, Outcome, RunEnded, RunStarted
from common.streams import HISTORY, STREAMS

_BATCH_ENTRIES = 500
_LOOK_BACK_SECONDS = 0.5  # how often it is asked whether a stream began again


class Witness:
    """`look` often; it never waits."""

    def __init__(self, open_bus: Callable[[], Bus]) -> None:
        """`open_bus`: again after a fail-over, because then it is another server."""
        self._open_bus = open_bus
        self._bus: Bus | None = None
        self._after = dict.fromkeys(STREAMS, STREAM_START)
        self._look_back_at = 0.0
        self.entries: dict[tuple[str, EntryId], Entry] = {}
        self.order: list[tuple[str, EntryId]] = []  # of arrival
        self.conflicts: list[Entry] = []  # an id that was there, with another content: never allowed
        self.steps_published = 0  # observations, whatever their number
        self.decisions_applied = 0
        self.newest_step = 0  # of the newest trainer
        self.applied_at = (0, 0)  # (generation, base step) of the newest applied decision
        self.generation = 0  # of the trainer that wrote last
        self.is_blind = False  # while the server is frozen: to ask would take as long as that lasts
        self.ended = False  # the newest trainer said that its run is over

    def look(self) -> None:
        """Read all that is new. A server that is away is asked another time."""
        if self.is_blind:
            return
        try:
            bus = self._connected()
            self._look_back(bus)
            while entries := bus.read_after(self._after, max_count=_BATCH_ENTRIES, block_seconds=0.0):
                for entry in entries:
                    self._keep(entry)
        except BusError:
            self.reconnect()

    def reconnect(self) -> None:
        if self._bus is not None:
            with contextlib.suppress(BusError):
                self._bus.close()
        self._bus = None

    def _connected(self) -> Bus:
        if self._bus is None:
            self._bus = self._open_bus()
            self._look_back_at = 0.0
        return self._bus

    def _look_back(self, bus: Bus) -> None:
        """A stream that lost its data may begin again with lower ids, and they must not be missed."""
        if time.monotonic() < self._look_back_at:
            return
        self._look_back_at = time.monotonic() + _LOOK_BACK_SECONDS
        for stream, read_up_to in self._after.items():
            if bus.last_id(stream) < read_up_to:
                self._after[stream] = STREAM_START

    def _keep(self, entry: Entry) -> None:
        self._after[entry.stream] = entry.id
        key = (entry.stream, entry.id)
        known = self.entries.get(key)
        if known is not None:
            if (known.kind, known.body) != (entry.kind, entry.body):
                self.conflicts.append(entry)
            return
        self.entries[key] = entry
        self.order.append(key)
        if entry.stream == HISTORY:
            with contextlib.suppress(CodecError):
                self._note(codec.decode_entry(entry), entry.id.generation)

    def _note(self, message: Message, generation: int) -> None:
        self.generation = max(self.generation, generation)
        match message:
            case RunStarted():
                self.ended = False
            case Observation(step=step):
                self.steps_published += 1
                self.newest_step = step
            case Outcome(verdict=verdict, base_step=step) if verdict in APPLIED_VERDICTS:
                self.decisions_applied += 1
                self.applied_at = (generation, step)
            case RunEnded() if generation == self.generation:
                self.ended = True

    def all_entries(self) -> list[Entry]:
        """In the order of arrival; an id that came twice with two contents is in here twice."""
        return [*(self.entries[key] for key in self.order), *self.conflicts]
