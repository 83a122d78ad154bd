"""Levels: rise at once, fall late, and never because a sensor was lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.settings import MonitorSettings
from monitor_node.thresholds import Level, LevelState, Limits, limits_of, next_level

TOTAL = 16_000
LIMITS = Limits(cleanup_bytes=12_000, emergency_bytes=14_000, leave_gap_bytes=480, dwell_seconds=5.0)
READINGS = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, TOTAL)), st.floats(0.0, 4.0)), min_size=1, max_size=60
)


def walk(readings: list[tuple[int | None, float]], state: LevelState | None = None) -> list[LevelState]:
    states, now_seconds = [state or LevelState()], 0.0
    for used_bytes, pause_seconds in readings:
        now_seconds += pause_seconds
        states.append(next_level(states[-1], used_bytes=used_bytes, limits=LIMITS, now_seconds=now_seconds))
    return states


def level_of(used_bytes: int) -> Level:
    return (
        Level.EMERGENCY if used_bytes >= 14_000 else Level.CLEANUP if used_bytes >= 12_000 else Level.NORMAL
    )


@given(READINGS)
def test_a_level_is_never_below_what_the_reading_reaches(readings: list[tuple[int | None, float]]) -> None:
    for (used_bytes, _), state in zip(readings, walk(readings)[1:], strict=True):
        assert used_bytes is None or state.level >= level_of(used_bytes)


@given(READINGS)
def test_a_level_falls_one_at_a_time_and_only_well_below_its_threshold(
    readings: list[tuple[int | None, float]],
) -> None:
    states = walk(readings)
    for (used_bytes, _), before, after in zip(readings, states, states[1:], strict=False):
        if after.level < before.level:
            entered = 14_000 if before.level is Level.EMERGENCY else 12_000
            assert used_bytes is not None
            assert used_bytes <= entered - 480
            assert after.level == before.level - 1


@given(READINGS)
def test_a_level_lasts_at_least_the_dwell_time(readings: list[tuple[int | None, float]]) -> None:
    states, now_seconds, entered_seconds = walk(readings), 0.0, 0.0
    for (_, pause_seconds), before, after in zip(readings, states, states[1:], strict=False):
        now_seconds += pause_seconds
        if after.level < before.level:
            assert now_seconds - entered_seconds >= 5.0 - 1e-9
        if after.level != before.level:
            entered_seconds = now_seconds


@given(READINGS, st.sampled_from(Level), st.integers(1, 20))
def test_unknown_readings_keep_the_level(
    readings: list[tuple[int | None, float]], level: Level, count: int
) -> None:
    before = walk(readings, LevelState(level=level))[-1]
    after = walk([(None, 100.0)] * count, before)[-1]
    assert after.level == before.level
    assert after.calm_since_seconds is None


def test_an_unknown_reading_restarts_the_dwell() -> None:
    script = [
        (13_000, 0.0),
        (1_000, 1.0),
        (1_000, 3.0),
        (None, 1.0),
        (1_000, 1.0),
        (1_000, 4.9),
        (1_000, 0.2),
    ]
    levels = [state.level for state in walk(script)[1:]]
    assert levels == [Level.CLEANUP] * 6 + [Level.NORMAL]


def test_flutter_around_a_threshold_changes_the_level_once() -> None:
    levels = [state.level for state in walk([(11_900 + 200 * (turn % 2), 1.0) for turn in range(40)])]
    assert sum(before is not after for before, after in itertools.pairwise(levels)) == 1


@pytest.mark.parametrize(
    ("entered", "used_bytes", "level"),
    [
        (13_000, 11_999, Level.CLEANUP),
        (13_000, 11_521, Level.CLEANUP),
        (13_000, 11_520, Level.NORMAL),
        (15_000, 13_521, Level.EMERGENCY),
        (15_000, 13_520, Level.CLEANUP),
    ],
)
def test_a_level_is_left_three_points_below_where_it_was_entered(
    entered: int, used_bytes: int, level: Level
) -> None:
    assert walk([(entered, 0.0), *[(used_bytes, 1.0)] * 100])[-1].level is level


def test_thresholds_are_shares_of_the_device_unless_given_in_bytes() -> None:
    shares = limits_of(MonitorSettings(), 16 << 30)
    assert shares is not None
    assert (shares.cleanup_bytes, shares.emergency_bytes) == (12 << 30, 14 << 30)
    assert shares.leave_gap_bytes >= 0.03 * (16 << 30)
    given_bytes = limits_of(MonitorSettings(cleanup_bytes=5, emergency_bytes=9), 100)
    assert given_bytes is not None
    assert (given_bytes.cleanup_bytes, given_bytes.emergency_bytes) == (5, 9)


@pytest.mark.parametrize("settings", [MonitorSettings(), MonitorSettings(cleanup_bytes=5)])
def test_a_share_of_an_unknown_total_is_no_threshold(settings: MonitorSettings) -> None:
    assert limits_of(settings, None) is None
    state = LevelState(level=Level.CLEANUP)
    assert next_level(state, used_bytes=7, limits=None, now_seconds=0.0).level is Level.CLEANUP
