"""The Bus contract inside one process: for tests, and for a run without any server.

All MemoryBus objects on one MemoryServer see the same streams; `memory_server(name)` finds the
server of a memory:// address. Thread-safe. Blocking reads wait in real time; idle times of
pending entries are read from the clock of the server, so a test can move them.
Keeps nothing on disk and never fails for lack of a connection.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from common.bus import STREAM_START, Delivery, Entry, EntryId, GroupLost
from common.clock import Clock, SystemClock
from common.errors import Fenced
from common.streams import STREAMS, generation_key, key_of

_FUSE_SLACK_ENTRIES = 100  # cut in pieces of this size, as a Redis stream does: each cut moves the list

T = TypeVar("T")


@dataclass(slots=True)
class _Pending:
    consumer: str
    delivered_seconds: float  # monotonic
    deliveries: int


@dataclass(slots=True)
class _Group:
    delivered: EntryId  # everything up to here was given out
    pending: dict[EntryId, _Pending] = field(default_factory=dict)


@dataclass(slots=True)
class _Stream:
    entries: list[Entry] = field(default_factory=list)
    last_id: EntryId = STREAM_START
    groups: dict[str, _Group] = field(default_factory=dict)

    def above(self, position: EntryId, max_count: int) -> list[Entry]:
        start = bisect.bisect_right(self.entries, position, key=_id_of)
        return self.entries[start : start + max_count]

    def find(self, position: EntryId) -> Entry | None:
        index = bisect.bisect_left(self.entries, position, key=_id_of)
        found = index < len(self.entries) and self.entries[index].id == position
        return self.entries[index] if found else None


def _id_of(entry: Entry) -> EntryId:
    return entry.id


class MemoryServer:
    """The streams, generations and blobs that several MemoryBus objects share."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.changed = threading.Condition()  # guards everything below
        self.streams: dict[str, _Stream] = {}
        self.generations: dict[str, int] = {}
        self.blobs: dict[str, tuple[bytes, float]] = {}  # key -> payload, monotonic expiry

    def flush(self) -> None:
        """Lose everything, as a Redis server does on FLUSHALL or a restart without persistence."""
        with self.changed:
            for kept in (self.streams, self.generations, self.blobs):
                kept.clear()
            self.changed.notify_all()


_servers: dict[str, MemoryServer] = {}
_servers_lock = threading.Lock()


def memory_server(name: str) -> MemoryServer:
    """The server behind memory://name in this process."""
    with _servers_lock:
        return _servers.setdefault(name, MemoryServer())


