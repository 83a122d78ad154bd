"""Does prediction pay: what a jump is worth, what it costs, and that nothing is claimed too early."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import messages as m
from monitor_node.pace import (
    MAX_JUMPS,
    MIN_STEPS,
    WorthBook,
    pace_between,
    pace_rows,
    pace_section,
    whole_pace,
    worth_steps,
)
from tests.monitor import fake_run as fake
from tests.monitor.test_timing import book_of, told

V = m.Verdict


FALL = 0.01  # nats a step


def jump(step: int, *, gain: float, verdict: V = V.ACCEPTED, horizon_steps: int = 10) -> m.Outcome:
    """The loss ends `gain` below where the steps of the probation alone would have brought it."""
    outcome = fake.outcome(step, verdict, horizon_steps)
    return replace(outcome, loss_before=3.0, loss_end=3.0 - FALL * outcome.probation_steps - gain)


def test_a_jump_is_worth_the_steps_that_its_loss_is_ahead() -> None:
    assert worth_steps(jump(16, gain=0.05), FALL) == pytest.approx(5.0)
    assert worth_steps(jump(16, gain=0.0), FALL) == pytest.approx(0.0)  # kept, and no use
    assert worth_steps(jump(16, gain=-0.03), FALL) == pytest.approx(-3.0)
    assert worth_steps(jump(16, gain=0.05, verdict=V.REFUSED), FALL) == 0.0


@pytest.mark.parametrize("fall", [None, 0.0, -1.0, math.nan])
def test_where_ordinary_steps_bring_nothing_or_nobody_knows_a_jump_is_worth_nothing(
    fall: float | None,
) -> None:
    assert worth_steps(jump(16, gain=0.05), fall) == 0.0


@given(
    st.floats(), st.floats(), st.floats(), st.integers(0, 64), st.integers(0, 64), st.sampled_from(list(V))
)
def test_no_jump_is_worth_more_than_its_horizon(
    before: float, fall: float, end: float, horizon: int, probation: int, verdict: V
) -> None:
    outcome = replace(
        fake.outcome(16, verdict, horizon), loss_before=before, loss_end=end, probation_steps=probation
    )
    assert abs(worth_steps(outcome, fall)) <= horizon


def test_without_jumps_and_costs_the_pace_is_that_of_plain_training() -> None:
    pace = pace_between(told(0, 1.0), told(100, 12.0, steps=10.0, evaluation=1.0), WorthBook())
    assert pace is not None
    assert pace.progress_per_second == pytest.approx(pace.plain_progress_per_second) == pytest.approx(10.0)
    assert pace.saved_share == pytest.approx(0.0)


@pytest.mark.parametrize("purpose", ["verification", "snapshots", "jumps", "windows", "waiting"])
def test_every_cost_of_prediction_counts(purpose: str) -> None:
    newer = told(100, 11.0, steps=10.0, **{purpose: 1.0})
    pace = pace_between(told(0, 0.0), newer, WorthBook())
    assert pace is not None
    assert pace.saved_share == pytest.approx(1 - 11.0 / 10.0)


@pytest.mark.parametrize("purpose", ["evaluation", "checkpoints"])
def test_what_plain_training_pays_as_well_is_no_cost(purpose: str) -> None:
    pace = pace_between(told(0, 0.0), told(100, 11.0, steps=10.0, **{purpose: 1.0}), WorthBook())
    assert pace is not None
    assert pace.saved_share == pytest.approx(0.0)


def test_undone_steps_are_a_cost_and_worth_is_a_gain() -> None:
    worth = WorthBook()
    worth.add(jump(50, gain=0.10), FALL)
    lost = pace_between(told(0, 0.0), told(90, 10.0, steps=10.0, lost_steps=10), WorthBook())
    won = pace_between(told(0, 0.0), told(90, 10.0, steps=10.0, lost_steps=10), worth)
    assert lost is not None
    assert won is not None
    assert lost.saved_share == pytest.approx(1 - 100 / 90)
    assert won.saved_share == pytest.approx(0.0)  # ten steps lost, ten won


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (told(10, 1.0), told(10, 2.0)),
        (told(10, 1.0), told(5, 2.0)),
        (told(0, 1.0), told(10, 1.0)),
        (told(0, 0.0), told(10, 1.0, evaluation=1.0)),
        (told(0, 0.0), told(10, 1.0, waiting=5.0)),
    ],
)
def test_no_progress_or_no_time_gives_no_pace(older, newer) -> None:
    assert pace_between(older, newer, WorthBook()) is None


def test_there_is_no_word_before_enough_steps() -> None:
    start = told(0, 0.0)
    early = book_of(start, told(MIN_STEPS - 1, 10.0, steps=10.0))
    assert whole_pace(early, WorthBook()) is None
    assert pace_section(None)["saved_share"] is None
    assert str(MIN_STEPS) in pace_section(None)["because"]
    late = book_of(start, told(MIN_STEPS, 10.0, steps=10.0))
    section = pace_section(whole_pace(late, WorthBook()))
    assert section["progress_per_second"] == pytest.approx(6.4)
    assert section["saved_share"] == 0.0


def test_jumps_that_a_resume_undid_are_worth_nothing() -> None:
    worth = WorthBook()
    for step in (50, 80):
        worth.add(jump(step, gain=0.05), FALL)
    assert worth.before(81) == (pytest.approx(10.0), 20)
    worth.undo_from(60)
    assert worth.before(1000) == (pytest.approx(5.0), 10)


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(-0.2, 0.2)), max_size=30), st.integers(0, 1200))
def test_the_worth_of_all_jumps_below_a_step_is_their_sum(jumps: list[tuple[int, float]], step: int) -> None:
    worth, base_step, expected = WorthBook(), 0, 0.0
    for stride, gain in jumps:
        base_step += stride
        outcome = jump(base_step, gain=gain)
        worth.add(outcome, FALL)
        expected += worth_steps(outcome, FALL) if base_step < step else 0.0
    assert worth.before(step)[0] == pytest.approx(expected, abs=1e-9)


def test_a_long_run_keeps_the_whole_worth_in_bounded_memory() -> None:
    worth = WorthBook()
    for step in range(0, 16 * 5000, 16):
        worth.add(jump(step, gain=0.05), FALL)
        assert len(worth._upto) <= MAX_JUMPS
    assert worth.before(1 << 40) == (pytest.approx(5.0 * 5000), 10 * 5000)


def test_the_curve_has_a_row_for_every_account_that_shows_progress() -> None:
    book = book_of(*(told(10 * n, 2.0 * n + 0.1, steps=2.0 * n) for n in range(5)))
    rows = pace_rows(book, WorthBook())
    assert [row[0] for row in rows] == [10, 20, 30, 40]
    assert all(math.isfinite(value) for row in rows for value in row)
    assert rows[-1][1:] == pytest.approx((5.0, 5.0))


NUMBERS = st.floats(0.0, 1e12)
SAMPLES = st.lists(
    st.tuples(st.integers(0, 1 << 62), NUMBERS, NUMBERS, NUMBERS, st.integers(0, 1 << 39)), max_size=12
)


@given(SAMPLES, st.lists(st.tuples(st.integers(0, 1 << 62), st.floats(), st.floats()), max_size=6))
def test_whatever_a_trainer_tells_a_pace_is_a_number(
    samples: list[tuple[int, float, float, float, int]], jumps: list[tuple[int, float, float]]
) -> None:
    worth = WorthBook()
    for base_step, end, fall in jumps:
        worth.undo_from(base_step)
        worth.add(replace(fake.outcome(base_step, V.ACCEPTED, 10), loss_end=end), fall)
    book = book_of(
        *(
            told(step, total, steps=steps, waiting=waiting, lost_steps=lost)
            for step, total, steps, waiting, lost in samples
        )
    )
    for row in pace_rows(book, worth):
        assert all(math.isfinite(value) and value >= 0.0 for value in row)
    section = pace_section(whole_pace(book, worth))
    json.dumps(section, allow_nan=False)
