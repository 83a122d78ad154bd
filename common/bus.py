"""The Bus contract: ordered streams of opaque entries. Knows nothing of messages.

Writers choose ids: `generation-sequence`, strictly rising. A write whose id is not above the
stream's newest is refused by the bus, so a retry cannot duplicate and a stale writer is fenced.
Readers either follow a stream from an id they remember (`read_after`), or share work in a
group with acknowledgement (`read_group`). All implementations pass tests/common/test_bus_contract.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class EntryId(NamedTuple):
    """Position in a stream. The server refuses an id that is not above its newest one."""

    generation: int  # >= 1
    sequence: int  # >= 1, contiguous within a generation

    def __str__(self) -> str:
        return f"{self.generation}-{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> EntryId:
        generation, _, sequence = text.partition("-")
        return cls(int(generation), int(sequence))


STREAM_START = EntryId(0, 0)
DAMAGED = "damaged"  # kind of an entry that is not what its writer sent: never believe its body


@dataclass(frozen=True, slots=True)
class Entry:
    stream: str  # short name, e.g. "history"
    id: EntryId
    kind: str  # message class name
    body: bytes  # codec.encode
    sent_unix_seconds: float


@dataclass(frozen=True, slots=True)
class Delivery:
    entry: Entry
    deliveries: int  # 1 on first delivery


class Bus(Protocol):
    """One run's streams. Every method may raise BusUnavailable, BusRefused; writes also BusFull.

    An entry whose bytes changed in the meantime is handed out as one of kind DAMAGED.
    """

    def publish(self, entries: Sequence[Entry]) -> None:
        """Append in order. Entries that are already there are skipped (idempotent retry).

        Raises Fenced when a stream's newest id is of a higher generation than an entry.
        """

    def read_after(
        self, after: Mapping[str, EntryId], *, max_count: int, block_seconds: float
    ) -> list[Entry]:
        """Entries above the given id of each stream, per stream in order; [] after `block_seconds`.

        `block_seconds` 0 does not block.
        """

    def latest(self, stream: str) -> Entry | None: ...

    def last_id(self, stream: str) -> EntryId:
        """Newest id ever written (trimmed ones included); STREAM_START for a stream that does not exist."""

    def length(self, stream: str) -> int: ...

    def ensure_group(self, stream: str, group: str, *, after: EntryId) -> None:
        """Create the group so that it starts behind `after`; keeps an existing one."""

    def read_group(
        self, stream: str, *, group: str, consumer: str, max_count: int, block_seconds: float, pending: bool
    ) -> list[Delivery]:
        """Undelivered entries, or with `pending` this consumer's own unacknowledged ones.

        Read pending first after every connect: a lost reply leaves entries there (systems.md,
        finding 4). Raises GroupLost when the group has vanished.
        """

    def claim(
        self, stream: str, *, group: str, consumer: str, idle_seconds: float, max_count: int
    ) -> list[Delivery]:
        """Take over entries that another consumer left unacknowledged for `idle_seconds`."""

    def ack(self, stream: str, group: str, ids: Sequence[EntryId]) -> None: ...

    def trim(self, stream: str, *, below: EntryId) -> None:
        """Drop entries with ids below this one."""

    def next_generation(self, node: str, *, at_least: int) -> int:
        """A generation above all that this node was given before, and >= at_least. Atomic."""

    def close(self) -> None: ...


class GroupLost(Exception):
    """The consumer group does not exist (server restarted without data, flushed, evicted)."""


@dataclass(frozen=True, slots=True)
class BusAddress:
    """Where the bus is. Never log `url`: it may hold a password; `shown` is safe."""

    url: str
    run_id: str

    @property
    def shown(self) -> str:
        scheme, separator, rest = self.url.partition("://")
        return f"{scheme}{separator}{rest.rpartition('@')[2]}"
