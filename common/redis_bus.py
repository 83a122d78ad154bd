"""The Bus contract on Redis streams (Redis >= 6.2 or Valkey).

Explicit ids and one MULTI/EXEC per `publish`: either all entries of a call are in or none, so a
half-sent pipeline leaves no hole behind a later entry that got through, and a retry of the same
entries finds them there. An id at or below the newest one is told apart by the newest one's
generation: ours means delivered, a higher one means that we are fenced.
Believes no reply that may be damaged: entries carry a checksum (common/stream_records.py), a write
is acknowledged by its own id, and a number comes twice in one answer, which has to agree with itself.
Knows nothing of messages. Retries no write: callers do, with the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import redis

from common.bus import DAMAGED, STREAM_START, Delivery, Entry, EntryId
from common.errors import BusUnavailable, Fenced
from common.redis_link import DamagedReply, RedisLink, ask_twice, text_of
from common.stream_records import Record, entry_of, fields_of, records_by_stream, records_of
from common.streams import STREAMS, generation_key, key_of

_CLAIM_PAGE_ENTRIES = 100
_MOST_READS = 4  # of the same entries, until two agree on what is damaged

T = TypeVar("T", Entry, Delivery)


class RedisBus:
    """See common.bus.Bus."""

    def __init__(self, link: RedisLink, run_id: str, *, on_close: Callable[[], None] | None = None) -> None:
        self._link = link
        self._run_id = run_id
        self._on_close = on_close
        # Reads of a group whose answer did not arrive, or not whole: the server counts them as deliveries.
        self._lost_reads = 0

    def ping(self) -> None:
        """Raises BusUnavailable or BusRefused unless the server answers PONG to us."""
        self._link.call(lambda client: client.ping())

    def publish(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        present = self._link.call(lambda client: self._append(client, entries))
        for stream in dict.fromkeys(entry.stream for entry in present):
            self._check_present(stream, [entry.id for entry in present if entry.stream == stream])

    def read_after(
        self, after: Mapping[str, EntryId], *, max_count: int, block_seconds: float
    ) -> list[Entry]:
        if not after:
            return []
        positions = {self._key(stream): str(position) for stream, position in after.items()}

        def read(client: redis.Redis) -> list[Entry]:
            reply = client.xread(cast(Any, positions), count=max_count, block=_milliseconds(block_seconds))
            found = self._records(reply, after)
            return [entry_of(stream, *record) for stream in after for record in found.get(stream, [])]

        return self._whole(lambda: self._link.call(read, block_seconds=block_seconds))

    def latest(self, stream: str) -> Entry | None:
        def read(client: redis.Redis) -> list[Entry]:
            reply: Any = client.xrevrange(self._key(stream), count=1)
            return [entry_of(stream, *record) for record in records_of(reply)]

        entries = self._whole(lambda: self._link.call(read))
        return entries[0] if entries else None

    def last_id(self, stream: str) -> EntryId:
        return self._link.call(lambda client: self._last_id(client, stream))

    def length(self, stream: str) -> int:
        return self._link.call(lambda client: ask_twice(client, int, "XLEN", self._key(stream)))

    def ensure_group(self, stream: str, group: str, *, after: EntryId) -> None:
        def create(client: redis.Redis) -> None:
            try:
                client.xgroup_create(self._key(stream), group, id=str(after), mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

        self._link.call(create)

    def read_group(
        self, stream: str, *, group: str, consumer: str, max_count: int, block_seconds: float, pending: bool
    ) -> list[Delivery]:
        def read(client: redis.Redis) -> list[Record]:
            self._lost_reads += 1  # until we know better
            reply = client.xreadgroup(
                group,
                consumer,
                {self._key(stream): "0" if pending else ">"},
                count=max_count,
                block=None if pending else _milliseconds(block_seconds),
            )
            return self._records(reply, [stream]).get(stream, [])

        def read_own(client: redis.Redis) -> list[Delivery]:
            # What was trimmed stays in the pending list of Redis 6.2 and would come back for ever.
            while (records := read(client)) and not self._drop_vanished(client, stream, group, records):
                self._lost_reads -= 1  # that one has arrived
            return self._counted(client, stream, group, consumer, records)

        def read_new(client: redis.Redis) -> list[Delivery]:
            return [Delivery(entry_of(stream, *record), 1) for record in read(client)]

        if pending:
            found = self._whole(lambda: self._link.call(read_own))
        else:
            found = self._given_whole(self._link.call(read_new, block_seconds=block_seconds))
        self._lost_reads = 0
        return found

    def claim(
        self, stream: str, *, group: str, consumer: str, idle_seconds: float, max_count: int
    ) -> list[Delivery]:
        def take(client: redis.Redis) -> list[Delivery]:
            self._lost_reads += 1
            claimed: list[Record] = []
            cursor = b"0-0"
            while len(claimed) < max_count:
                cursor, records = self._claim_page(
                    client, stream, group, consumer, idle_seconds, cursor, max_count - len(claimed)
                )
                claimed += self._drop_vanished(client, stream, group, records)
                if cursor == b"0-0":
                    break
            return self._counted(client, stream, group, consumer, claimed)

        found = self._given_whole(self._link.call(take))
        self._lost_reads = 0
        return found

    def ack(self, stream: str, group: str, ids: Sequence[EntryId]) -> None:
        if ids:
            self._link.call(lambda client: client.xack(self._key(stream), group, *map(str, ids)))

    def trim(self, stream: str, *, below: EntryId) -> None:
        self._link.call(lambda client: client.xtrim(self._key(stream), minid=str(below), approximate=False))

    def next_generation(self, node: str, *, at_least: int) -> int:
        key = generation_key(self._run_id, node)

        def raised(client: redis.Redis, by: int) -> int:
            with client.pipeline(transaction=True) as pipe:
                pipe.incrby(key, by)
                pipe.get(key)
                generation, held = pipe.execute()
            if generation != int(held):
                raise DamagedReply("INCRBY and GET disagree")
            return int(generation)

        def count_up(client: redis.Redis) -> int:
            # Every call adds at least one, so no two callers are told the same number.
            generation = raised(client, 1)
            return generation if generation >= at_least else raised(client, at_least - generation)

        return self._link.call(count_up)

    def close(self) -> None:
        self._link.close()
        if self._on_close is not None:
            self._on_close()

    def _key(self, stream: str) -> str:
        return key_of(self._run_id, stream)

    def _append(self, client: redis.Redis, entries: Sequence[Entry]) -> list[Entry]:
        """Those that the server refused because they are not above its newest."""
        with client.pipeline(transaction=len(entries) > 1) as pipe:
            for entry in entries:
                pipe.xadd(
                    self._key(entry.stream),
                    cast(Any, fields_of(entry)),
                    id=str(entry.id),
                    maxlen=STREAMS[entry.stream].fuse_entries,
                    approximate=True,
                )
            replies = pipe.execute(raise_on_error=False)
        refused: list[Entry] = []
        for entry, reply in zip(entries, replies, strict=True):
            if isinstance(reply, Exception):
                if "equal or smaller" not in text_of(reply):
                    raise reply
                refused.append(entry)
            elif reply != str(entry.id).encode():
                raise DamagedReply("XADD was not answered by its id")
        return refused

    def _check_present(self, stream: str, ids: list[EntryId]) -> None:
        """The server refused `ids` as not above its newest. Were they ours, or is a newer writer there?"""
        newest = self.last_id(stream)
        if newest.generation > min(ids).generation:
            raise Fenced(f"{stream} {min(ids)}: generation {newest.generation} writes now; stop this process")
        if newest < max(ids):
            raise BusUnavailable(f"{stream} was emptied while it was written; publish again")

    def _last_id(self, client: redis.Redis, stream: str) -> EntryId:
        try:
            return ask_twice(client, _last_id_in, "XINFO STREAM", self._key(stream))
        except redis.ResponseError as error:
            if "no such key" in str(error):
                return STREAM_START
            raise

    def _claim_page(
        self,
        client: redis.Redis,
        stream: str,
        group: str,
        consumer: str,
        idle_seconds: float,
        cursor: bytes,
        max_count: int,
    ) -> tuple[bytes, list[Record]]:
        reply = client.xautoclaim(
            self._key(stream),
            group,
            consumer,
            min_idle_time=round(idle_seconds * 1000),
            start_id=cursor.decode(),
            count=min(max_count, _CLAIM_PAGE_ENTRIES),
        )
        return bytes(reply[0]), records_of(reply[1])

    def _drop_vanished(
        self, client: redis.Redis, stream: str, group: str, records: list[Record]
    ) -> list[Record]:
        """Acknowledge what is pending but trimmed; the reader sees the gap in the sequence."""
        for id_, fields in records:
            if not fields:
                if client.xrange(self._key(stream), str(id_), str(id_)):
                    raise DamagedReply(f"{stream} {id_} came without its fields")
                client.xack(self._key(stream), group, str(id_))
        return [(id_, fields) for id_, fields in records if fields]

    def _counted(
        self, client: redis.Redis, stream: str, group: str, consumer: str, records: list[Record]
    ) -> list[Delivery]:
        """With the number of deliveries, which only XPENDING tells, less those that never arrived here:
        else five lost replies would make an entry look like one that kills its readers.
        """
        deliveries = []
        for id_, fields in records:
            if fields:
                asked = ("XPENDING", self._key(stream), group, str(id_), str(id_), 1, consumer)
                times = ask_twice(client, _times_delivered_in, *asked, parse_detail=True)
                arrived = max(1, times - (self._lost_reads - 1))  # the read at hand has arrived
                deliveries.append(Delivery(entry_of(stream, id_, fields), arrived))
        return deliveries

    def _records(self, reply: Any, streams: Iterable[str]) -> dict[str, list[Record]]:
        """By short name. A reply about another stream was damaged: ours would be missed in silence."""
        found = records_by_stream(reply)
        names = {self._key(stream).encode(): stream for stream in streams}
        if unknown := found.keys() - names.keys():
            raise DamagedReply(f"asked for {len(names)} streams, told of {len(unknown)} others")
        return {names[key]: records for key, records in found.items()}

    def _whole(self, read: Callable[[], list[T]]) -> list[T]:
        """What `read` finds; damage is believed when a fresh connection brings the same bytes again."""
        seen: list[tuple[EntryId, bytes]] = []
        for _ in range(_MOST_READS):
            found = read()
            damaged = [(entry.id, entry.body) for entry in map(_entry_in, found) if entry.kind == DAMAGED]
            if damaged == seen:
                return found
            seen = damaged
            self._link.renew()
        raise BusUnavailable(f"redis at {self._link.shown}: each reading brings other damage")

    def _given_whole(self, deliveries: list[Delivery]) -> list[Delivery]:
        """What the group gave out. It gives out once: damage has to be looked at in the own pending list."""
        if any(delivery.entry.kind == DAMAGED for delivery in deliveries):
            self._link.renew()
            raise BusUnavailable(f"redis at {self._link.shown}: damaged entries; read the pending ones")
        return deliveries


def _entry_in(found: Entry | Delivery) -> Entry:
    return found if isinstance(found, Entry) else found.entry


def _last_id_in(about: Any) -> EntryId:
    return EntryId.parse(about["last-generated-id"].decode())


def _times_delivered_in(state: Any) -> int:
    return int(state[0]["times_delivered"]) if state else 1


def _milliseconds(block_seconds: float) -> int | None:
    return max(1, round(block_seconds * 1000)) if block_seconds > 0 else None  # BLOCK 0 waits for ever
