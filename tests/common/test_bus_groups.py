"""What every Bus promises about groups: in process, on fakeredis and on real servers."""

from __future__ import annotations

import pytest

from common.bus import STREAM_START, Bus, Entry, EntryId, GroupLost
from common.streams import HISTORY
from tests.faults import wait_until
from tests.servers import BusServer


def entries(first: int, last: int) -> list[Entry]:
    return [
        Entry(HISTORY, EntryId(1, sequence), "Observation", b"body of %d" % sequence, 1000.125)
        for sequence in range(first, last + 1)
    ]


def group_read(
    bus: Bus, *, consumer: str = "p", pending: bool = False, max_count: int = 1000
) -> list[tuple[int, int]]:
    """[(sequence, deliveries)] of the next read."""
    found = bus.read_group(
        HISTORY, group="g", consumer=consumer, max_count=max_count, block_seconds=0, pending=pending
    )
    return [(delivery.entry.id.sequence, delivery.deliveries) for delivery in found]


def claim(bus: Bus, *, consumer: str, idle_seconds: float, max_count: int = 1000) -> list[tuple[int, int]]:
    found = bus.claim(HISTORY, group="g", consumer=consumer, idle_seconds=idle_seconds, max_count=max_count)
    return [(delivery.entry.id.sequence, delivery.deliveries) for delivery in found]


def test_group_made_after_the_backlog_still_gets_it(bus: Bus) -> None:
    bus.publish(entries(1, 3))
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    assert group_read(bus) == [(1, 1), (2, 1), (3, 1)]


def test_group_starts_behind_the_given_id(bus: Bus) -> None:
    bus.publish(entries(1, 3))
    bus.ensure_group(HISTORY, "g", after=EntryId(1, 2))
    assert group_read(bus) == [(3, 1)]


def test_existing_group_is_kept(bus: Bus) -> None:
    bus.publish(entries(1, 2))
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    assert group_read(bus) == [(1, 1), (2, 1)]
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    assert group_read(bus) == []


def test_own_pending_entries_come_back_counted_until_acknowledged(bus: Bus) -> None:
    bus.publish(entries(1, 3))
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    assert group_read(bus) == [(1, 1), (2, 1), (3, 1)]
    bus.ack(HISTORY, "g", [EntryId(1, 2)])
    assert group_read(bus, pending=True) == [(1, 2), (3, 2)]
    assert group_read(bus, pending=True, max_count=1) == [(1, 3)]
    assert group_read(bus, pending=True, consumer="other") == []
    bus.ack(HISTORY, "g", [EntryId(1, 1), EntryId(1, 3), EntryId(7, 7)])
    assert group_read(bus, pending=True) == []


def test_entries_go_to_one_consumer_of_a_group_only(bus: Bus) -> None:
    bus.publish(entries(1, 4))
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    assert group_read(bus, consumer="a", max_count=3) == [(1, 1), (2, 1), (3, 1)]
    assert group_read(bus, consumer="b") == [(4, 1)]


def test_claim_takes_only_what_has_been_idle(bus: Bus) -> None:
    bus.publish(entries(1, 3))
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    group_read(bus, consumer="dead")
    bus.ack(HISTORY, "g", [EntryId(1, 1)])
    assert claim(bus, consumer="p", idle_seconds=60) == []
    wait_until(lambda: claim(bus, consumer="p", idle_seconds=0.03) == [(2, 2), (3, 2)])
    assert group_read(bus, pending=True, consumer="dead") == []
    assert group_read(bus, pending=True) == [(2, 3), (3, 3)]


def test_claim_pages_through_everything(bus: Bus) -> None:
    bus.publish(entries(1, 250))
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    group_read(bus, consumer="dead")
    assert claim(bus, consumer="p", idle_seconds=0, max_count=3) == [(1, 2), (2, 2), (3, 2)]
    claimed = claim(bus, consumer="q", idle_seconds=0)
    assert [sequence for sequence, _ in claimed] == list(range(1, 251))


def test_trimmed_pending_entries_vanish_from_rereads_and_claims(bus: Bus) -> None:
    bus.publish(entries(1, 6))
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    group_read(bus, consumer="p", max_count=3)
    group_read(bus, consumer="dead")
    bus.trim(HISTORY, below=EntryId(1, 3))
    assert group_read(bus, pending=True, max_count=1) == [(3, 2)]
    bus.trim(HISTORY, below=EntryId(1, 6))
    assert group_read(bus, pending=True) == []
    assert claim(bus, consumer="p", idle_seconds=0) == [(6, 2)]


def test_lost_group_is_told_and_can_be_made_again_from_any_id(bus: Bus, bus_server: BusServer) -> None:
    with pytest.raises(GroupLost):
        group_read(bus)
    bus.ensure_group(HISTORY, "g", after=STREAM_START)
    bus.publish(entries(1, 3))
    assert group_read(bus) == [(1, 1), (2, 1), (3, 1)]
    bus_server.flush()
    for pending in (False, True):
        with pytest.raises(GroupLost):
            group_read(bus, pending=pending)
    with pytest.raises(GroupLost):
        claim(bus, consumer="p", idle_seconds=0)
    bus.ack(HISTORY, "g", [EntryId(1, 1)])
    bus.ensure_group(HISTORY, "g", after=EntryId(1, 2))
    bus.publish(entries(3, 4))
    assert group_read(bus) == [(3, 1), (4, 1)]
