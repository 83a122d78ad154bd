"""Follows streams from where it stands, through restarts of the server.

Owns one bus connection and the ids read so far. A server that lost its data starts its streams
again from nothing: when a stream's newest id is below what was read, reading starts from the
beginning, so that nothing new is missed. A replica that took over lacks the newest entries only:
its newest one was sent before the last that was read, and nothing is read again.
Never raises because the server is away.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping

from common import codec
from common.bus import DAMAGED, STREAM_START, Bus, Entry, EntryId
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
        self._sent_unix_seconds: dict[str, float] = {}  # of the entry that `_after` names, where it was seen
        self.connected = True
        self.resets = 0  # times a stream was found to have lost its data
        self.damaged = 0  # entries that are not what their writer sent; `decoded` leaves them out
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
            self._sent_unix_seconds[entry.stream] = entry.sent_unix_seconds
            self.damaged += entry.kind == DAMAGED
        return entries

    def skip_to_end(self) -> None:
        """Read only what comes from now on. Raises BusError."""
        for stream in self._after:
            self._after[stream] = self._bus.last_id(stream)
            if newest := self._bus.latest(stream):
                self._sent_unix_seconds[stream] = newest.sent_unix_seconds

    def _find_lost_streams(self) -> None:
        for stream, read_up_to in self._after.items():
            if self._bus.last_id(stream) < read_up_to and not self._holds_only_what_was_read(stream):
                self._after[stream] = STREAM_START
                self.resets += 1

    def _holds_only_what_was_read(self, stream: str) -> bool:
        newest = self._bus.latest(stream)
        last_sent_unix_seconds = self._sent_unix_seconds.get(stream, -math.inf)
        return newest is not None and newest.sent_unix_seconds < last_sent_unix_seconds


def decoded(entries: Iterable[Entry]) -> Iterator[tuple[Entry, Message]]:
    """Entries with their messages, one at a time; what is not a message of ours is left out."""
    for entry in entries:
        try:
            message = codec.decode(entry.kind, entry.body)
        except CodecError:
            continue
        yield entry, message
