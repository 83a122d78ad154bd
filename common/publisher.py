"""Gives messages their ids and brings them onto the bus, in order and once.

Owns the sequences of one writer in one generation: contiguous per stream, so that a reader sees
a loss as a gap. Owns the retry loop, because redis-py must never retry a write by itself: ids are
explicit, so sending the same entries again cannot duplicate them (systems.md, findings 2 and 3).
Not thread-safe: use it from one thread, or hand it to an Outbox and leave it alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from common import codec
from common.bus import Bus, Entry, EntryId
from common.clock import Clock
from common.errors import BusFull, BusUnavailable
from common.messages import Message
from common.streams import stream_of

_FIRST_PAUSE_SECONDS = 0.05  # a local server restarts in 0.06-0.16 s (systems.md, finding 5)
_LONGEST_PAUSE_SECONDS = 2.0  # back within 2 s once the server is


class Backoff:
    """Exponential pauses with full jitter, capped."""

    def __init__(
        self,
        rng: random.Random,
        *,
        first_seconds: float = _FIRST_PAUSE_SECONDS,
        longest_seconds: float = _LONGEST_PAUSE_SECONDS,
    ) -> None:
        self._rng = rng
        self._first_seconds = first_seconds
        self._longest_seconds = longest_seconds
        self._ceiling_seconds = first_seconds

    def next_seconds(self) -> float:
        pause_seconds = self._rng.uniform(0.0, self._ceiling_seconds)
        self._ceiling_seconds = min(2 * self._ceiling_seconds, self._longest_seconds)
        return pause_seconds

    def reset(self) -> None:
        self._ceiling_seconds = self._first_seconds


class Publisher:
    """Publishes the messages of one node."""

    def __init__(
        self,
        bus: Bus,
        *,
        writer: str,
        generation: int,
        clock: Clock,
        rng: random.Random,
        first_sequences: Mapping[str, int] | None = None,
    ) -> None:
        self.bus = bus
        self.backoff = Backoff(rng)
        self._writer = writer
        self._generation = generation
        self._clock = clock
        self._next_sequences = dict(first_sequences or {})

    @property
    def next_sequences(self) -> dict[str, int]:
        """Sequence of the next entry of each stream written so far; a checkpoint keeps it."""
        return dict(self._next_sequences)

    def reserve(self, message: Message) -> Entry:
        """The envelope of `message`: next id of its stream, body still empty."""
        stream = stream_of(message, self._writer)
        sequence = self._next_sequences.get(stream, 1)
        self._next_sequences[stream] = sequence + 1
        return Entry(
            stream=stream,
            id=EntryId(self._generation, sequence),
            kind=type(message).__name__,
            body=b"",
            sent_unix_seconds=self._clock.unix(),
        )

    def prepare(self, message: Message) -> Entry:
        """A complete entry. Raises SchemaMismatch or BodyTooLarge, and then uses no id."""
        body = codec.encode(message)
        return dataclasses.replace(self.reserve(message), body=body)

    def send(self, entries: Sequence[Entry], *, give_up_seconds: float) -> None:
        """Publish, trying again while the server is away or full.

        Raises Fenced and BusRefused at once, BusUnavailable or BusFull after `give_up_seconds`.
        """
        deadline_seconds = self._clock.monotonic() + give_up_seconds
        self.backoff.reset()
        while True:
            try:
                self.bus.publish(entries)
                return
            except (BusUnavailable, BusFull):
                pause_seconds = self.backoff.next_seconds()
                if self._clock.monotonic() + pause_seconds >= deadline_seconds:
                    raise
                self._clock.sleep(pause_seconds)
