"""The event loop when the bus fails, lies empty or loses replies, and when the node dies."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.bus import STREAM_START, EntryId
from common.clock import FakeClock
from common.errors import BusRefused, Fenced
from common.memory_bus import MemoryBus, MemoryServer
from common.open_bus import open_bus
from tests.common.small_node import (
    RUN,
    FaultyBus,
    Node,
    dead_letters,
    entry_of,
    pending,
    publish,
    requested,
)
from tests.faults import FaultProxy, wait_until


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(FakeClock())


@pytest.fixture
def memory_bus(server: MemoryServer) -> MemoryBus:
    return MemoryBus(server, RUN)


def test_emptied_server_costs_the_lost_entries_and_nothing_else(
    memory_bus: MemoryBus, server: MemoryServer
) -> None:
    publish(memory_bus, 1, 2, 3)
    node = Node(memory_bus)
    node.service.start(STREAM_START)
    node.settle()
    server.flush()
    publish(memory_bus, 5, 6)  # 4 was on its way
    node.settle()
    assert node.steps == [1, 2, 3, 5, 6]
    assert node.service.counters.groups_recreated == 1
    assert node.gaps == [("1-4", "1-5")]


def test_lost_reply_of_a_publication_is_sent_once_and_not_handled_again(memory_bus: MemoryBus) -> None:
    faulty = FaultyBus(memory_bus)
    publish(memory_bus, 1, 2)
    node = Node(faulty)
    node.service.start(STREAM_START)
    for call in range(30):
        faulty.faults = [(call, "after")]
        node.service.run_once(0.0)
    faulty.faults = []
    publish(memory_bus, 3)
    node.settle()
    assert node.steps == requested(memory_bus) == [1, 2, 3]


def test_real_server_that_loses_a_reply_strands_nothing(server_url: str, run_id: str) -> None:
    with FaultProxy(server_url) as proxy:
        bus = open_bus(proxy.url, run_id, environment={})
        direct = open_bus(server_url, run_id, environment={})
        node = Node(bus)
        node.service.start(STREAM_START)
        node.settle()
        publish(direct, 1, 2, 3)
        proxy.drop_reply(b"XREADGROUP")
        wait_until(lambda: node.service.run_once(0.0) == 0 and node.steps == [1, 2, 3])
        assert proxy.fired == 1
        assert node.service.counters.disconnects >= 1
        assert requested(direct) == [1, 2, 3]
        bus.close()
        direct.close()


def test_bus_that_is_away_is_waited_for_ever_longer_but_not_too_long() -> None:
    node = Node(open_bus("unix:///nowhere/at/all", RUN, environment={}))
    node.service.start(STREAM_START)
    pauses = []
    for _ in range(50):
        before_seconds = node.clock.monotonic()
        assert node.service.run_once(0.0) == 0
        pauses.append(node.clock.monotonic() - before_seconds)
    assert max(pauses[:2]) < 0.2 < max(pauses) <= 1.0
    assert len(set(pauses)) == 50  # jitter
    assert node.service.counters.disconnects == 50
    assert node.service.drain() == 0


@pytest.mark.parametrize("error", [Fenced, BusRefused])
def test_what_waiting_cannot_mend_ends_the_loop(memory_bus: MemoryBus, error: type[Exception]) -> None:
    faulty = FaultyBus(memory_bus)
    faulty.error = error
    faulty.faults = [(2, "before")]
    node = Node(faulty)
    node.service.start(STREAM_START)
    with pytest.raises(error):
        node.service.run(threading.Event())


ACTIONS = st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 40)),
    st.tuples(st.just("run"), st.integers(1, 4)),
    st.tuples(st.just("fault before"), st.integers(0, 8)),
    st.tuples(st.just("fault after"), st.integers(0, 8)),
    st.tuples(st.just("checkpoint"), st.just(0)),
    st.tuples(st.just("crash"), st.just(0)),
    st.tuples(st.just("new trainer"), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=25))
def test_no_fault_or_crash_changes_order_or_number_of_effects(actions: list[tuple[str, int]]) -> None:
    server = MemoryServer(FakeClock())
    bus = MemoryBus(server, RUN)
    faulty = FaultyBus(bus)
    node = Node(faulty)
    node.service.start(STREAM_START)
    saved: tuple[list[int], EntryId] = ([], STREAM_START)
    last_step, sequence, trainer, incarnation = 0, 0, 1, 1
    for action, number in actions:
        if action == "publish":
            for _ in range(number):
                last_step, sequence = last_step + 1, sequence + 1
                bus.publish([entry_of(last_step, generation=trainer, sequence=sequence)])
        elif action == "run":
            for _ in range(number):
                node.service.run_once(0.0)
        elif action.startswith("fault"):
            faulty.faults.append((number, action.removeprefix("fault ")))
        elif action == "checkpoint" and not node.service.replies_waiting:
            saved = (list(node.steps), node.service.applied)
        elif action == "new trainer":
            trainer, sequence = trainer + 1, 0
        elif action == "crash":
            incarnation += 1
            node = Node(faulty, generation=incarnation)
            node.steps = list(saved[0])
            node.service.start(saved[1])
    faulty.faults = []
    node.settle(rounds=1000)
    assert node.steps == list(range(1, last_step + 1))
    asked = requested(bus)
    assert list(dict.fromkeys(asked)) == node.steps  # a restored node may repeat itself, nothing else
    assert incarnation > 1 or asked == node.steps
    assert not list(pending(bus))
    assert node.gaps == []
    assert dead_letters(bus) == []
