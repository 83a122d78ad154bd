"""A day of watching: whoever comes back misses nothing, gets nothing twice, and the monitor does not grow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from monitor_node import feed as feed_module
from monitor_node.series import Curve, Strip
from monitor_node.snapshot import plain
from tests.monitor.long_watch import DAY_SECONDS, Day, watch

EVERY_SECONDS = 12.0  # 7,200 publishes a day
REMEMBERED_SECONDS = 600.0  # by the feed, as at its own pace of four revisions a second
GROWTH = 1.1  # of the largest size late in the day over the largest one early


class Source:
    """A snapshot in small: one curve that grows and is thinned, one that is cut now and then, a strip."""

    def __init__(self) -> None:
        self.train, self.held_out = Curve(max_buckets=24), Curve(max_buckets=24)
        self.phases = Strip(max_buckets=24)

    def snapshots(self) -> Iterator[dict[str, Any]]:
        step = 0
        while True:
            step += 1
            self.train.add(step, 2.0 + math.sin(step))
            self.phases.add(step, "full" if step // 400 % 5 else "warmup")
            if step % 16 == 0:
                self.held_out.add(step, 2.0 + math.cos(step))
            if step % 900 == 0:  # a rollback
                self.train.cut_above(step - 100)
                self.held_out.cut_above(step - 100)
            if step % 7 == 0:
                yield self._snapshot(step - step % 70)  # nothing in `run` is new: only the curves are
            else:
                yield self._snapshot(step)

    def _snapshot(self, step: int) -> dict[str, Any]:
        return {
            "checkpoint": None if step < 2000 else {"step": step // 2000},
            "run": {"words": f"Running: step {step}."},
            "series": {
                "train": plain(self.train.points()),
                "held_out": plain(self.held_out.points()),
                "phases": plain(self.phases.segments()),
            },
        }


def a_day(**options: Any) -> Day:
    source = Source()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_module, "_HISTORY_REVISIONS", int(REMEMBERED_SECONDS / EVERY_SECONDS))
        return watch(source.snapshots(), source, every_seconds=EVERY_SECONDS, **options)


@pytest.fixture(scope="module")
def day() -> Day:
    return a_day(viewers=4, restarts=24)


def test_a_viewer_that_comes_back_has_no_gap_and_no_duplicate(day: Day) -> None:
    assert day.publishes == DAY_SECONDS / EVERY_SECONDS
    assert day.reconnects > 200
    assert day.longest_away_seconds > 3 * REMEMBERED_SECONDS
    assert (day.gaps, day.duplicates) == (0, 0)


def test_only_a_first_visit_and_a_restarted_monitor_begin_from_nothing(day: Day) -> None:
    viewers, feeds = 4, day.restarts + 1
    assert day.restarts == 24
    assert viewers < day.whole <= viewers * feeds


def test_a_day_does_not_make_the_monitor_grow() -> None:
    day = a_day(viewers=1, restarts=0)
    assert day.revisions > 100 * REMEMBERED_SECONDS / EVERY_SECONDS
    quarter = len(day.held_bytes) // 4
    assert max(day.held_bytes[-quarter:]) <= GROWTH * max(day.held_bytes[:quarter])
    assert (day.gaps, day.duplicates) == (0, 0)
