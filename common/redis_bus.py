"""The Bus contract on Redis streams (Redis >= 6.2 or Valkey).

Explicit ids and one MULTI/EXEC per `publish`: either all entries of a call are in or none, so a
half-sent pipeline leaves no hole behind a later entry that got through, and a retry of the same
entries finds them there. An id at or below the newest one is told apart by the newest one's
generation: ours means delivered, a higher one means that we are fenced.
Knows nothing of messages. Retries nothing: callers do, with the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import redis

from common.bus import STREAM_START, Delivery, Entry, EntryId
from common.errors import BusUnavailable, Fenced
from common.redis_link import RedisLink, text_of
from common.streams import STREAMS, generation_key, key_of

_CLAIM_PAGE_ENTRIES = 100

_Raw = tuple[EntryId, dict[bytes, bytes] | None]  # None: the payload was trimmed away


class RedisBus:
    """See common.bus.Bus."""

    def __init__(self, link: RedisLink, run_id: str, *, on_close: Callable[[], None] | None = None) -> None:
        self._link = link
        self._run_id = run_id
        self._on_close = on_close

    def ping(self) -> None:
        """Raises BusUnavailable or BusRefused unless the server answers PONG to us."""
        self._link.call(lambda client: client.ping())

    def publish(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        replies = self._link.call(lambda client: self._append(client, entries))
        present: list[Entry] = []
        for entry, reply in zip(entries, replies, strict=True):
            if isinstance(reply, Exception):
                if "equal or smaller" not in text_of(reply):
                    raise self._link.translate(reply)
                present.append(entry)
        for stream in dict.fromkeys(entry.stream for entry in present):
            self._check_present(stream, [entry.id for entry in present if entry.stream == stream])

    def read_after(
        self, after: Mapping[str, EntryId], *, max_count: int, block_seconds: float
    ) -> list[Entry]:
        if not after:
            return []
        positions = {self._key(stream): str(position) for stream, position in after.items()}
        reply = self._link.call(
            lambda client: client.xread(
                cast(Any, positions), count=max_count, block=_milliseconds(block_seconds)
            ),
            block_seconds=block_seconds,
        )
        found = streams_of_reply(reply)
        return [
            _entry(stream, id_, fields)
            for stream in after
            for id_, fields in found.get(self._key(stream).encode(), [])
        ]

    def latest(self, stream: str) -> Entry | None:
        reply: Any = self._link.call(lambda client: client.xrevrange(self._key(stream), count=1))
        entries = [_entry(stream, id_, fields) for id_, fields in _raw_entries(reply)]
        return entries[0] if entries else None

    def last_id(self, stream: str) -> EntryId:
        return self._link.call(lambda client: self._last_id(client, stream))

    def length(self, stream: str) -> int:
        return int(self._link.call(lambda client: client.xlen(self._key(stream))))

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
        def read(client: redis.Redis) -> list[_Raw]:
            reply = client.xreadgroup(
                group,
                consumer,
                {self._key(stream): "0" if pending else ">"},
                count=max_count,
                block=None if pending else _milliseconds(block_seconds),
            )
            return streams_of_reply(reply).get(self._key(stream).encode(), [])

        def read_own(client: redis.Redis) -> list[Delivery]:
            # What was trimmed stays in the pending list of Redis 6.2 and would come back for ever.
            while (raw := read(client)) and not self._drop_vanished(client, stream, group, raw):
                pass
            return self._counted(client, stream, group, consumer, raw)

        if pending:
            return self._link.call(read_own)
        raw = self._link.call(read, block_seconds=block_seconds)
        return [Delivery(_entry(stream, id_, fields), 1) for id_, fields in raw]

    def claim(
        self, stream: str, *, group: str, consumer: str, idle_seconds: float, max_count: int
    ) -> list[Delivery]:
        def take(client: redis.Redis) -> list[Delivery]:
            claimed: list[_Raw] = []
            cursor = b"0-0"
            while len(claimed) < max_count:
                cursor, raw = self._claim_page(
                    client, stream, group, consumer, idle_seconds, cursor, max_count - len(claimed)
                )
                claimed += self._drop_vanished(client, stream, group, raw)
                if cursor == b"0-0":
                    break
            return self._counted(client, stream, group, consumer, claimed)

        return self._link.call(take)

    def ack(self, stream: str, group: str, ids: Sequence[EntryId]) -> None:
        if ids:
            self._link.call(lambda client: client.xack(self._key(stream), group, *map(str, ids)))

    def trim(self, stream: str, *, below: EntryId) -> None:
        self._link.call(lambda client: client.xtrim(self._key(stream), minid=str(below), approximate=False))

    def next_generation(self, node: str, *, at_least: int) -> int:
        key = generation_key(self._run_id, node)

        def count_up(client: redis.Redis) -> int:
            # Every call adds at least one, so no two callers are told the same number.
            generation = int(client.incr(key))
            return generation if generation >= at_least else int(client.incrby(key, at_least - generation))

        return self._link.call(count_up)

    def close(self) -> None:
        self._link.close()
        if self._on_close is not None:
            self._on_close()

    def _key(self, stream: str) -> str:
        return key_of(self._run_id, stream)

    def _append(self, client: redis.Redis, entries: Sequence[Entry]) -> list[Any]:
        with client.pipeline(transaction=len(entries) > 1) as pipe:
            for entry in entries:
                pipe.xadd(
                    self._key(entry.stream),
                    {b"k": entry.kind, b"b": entry.body, b"u": repr(entry.sent_unix_seconds)},
                    id=str(entry.id),
                    maxlen=STREAMS[entry.stream].fuse_entries,
                    approximate=True,
                )
            return pipe.execute(raise_on_error=False)

    def _check_present(self, stream: str, ids: list[EntryId]) -> None:
        """The server refused `ids` as not above its newest. Were they ours, or is a newer writer there?"""
        newest = self.last_id(stream)
        if newest.generation > min(ids).generation:
            raise Fenced(f"{stream} {min(ids)}: generation {newest.generation} writes now; stop this process")
        if newest < max(ids):
            raise BusUnavailable(f"{stream} was emptied while it was written; publish again")

    def _last_id(self, client: redis.Redis, stream: str) -> EntryId:
        try:
            about = client.xinfo_stream(self._key(stream))
        except redis.ResponseError as error:
            if "no such key" in str(error):
                return STREAM_START
            raise
        return EntryId.parse(about["last-generated-id"].decode())

    def _claim_page(
        self,
        client: redis.Redis,
        stream: str,
        group: str,
        consumer: str,
        idle_seconds: float,
        cursor: bytes,
        max_count: int,
    ) -> tuple[bytes, list[_Raw]]:
        reply = client.xautoclaim(
            self._key(stream),
            group,
            consumer,
            min_idle_time=round(idle_seconds * 1000),
            start_id=cursor.decode(),
            count=min(max_count, _CLAIM_PAGE_ENTRIES),
        )
        return bytes(reply[0]), _raw_entries(reply[1])

    def _drop_vanished(self, client: redis.Redis, stream: str, group: str, raw: list[_Raw]) -> list[_Raw]:
        """Acknowledge what is pending but trimmed; the reader sees the gap in the sequence."""
        vanished = [str(id_) for id_, fields in raw if not fields]
        if vanished:
            client.xack(self._key(stream), group, *vanished)
        return [(id_, fields) for id_, fields in raw if fields]

    def _counted(
        self, client: redis.Redis, stream: str, group: str, consumer: str, raw: list[_Raw]
    ) -> list[Delivery]:
        """With the number of deliveries, which only XPENDING tells."""
        kept = [(id_, fields) for id_, fields in raw if fields]
        with client.pipeline(transaction=False) as pipe:
            for id_, _ in kept:
                pipe.xpending_range(self._key(stream), group, str(id_), str(id_), 1, consumer)
            states = pipe.execute() if kept else []
        return [
            Delivery(_entry(stream, id_, fields), int(state[0]["times_delivered"]) if state else 1)
            for (id_, fields), state in zip(kept, states, strict=True)
        ]


def streams_of_reply(reply: Any) -> dict[bytes, list[_Raw]]:
    """XREAD and XREADGROUP replies of all redis-py versions and protocols (systems.md 1.4).

    RESP2 `[[key, [(id, {})]]]`, RESP3 `{key: [[(id, {})]]}` or `{key: [(id, {})]}`, nothing: empty.
    """
    pairs = reply.items() if isinstance(reply, dict) else (reply or ())
    return {key: _raw_entries(_unnested(entries)) for key, entries in pairs}


def _unnested(entries: Any) -> Any:
    nested = len(entries) > 0 and all(isinstance(part, list) for part in entries)
    return [entry for part in entries for entry in part] if nested else entries


def _raw_entries(entries: Iterable[Any]) -> list[_Raw]:
    # Redis 6.2 claims trimmed entries as nil, which redis-py shows as (None, None).
    return [(EntryId.parse(id_.decode()), fields or None) for id_, fields in entries if id_ is not None]


def _entry(stream: str, id_: EntryId, fields: dict[bytes, bytes] | None) -> Entry:
    """Never raises: what somebody else wrote becomes an entry that the codec refuses."""
    fields = fields or {}
    try:
        sent_unix_seconds = float(fields.get(b"u", b"nan"))
    except ValueError:
        sent_unix_seconds = float("nan")
    kind = fields.get(b"k", b"").decode("utf-8", "replace")
    return Entry(stream, id_, kind, fields.get(b"b", b""), sent_unix_seconds)


def _milliseconds(block_seconds: float) -> int | None:
    return max(1, round(block_seconds * 1000)) if block_seconds > 0 else None  # BLOCK 0 waits for ever
