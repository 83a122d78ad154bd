"""Follows streams from where it stands, through restarts of the server.

Owns one bus connection and the ids read so far. A server that lost its data starts its streams
again from nothing: when a stream's newest id is below what was read, reading starts from the
beginning, so that nothing new is missed. Never raises because the server is away.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from common import codec
from common.bus import STREAM_START, Bus, Entry, EntryId
from common.clock import Clock
from common.errors import BusError, CodecError
from common.messages import Message
from common.publisher import Backoff

MAX_ENTRIES = 500


class Follower:
    def __init__(
        self,
        bus: Bus,
        streams: Iterable[str],
        *,
        clock: Clock,
        rng: random.Random,
        after: Mapping[str, EntryId] | None = None,
    ) -> None:
        self._bus, self._clock = bus, clock
        self._backoff = Backoff(rng, longest_seconds=1.0)
        self._after = {stream: (after or {}).get(stream, STREAM_START) for stream in streams}
        self.connected = True
        self.resets = 0  # times a stream was found to have lost its data
        self.last_error = ""

    def read(self, block_seconds: float) -> list[Entry]:
        """New entries, or [] after `block_seconds`; while the server is away, [] after a pause."""
        try:
            if not self.connected:
                self._find_lost_streams()
            entries = self._bus.read_after(self._after, max_count=MAX_ENTRIES, block_seconds=block_seconds)
        except BusError as error:
            self.connected = False
            self.last_error = str(error)
            self._clock.sleep(self._backoff.next_seconds())
            return []
        self.connected = True
        self._backoff.reset()
        for entry in entries:
            self._after[entry.stream] = entry.id
        return entries

    def skip_to_end(self) -> None:
        """Read only what comes from now on. Raises BusError."""
        self._after = {stream: self._bus.last_id(stream) for stream in self._after}

    def _find_lost_streams(self) -> None:
        for stream, read_up_to in self._after.items():
            if self._bus.last_id(stream) < read_up_to:
                self._after[stream] = STREAM_START
                self.resets += 1


def decoded(entries: Iterable[Entry]) -> list[tuple[Entry, Message]]:
    """Entries with their messages; what is not a message of ours is left out."""
    found = []
    for entry in entries:
        try:
            found.append((entry, codec.decode(entry.kind, entry.body)))
        except CodecError:
            continue
    return found
