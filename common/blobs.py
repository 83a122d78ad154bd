"""Claim check: a payload too big for a stream is put aside, the message carries a BlobRef.

A blob is named by its SHA-256, so putting it twice is harmless, and what comes back is checked
byte for byte. It expires; whoever gets BlobMissing does without or asks again. Blobs share the
server of the bus but not its streams. Never retries.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import BodyTooLarge, BusError, CodecError, SettingsError
from common.memory_bus import MemoryServer, memory_server
from common.open_bus import open_link, url_or_environment
from common.redis_link import Redis, RedisLink

MAX_BLOB_BYTES = 64 * 1024 * 1024  # SET and GET of this take 0.2 s each on loopback (systems.md 1.6)
_TRANSFER_SECONDS = 30.0  # the whole cap at 20 Mbit/s


class BlobMissing(BusError):
    """Expired, or the server lost it."""


class BlobCorrupt(CodecError):
    """Not the bytes that were put."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobRef:
    sha256: str  # 64 lower-case hex digits
    size: int  # bytes


class Blobs(Protocol):
    def put(self, payload: bytes, *, ttl_seconds: float) -> BlobRef:
        """Raises BodyTooLarge above MAX_BLOB_BYTES, BusUnavailable, BusFull, BusRefused."""

    def get(self, ref: BlobRef) -> bytes:
        """Raises BlobMissing, BlobCorrupt, BusUnavailable, BusRefused."""

    def close(self) -> None: ...


class MemoryBlobs:
    """Blobs on the MemoryServer of this process."""

    def __init__(self, server: MemoryServer, run_id: str) -> None:
        self._server = server
        self._run_id = run_id

    def put(self, payload: bytes, *, ttl_seconds: float) -> BlobRef:
        ref = _ref_of(payload)
        with self._server.changed:
            now_seconds = self._server.clock.monotonic()
            held = self._server.blobs
            for key in [key for key, (_, until_seconds) in held.items() if until_seconds <= now_seconds]:
                del held[key]
            held[_key(self._run_id, ref)] = (bytes(payload), now_seconds + ttl_seconds)
        return ref

    def get(self, ref: BlobRef) -> bytes:
        with self._server.changed:
            payload, until_seconds = self._server.blobs.get(_key(self._run_id, ref), (None, 0.0))
            if until_seconds <= self._server.clock.monotonic():
                payload = None
        return _checked(payload, ref)

    def close(self) -> None:
        """Nothing to give back."""


class RedisBlobs:
    """Blobs as keys with an expiry."""

    def __init__(self, link: RedisLink, run_id: str) -> None:
        self._link = link
        self._run_id = run_id

    def put(self, payload: bytes, *, ttl_seconds: float) -> BlobRef:
        ref = _ref_of(payload)
        key, ttl_milliseconds = _key(self._run_id, ref), max(1, round(ttl_seconds * 1000))
        self._link.call(
            lambda client: client.set(key, payload, px=ttl_milliseconds), block_seconds=_TRANSFER_SECONDS
        )
        return ref

    def get(self, ref: BlobRef) -> bytes:
        key = _key(self._run_id, ref)

        def read(client: Redis) -> bytes | None:
            # Look before loading: a foreign value of 512 MB must not come into this process.
            held: Any = b"" if client.strlen(key) > MAX_BLOB_BYTES else client.get(key)
            return None if held is None else bytes(held)

        return _checked(self._link.call(read, block_seconds=_TRANSFER_SECONDS), ref)

    def close(self) -> None:
        self._link.close()


def open_blobs(url: str | None, run_id: str, *, environment: Mapping[str, str] | None = None) -> Blobs:
    """The blobs beside the bus at `url`; an embedded server has to be given by its own address."""
    environment = os.environ if environment is None else environment
    url = url_or_environment(url, environment)
    scheme, _, name = url.partition("://")
    if scheme == "memory":
        return MemoryBlobs(memory_server(name), run_id)
    if scheme == "embedded":
        raise SettingsError("embedded:// starts another server; give the address of the one that runs")
    return RedisBlobs(open_link(url, environment=environment), run_id)


def _ref_of(payload: bytes) -> BlobRef:
    if len(payload) > MAX_BLOB_BYTES:
        raise BodyTooLarge(f"blob of {len(payload)} bytes; the limit is {MAX_BLOB_BYTES}")
    return BlobRef(sha256=hashlib.sha256(payload).hexdigest(), size=len(payload))


def _checked(payload: bytes | None, ref: BlobRef) -> bytes:
    if payload is None:
        raise BlobMissing(f"blob {ref.sha256[:12]} is not there; it expired, or the server lost it")
    if len(payload) != ref.size or hashlib.sha256(payload).hexdigest() != ref.sha256:
        raise BlobCorrupt(f"blob {ref.sha256[:12]}: the bytes are not the ones that were put")
    return payload


def _key(run_id: str, ref: BlobRef) -> str:
    return f"hpt:{{{run_id}}}:blob.{ref.sha256}"
