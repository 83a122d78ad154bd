"""Levels: rise at once, fall late, and never because a sensor was lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.settings import MonitorSettings
from monitor_node.thresholds import Level, LevelState, Limits, card_of, limits_of, next_level

TOTAL = 16_000
GIB = 1 << 30
ENTER = {Level.NOTICE: 10_000, Level.CLEANUP: 12_000, Level.HIGH: 13_000, Level.EMERGENCY: 14_000}
LIMITS = Limits(
    notice_bytes=10_000,
    cleanup_bytes=12_000,
    high_bytes=13_000,
    emergency_bytes=14_000,
    leave_gap_bytes=480,
    dwell_seconds=5.0,
)
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
    return max((level for level, at in ENTER.items() if used_bytes >= at), default=Level.NORMAL)


@settings(deadline=None)
@given(READINGS)
def test_a_level_is_never_below_what_the_reading_reaches(readings: list[tuple[int | None, float]]) -> None:
    for (used_bytes, _), state in zip(readings, walk(readings)[1:], strict=True):
        assert used_bytes is None or state.level >= level_of(used_bytes)


@settings(deadline=None)
@given(READINGS)
def test_a_level_falls_one_at_a_time_and_only_well_below_its_threshold(
    readings: list[tuple[int | None, float]],
) -> None:
    states = walk(readings)
    for (used_bytes, _), before, after in zip(readings, states, states[1:], strict=False):
        if after.level < before.level:
            assert used_bytes is not None
            assert used_bytes <= ENTER[before.level] - 480
            assert after.level == before.level - 1


@settings(deadline=None)
@given(READINGS)
def test_a_level_lasts_at_least_the_dwell_time(readings: list[tuple[int | None, float]]) -> None:
    states, now_seconds, entered_seconds = walk(readings), 0.0, 0.0
    for (_, pause_seconds), before, after in zip(readings, states, states[1:], strict=False):
        now_seconds += pause_seconds
        if after.level < before.level:
            assert now_seconds - entered_seconds >= 5.0 - 1e-9
        if after.level != before.level:
            entered_seconds = now_seconds


@settings(deadline=None)
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
        (11_000, 0.0),
        (1_000, 1.0),
        (1_000, 3.0),
        (None, 1.0),
        (1_000, 1.0),
        (1_000, 4.9),
        (1_000, 0.2),
    ]
    levels = [state.level for state in walk(script)[1:]]
    assert levels == [Level.NOTICE] * 6 + [Level.NORMAL]


def test_flutter_around_a_threshold_changes_the_level_once() -> None:
    levels = [state.level for state in walk([(11_900 + 200 * (turn % 2), 1.0) for turn in range(40)])][1:]
    assert sum(before is not after for before, after in itertools.pairwise(levels)) == 1


def test_the_way_down_passes_every_level() -> None:
    levels = [state.level for state in walk([(15_000, 0.0), *[(0, 1.0)] * 40])[1:]]
    assert [level for level, _ in itertools.groupby(levels)] == sorted(Level, reverse=True)


@pytest.mark.parametrize(
    ("entered", "used_bytes", "level"),
    [
        (12_000, 11_521, Level.CLEANUP),
        (12_000, 11_520, Level.NOTICE),
        (13_500, 12_521, Level.HIGH),
        (13_500, 12_520, Level.CLEANUP),
        (15_000, 13_521, Level.EMERGENCY),
        (15_000, 13_520, Level.HIGH),
        (15_000, 9_520, Level.NORMAL),
    ],
)
def test_a_level_is_left_three_points_below_where_it_was_entered(
    entered: int, used_bytes: int, level: Level
) -> None:
    assert walk([(entered, 0.0), *[(used_bytes, 1.0)] * 100])[-1].level is level


@pytest.mark.parametrize(
    ("total_gib", "bytes_gib"),
    [
        (8, (5.0, 6.0, 6.5, 7.0)),
        (16, (10.0, 12.0, 13.0, 14.0)),
        (24, (17.0, 19.5, 20.75, 22.0)),
        (80, (61.0, 68.0, 71.5, 75.0)),
        (141, (111.0, 122.0, 127.5, 133.0)),
    ],
)
def test_thresholds_follow_the_size_of_the_card(total_gib: int, bytes_gib: tuple[float, ...]) -> None:
    limits = limits_of(MonitorSettings(), total_gib * GIB)
    assert limits is not None
    found = [limits.notice_bytes, limits.cleanup_bytes, limits.high_bytes, limits.emergency_bytes]
    assert [at / GIB for at in found] == pytest.approx(bytes_gib)
    assert limits.leave_gap_bytes >= 0.03 * total_gib * GIB


# As nvidia-smi lists them, MiB: RTX 3070, T4, RTX 4080, A10, RTX 4090, A100, H100, H200.
@pytest.mark.parametrize(
    ("total_mib", "total_gib"),
    [(8192, 8), (15360, 16), (16376, 16), (23028, 24), (24564, 24), (81251, 80), (81559, 80), (143771, 141)],
)
def test_a_card_is_known_by_the_total_that_it_reports(total_mib: int, total_gib: int) -> None:
    assert card_of(total_mib << 20).total_gib == total_gib


@settings(deadline=None)
@given(st.integers(0, 1 << 42), st.integers(0, 1 << 42))
def test_a_larger_device_has_higher_thresholds(one: int, other: int) -> None:
    small, large = (limits_of(MonitorSettings(), total) for total in sorted((one, other)))
    assert small is not None
    assert large is not None
    assert small.cleanup_bytes <= large.cleanup_bytes
    assert small.emergency_bytes <= large.emergency_bytes


SHARES = st.one_of(st.just(0.0), st.floats(0.01, 0.99))
SIZES = st.one_of(st.just(0), st.integers(1 << 20, 1 << 38))


@settings(deadline=None)
@given(SHARES, SHARES, SIZES, SIZES, st.integers(1 << 30, 1 << 38))
def test_what_a_user_sets_holds_and_levels_are_in_order(
    cleanup_share: float, emergency_share: float, cleanup_bytes: int, emergency_bytes: int, total_bytes: int
) -> None:
    chosen = MonitorSettings(
        cleanup_share=cleanup_share,
        emergency_share=emergency_share,
        cleanup_bytes=cleanup_bytes,
        emergency_bytes=emergency_bytes,
    )
    limits = limits_of(chosen, total_bytes)
    assert limits is not None
    wanted_cleanup = cleanup_bytes or int(cleanup_share * total_bytes)
    wanted_emergency = emergency_bytes or int(emergency_share * total_bytes)
    if wanted_emergency:
        assert limits.emergency_bytes == wanted_emergency
    if wanted_cleanup and not (wanted_emergency and wanted_cleanup >= wanted_emergency):
        assert limits.cleanup_bytes == wanted_cleanup
    entered = [limits.enter_bytes(level) for level in Level if level]
    assert entered == sorted(set(entered))
    assert all(0 < limits.leave_bytes(level) < limits.enter_bytes(level) for level in Level if level)


@pytest.mark.parametrize("settings", [MonitorSettings(), MonitorSettings(cleanup_bytes=5)])
def test_a_share_of_an_unknown_total_is_no_threshold(settings: MonitorSettings) -> None:
    assert limits_of(settings, None) is None
    state = LevelState(level=Level.CLEANUP)
    assert next_level(state, used_bytes=7, limits=None, now_seconds=0.0).level is Level.CLEANUP
