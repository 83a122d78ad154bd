"""A server behind a proxy that loses and damages what it is told to, and the same server without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.bus import Bus
from common.open_bus import open_bus
from tests.faults import FaultProxy


@pytest.fixture
def proxy(server_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(server_url, seed=5) as between:
        yield between


@pytest.fixture
def far_bus(proxy: FaultProxy, run_id: str) -> Iterator[Bus]:
    """A bus behind the proxy."""
    bus = open_bus(proxy.url, run_id, environment={})
    yield bus
    bus.close()


@pytest.fixture
def near_bus(server_url: str, run_id: str) -> Iterator[Bus]:
    """The same run, straight to the server."""
    bus = open_bus(server_url, run_id, environment={})
    yield bus
    bus.close()
