"""The reader of a run: what is damaged on the server is left out, counted and said, but not for ever."""

from __future__ import annotations

from typing import Any

import pytest

from common.bus import DAMAGED, Entry, EntryId
from common.clock import FakeClock
from common.codec import encode
from common.memory_bus import MemoryBus, MemoryServer
from common.streams import HISTORY
from monitor_node.run_reader import RunReader, new_view
from monitor_node.run_view import AlertRow
from monitor_node.snapshot import as_dict
from tests.monitor import fake_run as fake


def read(damaged: set[int], steps: int) -> tuple[dict[str, Any], list[AlertRow]]:
    """The snapshot of a run whose history holds some damaged entries, and the alerts that were told."""
    bus, clock, told = MemoryBus(MemoryServer(), "run"), FakeClock(), list[AlertRow]()
    for step in range(1, steps + 1):
        message = fake.observation(step, 2.0)
        kind = DAMAGED if step in damaged else type(message).__name__
        bus.publish([Entry(HISTORY, EntryId(1, step), kind, encode(message), clock.unix())])
    view = new_view("run")
    reader = RunReader(bus, view, clock, tell=told.append)
    while not reader.caught_up:
        reader.read(block_seconds=0.0)
    return as_dict(view, now_seconds=0.0), told


def test_a_damaged_entry_is_left_out_counted_and_said() -> None:
    page, told = read({3}, steps=5)
    (row,) = (row for row in page["stream_health"] if row["stream"] == HISTORY)
    assert (row["damaged"], row["gaps"]) == (1, 0)
    assert [x for x, _ in page["series"]["train"]] == [1, 2, 4, 5]
    assert [alert["kind"] for alert in page["alerts"]] == ["damaged_entry"]
    assert "1-3" in page["alerts"][0]["text"]
    assert [row.alert.kind for row in told] == ["damaged_entry"], "the webhook did not get it"


def test_a_whole_stream_has_none() -> None:
    page, told = read(set(), steps=5)
    (row,) = (row for row in page["stream_health"] if row["stream"] == HISTORY)
    assert row["damaged"] == 0
    assert page["alerts"] == told == []


@pytest.mark.parametrize(("count", "alerts"), [(1, 1), (2, 2), (3, 2), (500, 9)])
def test_many_damaged_entries_do_not_fill_the_list_of_alerts(count: int, alerts: int) -> None:
    page, told = read(set(range(1, count + 1)), steps=count)
    assert page["stream_health"][0]["damaged"] == count
    assert len(told) == alerts
