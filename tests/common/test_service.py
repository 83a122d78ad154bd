"""The event loop: each effect once and in order; a handler's failure stops nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest

from common.bus import STREAM_START, Bus, Entry, EntryId
from common.clock import FakeClock
from common.memory_bus import MemoryBus, MemoryServer
from common.messages import CheckpointRequest, DeadLetter, MemoryAction, MemoryOrder, Message, RunEnded
from common.service import DEAD_BODY_BYTES
from common.streams import HISTORY, MONITOR, ORDERS, notes_of
from tests.common.small_node import (
    RUN,
    Node,
    dead_letters,
    entry_of,
    pending,
    publish,
    published,
    requested,
)


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(FakeClock())


@pytest.fixture
def memory_bus(server: MemoryServer) -> MemoryBus:
    return MemoryBus(server, RUN)


def test_each_entry_is_handled_once_answered_and_acknowledged(bus: Bus) -> None:
    publish(bus, 1, 2, 3)
    node = Node(bus)
    node.service.start(STREAM_START)
    node.settle()
    publish(bus, 4)
    node.settle()
    assert node.steps == requested(bus) == [1, 2, 3, 4]
    assert node.service.applied == EntryId(1, 4)
    assert list(pending(bus)) == []
    assert node.service.counters.skipped == 0
    assert node.service.replies_waiting == 0


def test_restored_node_reads_on_behind_what_its_state_holds(bus: Bus) -> None:
    publish(bus, *range(1, 101))  # several batches
    first = Node(bus)
    first.service.start(STREAM_START)
    first.settle()  # the group has acknowledged everything
    restored = Node(bus, generation=2)
    restored.service.start(EntryId(1, 3))  # the state is older than that
    restored.settle()
    assert restored.steps == list(range(4, 101))
    assert restored.gaps == []


def test_what_the_state_holds_is_acknowledged_and_not_handled(bus: Bus) -> None:
    publish(bus, 1, 2, 3)
    node = Node(bus)
    bus.ensure_group(HISTORY, "test", after=STREAM_START)
    bus.read_group(HISTORY, group="test", consumer=MONITOR, max_count=2, block_seconds=0, pending=False)
    node.service.start(EntryId(1, 2))  # died between its checkpoint and the acknowledgement
    node.settle()
    assert node.steps == [3]
    assert node.service.counters.skipped == 2
    assert list(pending(bus)) == []


def test_older_entries_come_first_across_a_new_generation(memory_bus: MemoryBus) -> None:
    publish(memory_bus, 1, 2, 3)
    first = Node(memory_bus)
    first.service.start(STREAM_START)
    first.settle()
    publish(memory_bus, 1, generation=2)
    restored = Node(memory_bus, generation=2)
    restored.service.start(EntryId(1, 1))
    restored.settle()
    assert restored.steps == [2, 3, 1]
    assert restored.gaps == []


def read_as_another(bus: Bus) -> None:
    """A consumer that dies before it acknowledges."""
    bus.ensure_group(HISTORY, "test", after=STREAM_START)
    bus.read_group(HISTORY, group="test", consumer="other", max_count=2, block_seconds=0, pending=False)


def test_entries_in_the_hands_of_a_dead_consumer_are_not_waited_for(memory_bus: MemoryBus) -> None:
    publish(memory_bus, 1, 2)
    read_as_another(memory_bus)
    publish(memory_bus, 3)
    node = Node(memory_bus)
    node.service.start(STREAM_START)
    node.settle()
    assert node.steps == [1, 2, 3]
    assert node.gaps == []


def test_left_over_of_a_dead_consumer_is_claimed_and_acknowledged(
    memory_bus: MemoryBus, server: MemoryServer
) -> None:
    publish(memory_bus, 1, 2)
    read_as_another(memory_bus)
    node = Node(memory_bus, claim_idle_seconds=30.0)
    node.service.start(EntryId(1, 2))
    node.settle()
    assert node.service.counters.skipped == 0
    server.clock.sleep(31.0)
    node.clock.advance(31.0)
    node.settle()
    assert node.service.counters.skipped == 2
    (stream,) = server.streams.values()
    assert not stream.groups["test"].pending


def test_missing_entries_are_reported_and_the_rest_is_handled(memory_bus: MemoryBus) -> None:
    publish(memory_bus, 1, 2, 5, 6, 9)
    memory_bus.publish([entry_of(3, generation=2, sequence=3)])
    node = Node(memory_bus)
    node.service.start(STREAM_START)
    node.settle()
    assert node.steps == [1, 2, 5, 6, 9, 3]
    assert node.gaps == [("1-3", "1-5"), ("1-7", "1-9"), ("2-1", "2-3")]


def test_trimmed_entries_are_a_gap_for_who_comes_too_late(memory_bus: MemoryBus) -> None:
    publish(memory_bus, 1, 2, 3, 4)
    memory_bus.trim(HISTORY, below=EntryId(1, 3))
    node = Node(memory_bus)
    node.service.start(EntryId(1, 1))
    node.settle()
    assert node.steps == [3, 4]
    assert node.gaps == [("1-2", "1-3")]


def test_trim_never_drops_what_is_not_applied(memory_bus: MemoryBus) -> None:
    publish(memory_bus, 1, 2, 3, 4)
    node = Node(memory_bus)
    node.service.start(EntryId(1, 2))
    node.service.trim_applied(EntryId(1, 99))
    assert memory_bus.read_after({HISTORY: STREAM_START}, max_count=9, block_seconds=0)[0] == entry_of(2)
    node.service.trim_applied(EntryId(1, 1))
    assert memory_bus.length(HISTORY) == 3


def test_stop_is_heeded_between_entries_and_drain_does_the_rest(memory_bus: MemoryBus) -> None:
    stop = threading.Event()

    def on_run_ended(message: RunEnded, entry: Entry) -> Iterable[Message]:
        handled.append(message.step)
        if message.step == 2:
            stop.set()
        return ()

    handled: list[int] = []
    publish(memory_bus, 1, 2, 3, 4)
    node = Node(memory_bus, handlers={RunEnded: on_run_ended})
    node.service.start(STREAM_START)
    node.service.run(stop)
    assert handled == [1, 2]
    assert node.service.drain() == 2
    assert handled == [1, 2, 3, 4]
    assert list(pending(memory_bus)) == []


def test_failing_handler_is_tried_again_in_order(memory_bus: MemoryBus) -> None:
    publish(memory_bus, 1, 2, 3)
    node = Node(memory_bus)
    node.failing = {2: 4}
    node.service.start(STREAM_START)
    node.settle()
    assert node.steps == [1, 2, 3]
    assert len(node.errors) == 4
    assert dead_letters(memory_bus) == []
    assert node.clock.monotonic() < 101.0


def test_entry_that_always_fails_becomes_a_dead_letter_and_the_next_follows(bus: Bus) -> None:
    publish(bus, 1, 2, 3)
    node = Node(bus)
    node.failing = {2: 1000}
    node.service.start(STREAM_START)
    node.settle()
    assert node.steps == [1, 3]
    (letter,) = dead_letters(bus)
    assert (letter.stream, letter.entry_id, letter.kind, letter.deliveries) == (HISTORY, "1-2", "RunEnded", 5)
    assert letter.error == "ValueError: cannot stand step 2"
    assert letter.body == entry_of(2).body
    assert len(node.errors) == 5
    assert list(pending(bus)) == []


def test_entry_that_kills_the_process_is_buried_and_its_neighbours_live(memory_bus: MemoryBus) -> None:
    """Process death: the delivery is counted by the group and nothing is acknowledged."""

    class Died(BaseException):
        pass

    def on_run_ended(message: RunEnded, entry: Entry) -> Iterable[Message]:
        if message.step == 2:
            raise Died
        handled.append(message.step)
        return ()

    publish(memory_bus, 1, 2, 3, 4)
    applied, deaths = STREAM_START, 0
    for _ in range(10):
        handled: list[int] = []
        node = Node(memory_bus, handlers={RunEnded: on_run_ended})
        node.service.start(applied)
        try:
            node.settle()
            break
        except Died:
            deaths += 1
    assert deaths == 5
    assert handled == [1, 3, 4]
    assert [letter.entry_id for letter in dead_letters(memory_bus)] == ["1-2"]


def test_bytes_that_are_no_message_are_a_dead_letter_at_once(bus: Bus) -> None:
    broken = Entry(HISTORY, EntryId(1, 2), "RunEnded", b"\xc1" * (DEAD_BODY_BYTES + 1), 0.0)
    bus.publish([entry_of(1), broken, entry_of(3)])
    node = Node(bus)
    node.service.start(STREAM_START)
    node.settle()
    assert node.steps == [1, 3]
    (letter,) = dead_letters(bus)
    assert letter.deliveries == 1
    assert letter.error.startswith("SchemaMismatch")
    assert letter.body == b"\xc1" * DEAD_BODY_BYTES


def test_kind_without_handler_is_passed_over_silently(memory_bus: MemoryBus) -> None:
    unknown = Entry(HISTORY, EntryId(1, 2), "FromTheFuture", b"anything", 0.0)
    memory_bus.publish([entry_of(1), unknown, entry_of(3)])
    node = Node(memory_bus)
    node.service.start(STREAM_START)
    node.settle()
    assert node.steps == [1, 3]
    assert dead_letters(memory_bus) == node.errors == []
    assert node.service.counters.ignored == 1
    assert list(pending(memory_bus)) == []


def test_reply_that_cannot_be_encoded_is_a_dead_letter_and_not_handled_twice(memory_bus: MemoryBus) -> None:
    def on_run_ended(message: RunEnded, entry: Entry) -> Iterable[Message]:
        handled.append(message.step)
        return [CheckpointRequest(request_id=7, emergency=False, reason="")]  # type: ignore[arg-type]

    handled: list[int] = []
    publish(memory_bus, 1, 2)
    node = Node(memory_bus, handlers={RunEnded: on_run_ended})
    node.service.start(STREAM_START)
    node.settle()
    assert handled == [1, 2]
    assert [letter.entry_id for letter in dead_letters(memory_bus)] == ["1-1", "1-2"]


def test_notes_go_where_the_node_sends_its_notes(memory_bus: MemoryBus) -> None:
    notes: list[Message] = []
    publish(memory_bus, 1, 2)
    node = Node(memory_bus, put_note=notes.append)
    node.failing = {1: 5}
    node.service.start(STREAM_START)
    node.settle()
    assert [type(note) for note in notes] == [DeadLetter]
    assert memory_bus.length(notes_of(MONITOR)) == 0
    assert requested(memory_bus) == [2]


def test_orders_are_not_notes(memory_bus: MemoryBus) -> None:
    notes: list[Message] = []
    node = Node(
        memory_bus,
        put_note=notes.append,
        handlers={
            RunEnded: lambda message, entry: [
                MemoryOrder(order_id="1", action=MemoryAction.CLEANUP, reason="")
            ]
        },
    )
    publish(memory_bus, 1)
    node.service.start(STREAM_START)
    node.settle()
    assert notes == []
    assert published(memory_bus, ORDERS) == [
        MemoryOrder(order_id="1", action=MemoryAction.CLEANUP, reason="")
    ]
