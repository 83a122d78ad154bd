import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Verdict
from tests.references import line_forecast_of
from trainer_node.verify import (
    CHANGES_KEPT,
    GUARD_NOISE_SHARE,
    MIN_FIT_POINTS,
    GuardRecord,
    NoJumpForecast,
    forecast_without_jump,
    is_ruin,
    judge,
    line_forecast,
    ruin_bound,
)

LOSS = st.floats(-100, 100)
ANY = st.floats(allow_nan=True, allow_infinity=True)
QUICK = settings(deadline=None, max_examples=200)


def forecast(losses, *, horizon_steps, guard=None, loss_noise=0.0):
    return forecast_without_jump(
        losses, horizon_steps=horizon_steps, guard=guard or GuardRecord(), loss_noise=loss_noise
    )


@QUICK
@given(st.lists(st.floats(0.0, 10.0, width=16), min_size=MIN_FIT_POINTS, max_size=60), st.integers(1, 50))
def test_the_line_equals_numpys_fit_and_covariance(losses, horizon_steps):
    change, spread = line_forecast_of(losses, horizon_steps=horizon_steps)
    found = line_forecast(losses, horizon_steps=horizon_steps)
    assert found.change == pytest.approx(change, rel=1e-6, abs=1e-9)
    assert found.spread == pytest.approx(spread, rel=1e-6, abs=1e-9)


def test_a_straight_line_is_read_on_without_spread():
    found = forecast([5.0 - 0.25 * step for step in range(20)], horizon_steps=8)
    assert found.change == pytest.approx(-2.0)
    assert found.spread == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("count", range(MIN_FIT_POINTS))
def test_too_few_losses_give_no_change_and_an_unknown_spread(count):
    losses = [1.0] * count + [math.nan, math.inf]
    assert forecast(losses, horizon_steps=5) == NoJumpForecast(0.0, math.inf)


def test_non_finite_losses_are_left_out_of_the_fit():
    losses = [3.0, 2.9, 2.95, 2.7, 2.75, 2.6, 2.5, 2.45, 2.3]
    rotten = [math.nan, *losses[:4], math.inf, *losses[4:], -math.inf]
    assert forecast(rotten, horizon_steps=5) == forecast(losses, horizon_steps=5)


@QUICK
@given(LOSS, ANY, st.floats(0.01, 1.0), st.floats(0, 50))
def test_the_ruin_bound_is_never_below_loss_before_plus_six_noises(before, first, share, noise):
    bound = ruin_bound(loss_before=before, first_loss=first, ruin_share=share, noise=noise)
    assert bound >= before + 6 * noise
    assert not is_ruin(before + 6 * noise, bound=bound)


def test_the_ruin_bound_is_a_share_of_the_way_back_to_the_first_loss():
    assert ruin_bound(loss_before=2.0, first_loss=6.0, ruin_share=0.5, noise=0.1) == 4.0
    assert ruin_bound(loss_before=2.0, first_loss=6.0, ruin_share=0.1, noise=0.1) == pytest.approx(2.6)
    assert ruin_bound(loss_before=2.0, first_loss=1.0, ruin_share=0.5, noise=0.0) == 2.0


