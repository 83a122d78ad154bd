"""The outlook: silent about noise, jumps and full caches; near the truth about a leak."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor_node.peak_forecast import (
    BUCKET_SECONDS,
    MAX_BUCKETS,
    MIN_BUCKETS,
    REACH,
    PeakSeries,
    need_bytes,
    next_peak_bytes,
    seconds_until,
    seen,
    trend_of,
)
from tests.monitor.test_order_book import report

GIB = 1 << 30
RED = 14 * GIB


def watched(used_gib: Iterable[float], *, every_seconds: float = 1.0) -> tuple[PeakSeries, float]:
    series, now_seconds = PeakSeries(), 5000.0
    for use in used_gib:
        series = seen(series, int(use * GIB), at_seconds=now_seconds)
        now_seconds += every_seconds
    return series, now_seconds


def curve(use: Callable[[float], float], seconds: int, *, noise: float = 0.0, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [use(second) + rng.gauss(0.0, noise) for second in range(seconds)]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_leak_is_told_in_minutes(noise: float) -> None:
    leak = curve(lambda second: 10.0 + second * 2.0 / 900, 600, noise=noise)
    series, now_seconds = watched(leak)
    left_seconds = seconds_until(series, RED, now_seconds=now_seconds)
    assert left_seconds == pytest.approx(1200, rel=0.15)
    peak = next_peak_bytes(series)
    assert peak is not None
    assert peak / GIB == pytest.approx(10.0 + 610 * 2.0 / 900, abs=0.2)


def test_a_third_of_wild_values_does_not_move_the_slope() -> None:
    leak = curve(lambda second: 10.0 + second * 2.0 / 900, 600)
    wild = [use - 3.0 if second % 30 < 10 else use for second, use in enumerate(leak)]
    series, now_seconds = watched(wild)
    left_seconds = seconds_until(series, RED, now_seconds=now_seconds)
    assert left_seconds == pytest.approx(1200, rel=0.25)


@pytest.mark.parametrize(
    "use",
    [
        lambda second: 10.0,
        lambda second: 10.0 + (second > 300),  # an evaluation with a larger batch
        lambda second: 10.0 + 3.0 * (1 - math.exp(-second / 30)),  # a cache that has filled up
        lambda second: 10.0 + math.sin(second / 20),
        lambda second: 13.0 - second / 900,
        lambda second: 10.0 + second * 1e-5,  # hours away: not to be said from ten minutes
    ],
    ids=["flat", "jump", "full", "waves", "falling", "far"],
)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_without_a_rise_that_lasts_it_is_silent(use: Callable[[float], float], noise: float) -> None:
    for seconds in range(150, 900, 50):
        series, now_seconds = watched(curve(use, seconds, noise=noise))
        assert seconds_until(series, RED, now_seconds=now_seconds) is None, seconds


def test_noise_alone_is_hardly_ever_taken_for_a_rise() -> None:
    rng, alarms = random.Random(1), 0
    for _ in range(400):
        trend = trend_of([(n, int(rng.gauss(10.0, 0.3) * GIB)) for n in range(30)])
        assert trend is not None
        alarms += trend.bytes_per_second > 0.0
    assert alarms <= 2


def test_a_rise_that_has_ended_is_told_no_more() -> None:
    leak = curve(lambda second: 10.0 + min(second, 300) * 2.0 / 300, 600, noise=0.01)
    assert seconds_until(watched(leak[:300])[0], RED, now_seconds=5300.0) is not None
    series, now_seconds = watched(leak)
    assert seconds_until(series, RED, now_seconds=now_seconds) is None


def test_too_little_is_known_at_first() -> None:
    seconds = int(MIN_BUCKETS * BUCKET_SECONDS)
    leak = curve(lambda second: 10.0 + second / 100, 2 * seconds)
    assert seconds_until(watched(leak[: seconds - 10])[0], RED, now_seconds=5000.0) is None
    assert next_peak_bytes(PeakSeries()) is None


def test_at_the_threshold_the_level_speaks_and_the_outlook_is_silent() -> None:
    series, now_seconds = watched(curve(lambda second: 10.0 + second / 50, 300))
    assert seconds_until(series, RED, now_seconds=now_seconds) is None
    assert seconds_until(series, 17 * GIB, now_seconds=now_seconds) is not None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 200.0), st.integers(0, 1 << 36)), min_size=1, max_size=200))
def test_memory_is_bounded_and_the_reach_too(readings: list[tuple[float, int]]) -> None:
    series, now_seconds = PeakSeries(), 0.0
    for pause_seconds, num_bytes in readings:
        now_seconds += pause_seconds
        series = seen(series, num_bytes, at_seconds=now_seconds)
        assert len(series.buckets) <= MAX_BUCKETS
        left_seconds = seconds_until(series, 1 << 40, now_seconds=now_seconds)
        if left_seconds is not None:
            assert series.trend is not None
            assert left_seconds <= REACH * series.trend.seen_seconds
    assert next_peak_bytes(series) is not None


def test_a_peak_beyond_the_cache_counts_as_need() -> None:
    told = report()
    assert need_bytes(100, None) == need_bytes(100, told) == 100  # unknown is not zero
    full = told.__class__(**{
        **{name: getattr(told, name) for name in told.__slots__},
        "reserved_bytes": 50, "peak_bytes": 60, "inactive_split_bytes": 7,
    })  # fmt: skip
    assert need_bytes(100, full) == 117
