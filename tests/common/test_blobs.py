"""Blobs: what comes back is what was put, or an error that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from common.blobs import (
    MAX_BLOB_BYTES,
    BlobCorrupt,
    BlobMissing,
    BlobRef,
    Blobs,
    MemoryBlobs,
    RedisBlobs,
    open_blobs,
)
from common.clock import FakeClock
from common.errors import BodyTooLarge, SettingsError
from common.memory_bus import MemoryServer
from common.open_bus import open_link
from tests.faults import wait_until
from tests.servers import BusServer

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def blobs(bus_server: BusServer, run_id: str) -> Iterator[Blobs]:
    opened = bus_server.open_blobs(run_id)
    yield opened
    opened.close()


@pytest.mark.parametrize("payload", [b"", b"x", PAYLOAD])
def test_blob_comes_back_whole(blobs: Blobs, payload: bytes) -> None:
    ref = blobs.put(payload, ttl_seconds=60)
    assert ref.size == len(payload)
    assert blobs.put(payload, ttl_seconds=60) == ref
    assert blobs.get(ref) == payload


def test_unknown_blob_is_missing(blobs: Blobs) -> None:
    with pytest.raises(BlobMissing):
        blobs.get(BlobRef(sha256="0" * 64, size=3))


def test_blob_expires(blobs: Blobs) -> None:
    ref = blobs.put(PAYLOAD, ttl_seconds=0.03)

    def is_missing() -> bool:
        try:
            blobs.get(ref)
        except BlobMissing:
            return True
        return False

    wait_until(is_missing)


def test_memory_blobs_are_freed_when_they_expire(fake_clock: FakeClock) -> None:
    server = MemoryServer(fake_clock)
    blobs = MemoryBlobs(server, "run")
    ref = blobs.put(b"old", ttl_seconds=10)
    fake_clock.advance(9.9)
    assert blobs.get(ref) == b"old"
    fake_clock.advance(0.2)
    blobs.put(b"new", ttl_seconds=10)
    assert [payload for payload, _ in server.blobs.values()] == [b"new"]


def test_ref_with_another_size_is_corrupt(blobs: Blobs) -> None:
    ref = blobs.put(b"abc", ttl_seconds=60)
    with pytest.raises(BlobCorrupt):
        blobs.get(dataclasses.replace(ref, size=2))


@pytest.mark.parametrize("damaged", [b"abd", b"ab", b"abcd"])
def test_one_changed_byte_is_corrupt(server_url: str, run_id: str, damaged: bytes) -> None:
    link = open_link(server_url, environment={})
    blobs = RedisBlobs(link, run_id)
    ref = blobs.put(b"abc", ttl_seconds=60)
    link.call(lambda client: client.set(f"hpt:{{{run_id}}}:blob.{ref.sha256}", damaged))
    with pytest.raises(BlobCorrupt):
        blobs.get(ref)
    blobs.close()


def test_memory_damage_is_corrupt() -> None:
    server = MemoryServer()
    blobs = MemoryBlobs(server, "run")
    ref = blobs.put(b"abc", ttl_seconds=60)
    (key,) = server.blobs
    server.blobs[key] = (b"abd", server.blobs[key][1])
    with pytest.raises(BlobCorrupt):
        blobs.get(ref)


def test_blob_above_the_cap_is_refused() -> None:
    with pytest.raises(BodyTooLarge, match=str(MAX_BLOB_BYTES)):
        MemoryBlobs(MemoryServer(), "run").put(bytes(MAX_BLOB_BYTES + 1), ttl_seconds=1)


def test_memory_address_is_shared_by_name() -> None:
    ref = open_blobs("memory://blobs-a", "run", environment={}).put(b"abc", ttl_seconds=60)
    assert open_blobs("memory://blobs-a", "run", environment={}).get(ref) == b"abc"
    for url, run_id in (("memory://blobs-b", "run"), ("memory://blobs-a", "other")):
        with pytest.raises(BlobMissing):
            open_blobs(url, run_id, environment={}).get(ref)


def test_embedded_address_is_refused_with_the_cure() -> None:
    with pytest.raises(SettingsError, match="address of the one that runs"):
        open_blobs("embedded://", "run", environment={})
