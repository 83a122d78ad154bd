"""Fixtures for all tests: servers to talk to, buses on them, and a clock that tests move.

`server_url` and `bus` run a test once per server that is here: the one in the wheel always,
`redis-server` where it is on PATH. Each test has a run of its own, so they share servers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from common.bus import Bus
from common.clock import FakeClock
from common.embedded import EmbeddedServer, start_server
from tests.servers import (
    REAL_SERVERS,
    BusServer,
    binary_of,
    fake_bus_server,
    memory_bus_server,
    real_bus_server,
    unique_run_id,
)

# Before torch is loaded, here and in every process a test starts. Our tensors are small: a second thread
# only spins, and the predictor runs on one in production too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def fake_clock() -> FakeClock:
    return FakeClock(1_000.0)


@pytest.fixture
def run_id() -> str:
    return unique_run_id()


@pytest.fixture(params=REAL_SERVERS)
def server_url(request: pytest.FixtureRequest) -> str:
    """Address of a real server with a password, shared by all tests of the session."""
    return _url_of(request.param, request)


@pytest.fixture
def server_urls(request: pytest.FixtureRequest) -> dict[str, str]:
    """Addresses of all real servers that are installed, for what tries them at the same time."""
    return {name: _url_of(name, request) for name in REAL_SERVERS if binary_of(name) is not None}


@pytest.fixture(params=("memory", "fakeredis", *REAL_SERVERS))
def bus_server(request: pytest.FixtureRequest) -> Iterator[BusServer]:
    if request.param == "memory":
        server = memory_bus_server()
    elif request.param == "fakeredis":
        server = fake_bus_server()
    else:
        server = real_bus_server(_url_of(request.param, request))
    yield server
    server.close()


@pytest.fixture
def open_on_server(bus_server: BusServer) -> Iterator[Callable[[str], Bus]]:
    """run_id -> a bus on `bus_server`, closed after the test."""
    opened: list[Bus] = []

    def open_one(run_id: str) -> Bus:
        opened.append(bus_server.open(run_id))
        return opened[-1]

    yield open_one
    for bus in opened:
        bus.close()


@pytest.fixture
def bus(open_on_server: Callable[[str], Bus], run_id: str) -> Bus:
    return open_on_server(run_id)


@pytest.fixture(scope="session")
def started_servers() -> Iterator[dict[str, EmbeddedServer]]:
    """Real servers by name: started when first asked for, ended with the session."""
    servers: dict[str, EmbeddedServer] = {}
    yield servers
    for server in servers.values():
        server.close()


def _url_of(name: str, request: pytest.FixtureRequest) -> str:
    servers: dict[str, EmbeddedServer] = request.getfixturevalue("started_servers")
    if name not in servers:
        binary = binary_of(name)
        if binary is None:
            pytest.skip(f"{name} is not installed")
        servers[name] = start_server(binary=binary)
    return servers[name].url