class MemoryBus:
    """See common.bus.Bus."""

    def __init__(self, server: MemoryServer, run_id: str) -> None:
        self._server = server
        self._run_id = run_id

    def publish(self, entries: Sequence[Entry]) -> None:
        with self._server.changed:
            for entry in entries:
                stream = self._server.streams.setdefault(self._key(entry.stream), _Stream())
                if stream.last_id.generation > entry.id.generation:
                    raise Fenced(
                        f"{entry.stream} {entry.id}: generation {stream.last_id.generation} writes now"
                    )
                if entry.id > stream.last_id:
                    stream.entries.append(entry)
                    stream.last_id = entry.id
                    excess = len(stream.entries) - STREAMS[entry.stream].fuse_entries
                    if excess >= _FUSE_SLACK_ENTRIES:
                        del stream.entries[:excess]
            self._server.changed.notify_all()

    def read_after(
        self, after: Mapping[str, EntryId], *, max_count: int, block_seconds: float
    ) -> list[Entry]:
        def look() -> list[Entry]:
            found: list[Entry] = []
            for name, position in after.items():
                stream = self._server.streams.get(self._key(name))
                found += stream.above(position, max_count) if stream else []
            return found

        return self._wait(look, block_seconds)

    def latest(self, stream: str) -> Entry | None:
        with self._server.changed:
            held = self._server.streams.get(self._key(stream))
            return held.entries[-1] if held and held.entries else None

    def last_id(self, stream: str) -> EntryId:
        with self._server.changed:
            held = self._server.streams.get(self._key(stream))
            return held.last_id if held else STREAM_START

    def length(self, stream: str) -> int:
        with self._server.changed:
            held = self._server.streams.get(self._key(stream))
            return len(held.entries) if held else 0

    def ensure_group(self, stream: str, group: str, *, after: EntryId) -> None:
        with self._server.changed:
            held = self._server.streams.setdefault(self._key(stream), _Stream())
            held.groups.setdefault(group, _Group(after))

    def read_group(
        self, stream: str, *, group: str, consumer: str, max_count: int, block_seconds: float, pending: bool
    ) -> list[Delivery]:
        def look() -> list[Delivery]:
            held, state = self._group(stream, group)
            if pending:
                own = sorted(id_ for id_, entry in state.pending.items() if entry.consumer == consumer)
                return self._redeliver(held, state, own, consumer, max_count)
            entries = held.above(state.delivered, max_count)
            for entry in entries:
                state.pending[entry.id] = _Pending(consumer, self._server.clock.monotonic(), 1)
                state.delivered = entry.id
            return [Delivery(entry, 1) for entry in entries]

        return self._wait(look, 0.0 if pending else block_seconds)

    def claim(
        self, stream: str, *, group: str, consumer: str, idle_seconds: float, max_count: int
    ) -> list[Delivery]:
        with self._server.changed:
            held, state = self._group(stream, group)
            since_seconds = self._server.clock.monotonic() - idle_seconds
            idle = sorted(
                id_ for id_, entry in state.pending.items() if entry.delivered_seconds <= since_seconds
            )
            return self._redeliver(held, state, idle, consumer, max_count)

    def ack(self, stream: str, group: str, ids: Sequence[EntryId]) -> None:
        with self._server.changed:
            held = self._server.streams.get(self._key(stream))
            state = held.groups.get(group) if held else None
            for id_ in ids if state else ():
                state.pending.pop(id_, None)  # type: ignore[union-attr]

    def trim(self, stream: str, *, below: EntryId) -> None:
        with self._server.changed:
            held = self._server.streams.get(self._key(stream))
            if held:
                del held.entries[: bisect.bisect_left(held.entries, below, key=_id_of)]

    def next_generation(self, node: str, *, at_least: int) -> int:
        with self._server.changed:
            key = generation_key(self._run_id, node)
            self._server.generations[key] = max(self._server.generations.get(key, 0) + 1, at_least)
            return self._server.generations[key]

    def close(self) -> None:
        """Nothing to give back: the server lives as long as the process."""

    def _key(self, stream: str) -> str:
        return key_of(self._run_id, stream)

    def _group(self, stream: str, group: str) -> tuple[_Stream, _Group]:
        held = self._server.streams.get(self._key(stream))
        if held is None or group not in held.groups:
            raise GroupLost(f"no group {group} on {stream}")
        return held, held.groups[group]

    def _redeliver(
        self, held: _Stream, state: _Group, ids: Sequence[EntryId], consumer: str, max_count: int
    ) -> list[Delivery]:
        """Give pending entries out once more; what was trimmed meanwhile leaves the pending list."""
        deliveries: list[Delivery] = []
        for id_ in ids:
            if len(deliveries) == max_count:
                break
            entry = held.find(id_)
            if entry is None:
                del state.pending[id_]
                continue
            tries = state.pending[id_].deliveries + 1
            state.pending[id_] = _Pending(consumer, self._server.clock.monotonic(), tries)
            deliveries.append(Delivery(entry, tries))
        return deliveries

    def _wait(self, look: Callable[[], list[T]], block_seconds: float) -> list[T]:
        """`look` under the lock, again after every change, until it finds something or time is up."""
        deadline_seconds = time.monotonic() + block_seconds
        with self._server.changed:
            while not (found := look()):
                left_seconds = deadline_seconds - time.monotonic()
                if left_seconds <= 0:
                    break
                self._server.changed.wait(left_seconds)
            return found
