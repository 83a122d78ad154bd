"""An entry as the fields of a Redis stream record, with the checksum that says whether it is whole.

    k kind    b body    u unix seconds when sent    c crc32 of stream, id, kind, time and body

Knows the shapes in which the versions of redis-py hand records over. What does not fit its checksum,
or has none, becomes an entry of kind DAMAGED: it is never believed and never raises. Talks to nobody.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from common.bus import DAMAGED, Entry, EntryId

Record = tuple[EntryId, dict[bytes, bytes] | None]  # None: the payload was trimmed away


def fields_of(entry: Entry) -> dict[bytes, bytes]:
    """What to write. 4 kB of body cost about 1 us of checksum."""
    fields = {b"k": entry.kind.encode(), b"b": entry.body, b"u": repr(entry.sent_unix_seconds).encode()}
    fields[b"c"] = _checksum(entry.stream, entry.id, fields)
    return fields


def entry_of(stream: str, id_: EntryId, fields: Mapping[bytes, bytes] | None) -> Entry:
    """Never raises: what was damaged, or written by somebody else, is an entry of kind DAMAGED.

    Its body is the whole record as text for people, so that two differently damaged ones differ.
    """
    try:
        if fields and fields[b"c"] == _checksum(stream, id_, fields):
            return Entry(stream, id_, fields[b"k"].decode(), fields[b"b"], float(fields[b"u"]))
    except (KeyError, TypeError, ValueError):
        pass
    return Entry(stream, id_, DAMAGED, repr(fields).encode(), float("nan"))


def records_by_stream(reply: Any) -> dict[bytes, list[Record]]:
    """XREAD and XREADGROUP replies of all redis-py versions and protocols (systems.md 1.4).

    RESP2 `[[key, [(id, {})]]]`, RESP3 `{key: [[(id, {})]]}` or `{key: [(id, {})]}`, nothing: empty.
    A damaged reply raises ValueError, TypeError or AttributeError.
    """
    pairs = reply.items() if isinstance(reply, dict) else (reply or ())
    return {key: records_of(_unnested(entries)) for key, entries in pairs}


def records_of(entries: Iterable[Any]) -> list[Record]:
    # Redis 6.2 claims trimmed entries as nil, which redis-py shows as (None, None).
    return [(EntryId.parse(id_.decode()), fields or None) for id_, fields in entries if id_ is not None]


def _checksum(stream: str, id_: EntryId, fields: Mapping[bytes, bytes]) -> bytes:
    """Eight hexadecimal digits. The lengths keep a byte from moving from one field into the next."""
    kind, sent, body = fields[b"k"], fields[b"u"], fields[b"b"]
    head = b"%s %d-%d %d %s %d %s " % (stream.encode(), *id_, len(kind), kind, len(sent), sent)
    return b"%08x" % zlib.crc32(body, zlib.crc32(head))


def _unnested(entries: Any) -> Any:
    nested = len(entries) > 0 and all(isinstance(part, list) for part in entries)
    return [entry for part in entries for entry in part] if nested else entries
