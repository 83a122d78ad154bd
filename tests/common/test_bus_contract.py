"""What every Bus promises: in process, on fakeredis and on real servers. Groups: test_bus_groups.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.bus import STREAM_START, Bus, Entry, EntryId
from common.errors import Fenced
from common.streams import DECISIONS, HISTORY, ORDERS, STREAMS
from tests.servers import BusServer


def entry(sequence: int, *, generation: int = 1, stream: str = HISTORY) -> Entry:
    body = bytes(range(256)) + b"%d" % sequence
    return Entry(stream, EntryId(generation, sequence), "Observation", body, 1000.125 + sequence)


def entries(first: int, last: int, *, generation: int = 1, stream: str = HISTORY) -> list[Entry]:
    return [entry(sequence, generation=generation, stream=stream) for sequence in range(first, last + 1)]


def read(bus: Bus, after: EntryId = STREAM_START, *, stream: str = HISTORY) -> list[Entry]:
    return bus.read_after({stream: after}, max_count=10_000, block_seconds=0)


# Writing and following


def test_entries_come_back_whole_and_in_order(bus: Bus) -> None:
    bus.publish(entries(1, 3))
    bus.publish(entries(4, 5))
    assert read(bus) == entries(1, 5)
    assert read(bus, EntryId(1, 3)) == entries(4, 5)
    assert bus.length(HISTORY) == 5


def test_publishing_nothing_is_nothing(bus: Bus) -> None:
    bus.publish([])
    assert bus.length(HISTORY) == 0


def test_one_publish_serves_several_streams(bus: Bus) -> None:
    bus.publish([entry(1), entry(1, stream=ORDERS), entry(2)])
    assert read(bus) == entries(1, 2)
    assert read(bus, stream=ORDERS) == entries(1, 1, stream=ORDERS)


def test_publishing_again_changes_nothing(bus: Bus) -> None:
    bus.publish(entries(1, 3))
    bus.publish(entries(1, 3))
    bus.publish(entries(2, 2))
    assert read(bus) == entries(1, 3)


def test_retry_after_half_a_batch_adds_only_the_missing_half(bus: Bus) -> None:
    bus.publish(entries(1, 2))
    bus.publish(entries(1, 4))
    assert read(bus) == entries(1, 4)


def test_older_generation_is_fenced_and_leaves_nothing(bus: Bus) -> None:
    bus.publish(entries(1, 2, generation=1))
    bus.publish([entry(1, generation=2)])
    with pytest.raises(Fenced):
        bus.publish(entries(3, 4, generation=1))
    assert read(bus, EntryId(1, 2)) == [entry(1, generation=2)]


def test_retry_of_what_arrived_before_the_fence_is_fenced_too(bus: Bus) -> None:
    bus.publish(entries(1, 2, generation=1))
    bus.publish([entry(1, generation=2)])
    with pytest.raises(Fenced):
        bus.publish(entries(2, 2, generation=1))


def test_fence_survives_trimming_everything(bus: Bus) -> None:
    bus.publish([entry(1, generation=5)])
    bus.trim(HISTORY, below=EntryId(6, 0))
    assert bus.length(HISTORY) == 0
    with pytest.raises(Fenced):
        bus.publish([entry(9, generation=4)])
    bus.publish([entry(2, generation=5)])
    assert read(bus) == [entry(2, generation=5)]


def test_lost_sequence_shows_as_a_gap(bus: Bus) -> None:
    bus.publish([entry(1), entry(2), entry(5)])
    assert [found.id.sequence for found in read(bus)] == [1, 2, 5]


def test_max_count_is_per_stream_and_takes_the_oldest(bus: Bus) -> None:
    bus.publish(entries(1, 5) + entries(1, 5, stream=ORDERS))
    found = bus.read_after({HISTORY: STREAM_START, ORDERS: EntryId(1, 2)}, max_count=2, block_seconds=0)
    assert found == entries(1, 2) + entries(3, 4, stream=ORDERS)


def test_runs_do_not_see_each_other(bus: Bus, open_on_server: Callable[[str], Bus], run_id: str) -> None:
    bus.publish([entry(1)])
    other = open_on_server(run_id + "-other")
    assert read(other) == []
    assert other.last_id(HISTORY) == STREAM_START
    assert read(open_on_server(run_id)) == [entry(1)]


def test_newest_id_and_entry_of_a_stream(bus: Bus) -> None:
    assert bus.last_id(HISTORY) == STREAM_START
    assert bus.latest(HISTORY) is None
    assert bus.length(HISTORY) == 0
    bus.publish(entries(1, 3))
    assert bus.latest(HISTORY) == entry(3)
    assert bus.last_id(HISTORY) == EntryId(1, 3)


def test_trim_keeps_the_bound_and_the_newest_id(bus: Bus) -> None:
    bus.trim(HISTORY, below=EntryId(1, 1))
    bus.publish(entries(1, 5))
    bus.trim(HISTORY, below=EntryId(1, 4))
    assert read(bus) == entries(4, 5)
    bus.trim(HISTORY, below=EntryId(2, 0))
    assert bus.latest(HISTORY) is None
    assert bus.last_id(HISTORY) == EntryId(1, 5)


def test_fuse_bounds_a_stream_that_nobody_trims(bus: Bus) -> None:
    fuse_entries = STREAMS[ORDERS].fuse_entries
    for first in range(1, fuse_entries + 1001, 1000):
        bus.publish([Entry(ORDERS, EntryId(1, first + i), "PhaseVeto", b"x", 0.0) for i in range(1000)])
    assert fuse_entries <= bus.length(ORDERS) <= fuse_entries + 200  # whole nodes of 100 entries
    assert bus.last_id(ORDERS) == EntryId(1, fuse_entries + 1000)


# Waiting


@pytest.mark.timeout(20)
def test_blocked_reader_wakes_on_publish(bus: Bus, open_on_server: Callable[[str], Bus], run_id: str) -> None:
    reader = open_on_server(run_id)
    with ThreadPoolExecutor(1) as pool:
        positions = {HISTORY: STREAM_START, DECISIONS: STREAM_START}
        found = pool.submit(reader.read_after, positions, max_count=10, block_seconds=60)
        time.sleep(0.05)  # usually inside the block by now; the law holds either way
        bus.publish([entry(1, stream=DECISIONS)])
        assert found.result() == [entry(1, stream=DECISIONS)]


@pytest.mark.timeout(20)
def test_blocked_group_reader_wakes_on_publish(
    bus: Bus, bus_server: BusServer, open_on_server: Callable[[str], Bus], run_id: str
) -> None:
    if bus_server.name == "fakeredis":
        pytest.skip("fakeredis 2.40 never blocks in XREADGROUP with COUNT")
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    reader = open_on_server(run_id)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(
            reader.read_group,
            HISTORY, group="g", consumer="p", max_count=10, block_seconds=60, pending=False,
        )  # fmt: skip
        time.sleep(0.05)
        bus.publish([entry(1)])
        assert [delivery.entry for delivery in found.result()] == [entry(1)]


def test_wait_without_news_ends_empty(bus: Bus) -> None:
    assert bus.read_after({HISTORY: STREAM_START}, max_count=1, block_seconds=0.02) == []
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    found = bus.read_group(HISTORY, group="g", consumer="p", max_count=1, block_seconds=0.02, pending=False)
    assert found == []


# Generations


def test_generations_rise_and_respect_the_floor(bus: Bus, bus_server: BusServer) -> None:
    assert bus.next_generation("trainer", at_least=1) == 1
    assert bus.next_generation("trainer", at_least=1) == 2
    assert bus.next_generation("trainer", at_least=10) == 10
    assert bus.next_generation("trainer", at_least=3) == 11
    assert bus.next_generation("predictor", at_least=1) == 1
    bus_server.flush()
    assert bus.next_generation("trainer", at_least=12) == 12


def test_no_two_callers_get_one_generation(open_on_server: Callable[[str], Bus], run_id: str) -> None:
    buses = [open_on_server(run_id) for _ in range(4)]
    together = threading.Barrier(len(buses))

    def take(bus: Bus) -> list[int]:
        together.wait()
        return [bus.next_generation("trainer", at_least=5 + turn) for turn in range(25)]

    with ThreadPoolExecutor(len(buses)) as pool:
        taken = list(pool.map(take, buses))
    for own in taken:
        assert own == sorted(own)
        assert all(generation >= 5 + turn for turn, generation in enumerate(own))
    everything = [generation for own in taken for generation in own]
    assert len(set(everything)) == len(everything)
