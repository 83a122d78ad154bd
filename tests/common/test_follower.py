"""The follower over a server that lost its data, and over a replica that lacks the newest of it."""

from __future__ import annotations

import random

import pytest

from common.bus import Entry, EntryId
from common.clock import FakeClock
from common.follower import Follower
from common.memory_bus import MemoryBus, MemoryServer
from common.streams import ORDERS
from tests.common.small_node import RUN, FaultyBus


def order(sequence: int, *, sent_unix_seconds: float | None = None, generation: int = 1) -> Entry:
    sent = float(sequence) if sent_unix_seconds is None else sent_unix_seconds
    return Entry(ORDERS, EntryId(generation, sequence), "StopRequest", b"body", sent)


class Following:
    """A follower of the orders, and a server that can be replaced by another one."""

    def __init__(self) -> None:
        self.server = MemoryServer(FakeClock())
        self.bus = MemoryBus(self.server, RUN)
        self._faulty = FaultyBus(self.bus)
        self.follower = Follower(self._faulty, [ORDERS], clock=FakeClock(), rng=random.Random(0))  # type: ignore[arg-type]

    def read(self) -> list[int]:
        return [entry.id.sequence for entry in self.follower.read(0.0)]

    def replace_server_by_one_with(self, *entries: Entry) -> None:
        self.server.flush()
        self.bus.publish(entries)
        self._faulty.faults = [(0, "before")]
        assert self.read() == []
        assert not self.follower.connected


@pytest.fixture
def following() -> Following:
    made = Following()
    made.bus.publish([order(sequence) for sequence in range(1, 6)])
    return made


def test_a_replica_that_lacks_the_newest_entries_brings_no_old_one_again(following: Following) -> None:
    assert following.read() == [1, 2, 3, 4, 5]
    following.replace_server_by_one_with(order(1), order(2), order(3))
    assert following.read() == []
    assert following.follower.resets == 0
    following.bus.publish([order(6)])
    assert following.read() == [6]


def test_that_holds_for_entries_that_were_skipped_too(following: Following) -> None:
    """An old order to stop must not stop a run that was resumed since."""
    following.follower.skip_to_end()
    following.replace_server_by_one_with(order(1), order(2), order(3))
    assert following.read() == []
    following.bus.publish([order(6)])
    assert following.read() == [6]


def test_a_server_that_begins_again_is_read_from_its_beginning(following: Following) -> None:
    assert following.read() == [1, 2, 3, 4, 5]
    following.replace_server_by_one_with(order(1, sent_unix_seconds=7.0), order(2, sent_unix_seconds=8.0))
    assert following.read() == [1, 2]
    assert following.follower.resets == 1


def test_a_server_that_is_empty_is_read_from_its_beginning(following: Following) -> None:
    assert following.read() == [1, 2, 3, 4, 5]
    following.replace_server_by_one_with()
    assert following.read() == []
    following.bus.publish([order(1)])
    assert following.read() == [1]