@QUICK
@given(ANY, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_non_finite_loss_is_always_a_ruin(bound, loss):
    assert is_ruin(loss, bound=bound)


@QUICK
@given(LOSS, LOSS)
def test_a_finite_loss_is_a_ruin_exactly_beyond_the_bound(loss, bound):
    assert is_ruin(loss, bound=bound) == (loss > bound)


def verdict_of(before, end, change, spread, tolerance):
    known = NoJumpForecast(change=change, spread=spread)
    return judge(loss_before=before, loss_end=end, forecast=known, tolerance=tolerance)


@QUICK
@given(LOSS, LOSS, st.floats(0, 10), st.floats(0, 5))
def test_a_perfect_prediction_is_accepted(before, change, spread, tolerance):
    assert verdict_of(before, before + change, change, spread, tolerance) is Verdict.ACCEPTED


@QUICK
@given(LOSS, LOSS, st.floats(0, 10), st.floats(0, 5), st.floats(1e-6, 100))
def test_an_end_beyond_the_tolerance_is_refused_and_within_it_accepted(before, change, spread, tolerance, by):
    limit = before + change + tolerance * spread
    assert verdict_of(before, limit + by, change, spread, tolerance) is Verdict.REFUSED
    assert verdict_of(before, limit - by, change, spread, tolerance) is Verdict.ACCEPTED


@QUICK
@given(ANY, st.sampled_from([math.nan, math.inf, -math.inf]), ANY, st.floats(0), st.floats(0))
def test_a_non_finite_end_is_always_refused(before, end, change, spread, tolerance):
    assert verdict_of(before, end, change, spread, tolerance) is Verdict.REFUSED


@QUICK
@given(LOSS, LOSS, st.sampled_from(["before", "change", "spread"]))
def test_an_unknown_in_the_forecast_is_never_taken_for_an_acceptance(before, end, unknown):
    values = {"before": before, "change": 0.0, "spread": 1.0, unknown: math.nan}
    assert verdict_of(end=end, tolerance=1.0, **values) is Verdict.REFUSED


def test_a_better_end_than_forecast_is_accepted_however_noisy_the_curve():
    random = np.random.default_rng(0)
    for noise in (0.0, 0.1, 3.0):
        losses = 4 - 0.02 * np.arange(32) + noise * random.normal(size=32)
        found = forecast(list(losses), horizon_steps=16)
        end = 3.4 + found.change - 0.01
        assert judge(loss_before=3.4, loss_end=end, forecast=found, tolerance=0.0) is Verdict.ACCEPTED


@QUICK
@given(st.lists(st.floats(0.0, 10.0, width=16), min_size=MIN_FIT_POINTS, max_size=60), st.integers(1, 50))
def test_a_trend_within_two_deviations_is_none_and_beyond_it_is_shrunk(losses, horizon_steps):
    line = line_forecast(losses, horizon_steps=horizon_steps)
    found = forecast(losses, horizon_steps=horizon_steps)
    assert abs(found.change) <= abs(line.change)
    assert found.change * line.change >= 0
    if abs(line.change) <= 2 * line.spread:
        assert found == NoJumpForecast(0.0, 0.0)


def test_the_spread_holds_the_guards_own_noise():
    losses = [5.0 - 0.25 * step for step in range(20)]
    assert forecast(losses, horizon_steps=8, loss_noise=0.3).spread == pytest.approx(GUARD_NOISE_SHARE * 0.3)


def test_a_flat_noisy_curve_takes_its_trend_from_the_guard():
    """Sixteen training losses say nothing; eight changes of the guard loss, all alike, say it all."""
    losses = [2.0, 2.6] * 8
    guard = GuardRecord(changes=[(16, -0.16)] * 8)
    assert forecast(losses, horizon_steps=16, guard=guard).change == pytest.approx(-0.16, rel=0.05)
    assert forecast(losses, horizon_steps=16).change == 0.0


@QUICK
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(-2, 2)), min_size=2, max_size=CHANGES_KEPT))
def test_the_trend_of_the_guard_equals_numpys_fit_through_the_origin(changes):
    steps, values = np.array(changes, dtype=float).T
    wanted, squares, *_ = np.linalg.lstsq(steps[:, None], values, rcond=None)
    slope, deviation, spread = GuardRecord(changes=changes).trend(0.5)
    assert slope == pytest.approx(wanted[0], abs=1e-9)
    rest = float(squares[0]) if len(squares) else 0.0
    prior = GUARD_NOISE_SHARE * 0.5
    assert spread == pytest.approx(math.sqrt((prior**2 + rest) / len(changes)), rel=1e-6)
    assert deviation == pytest.approx(spread / np.linalg.norm(steps), rel=1e-6)


def test_the_guards_noise_is_learned_from_steps_without_a_jump_only():
    record = GuardRecord()
    assert record.trend(0.1) == (0.0, math.inf, GUARD_NOISE_SHARE * 0.1)
    record.observe(10, 2.0, longest_steps=50)
    assert record.changes == []  # one loss is no change
    record.move_to(20, 1.5)  # a kept jump
    record.observe(30, 1.25, longest_steps=50)
    assert record.changes == [(10, -0.25)]
    record.observe(30, 1.4, longest_steps=50)  # no step was taken
    record.observe(90, 1.0, longest_steps=50)  # too many
    record.observe(95, math.nan, longest_steps=50)
    record.observe(99, 1.0, longest_steps=50)
    assert record.changes == [(10, -0.25)]


def test_old_changes_are_forgotten():
    record = GuardRecord()
    for step in range(40):
        record.observe(step, float(step * step), longest_steps=5)
    assert len(record.changes) == CHANGES_KEPT
    assert record.changes[-1] == (1, 39.0**2 - 38.0**2)
