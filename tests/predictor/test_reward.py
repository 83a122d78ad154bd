"""The reward: bounded, monotone in the loss and in every cost, and blind to the unit of the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Outcome, Verdict
from predictor_node.reward import UNDONE, cost_steps, gained_steps, reward_of
from tests.predictor.scripted import NAN

QUICK = settings(deadline=None, max_examples=150)
COSTS = (
    "waiting_seconds",
    "snapshot_seconds",
    "jump_seconds",
    "check_seconds",
    "restore_seconds",
    "lost_seconds",
)
LOSS = st.floats(0.01, 100.0)
SECONDS = st.floats(0.0, 100.0)
SLOPE = st.floats(-1.0, 1.0)
CYCLE = 32


def outcome(verdict: Verdict = Verdict.ACCEPTED, **changes: float) -> Outcome:
    """A jump without gain in lockstep: three checks of one pass each, steps of three."""
    base = Outcome(
        decision_id="100.0",
        verdict=verdict,
        base_step=100,
        attempt=0,
        horizon_steps=10,
        loss_before=2.16,  # falls by 0.01 a step without the jump
        loss_after=2.2,
        loss_end=2.0,
        loss_forecast=2.0,
        loss_spread=0.02,
        delta_norm=1.0,
        delta_cosine=NAN,
        probation_steps=16,
        lost_steps=0,
        passes=3.0,
        waiting_seconds=0.0,
        snapshot_seconds=0.0,
        jump_seconds=0.0,
        check_seconds=3.0,
        restore_seconds=0.0,
        lost_seconds=0.0,
        full_step_seconds=3.0,
    )
    return replace(base, **changes)


def reward(settled: Outcome, slope: float = 0.01) -> float:
    value = reward_of(settled, slope_nats=slope, cycle_steps=CYCLE)
    assert value is not None
    return value


def test_is_the_formula_of_its_docstring() -> None:
    settled = outcome(loss_end=1.92, snapshot_seconds=1.5)
    assert gained_steps(settled, slope_nats=0.01, cycle_steps=CYCLE) == pytest.approx(8.0)
    assert cost_steps(settled) == pytest.approx(1.5)
    assert reward(settled) == pytest.approx(math.tanh(6.5 / 32))


def test_a_small_reward_is_the_gain_in_progress_per_second() -> None:
    """8 steps for free in a cycle of 320: 2.5 % more progress in the time of a FULL-only cycle."""
    settled = outcome(loss_end=1.92, check_seconds=0.0)
    assert reward_of(settled, slope_nats=0.01, cycle_steps=320) == pytest.approx(0.025, rel=1e-3)


def test_a_jump_that_gains_nothing_loses_what_its_checks_cost() -> None:
    assert reward(outcome()) == pytest.approx(math.tanh(-1.0 / 32))
    assert reward(outcome()) < 0.0


@pytest.mark.parametrize("verdict", [Verdict.REFUSED, Verdict.RUINED])
def test_a_jump_that_was_undone_is_worth_minus_one(verdict: Verdict) -> None:
    assert reward(outcome(verdict, loss_end=0.1)) == UNDONE == -1.0
    assert reward(outcome(verdict, loss_end=NAN, full_step_seconds=0.0)) == UNDONE


@pytest.mark.parametrize("verdict", sorted(set(Verdict) - {Verdict.ACCEPTED, Verdict.REFUSED, Verdict.RUINED},
                                           key=lambda verdict: verdict.value))  # fmt: skip
def test_a_decision_that_was_not_tried_to_the_end_says_nothing(verdict: Verdict) -> None:
    assert reward_of(outcome(verdict), slope_nats=0.01, cycle_steps=CYCLE) is None
    assert gained_steps(outcome(verdict), slope_nats=0.01, cycle_steps=CYCLE) == 0.0


def test_progress_that_the_run_would_have_made_anyway_is_not_the_jumps() -> None:
    """The judge saw no significant trend, so its forecast is the loss before; the curve falls anyway."""
    settled = outcome(loss_before=2.16, loss_forecast=2.16, loss_end=2.0)
    assert gained_steps(settled, slope_nats=0.01, cycle_steps=CYCLE) == pytest.approx(0.0, abs=1e-9)
    assert reward(settled) < 0.0


@pytest.mark.parametrize("missing", ["loss_before", "loss_end", "loss_forecast", "loss_spread"])
def test_what_was_not_measured_says_nothing(missing: str) -> None:
    assert reward_of(outcome(**{missing: NAN}), slope_nats=0.01, cycle_steps=CYCLE) is None
    assert reward_of(outcome(full_step_seconds=0.0), slope_nats=0.01, cycle_steps=CYCLE) is None
    assert reward_of(outcome(), slope_nats=NAN, cycle_steps=CYCLE) is None


def test_a_forecast_that_knows_nothing_credits_nothing() -> None:
    assert reward(outcome(loss_end=1.0, loss_spread=math.inf)) == reward(outcome())


@QUICK
@given(LOSS, LOSS, LOSS, st.floats(0.0, 1.0), SLOPE, st.tuples(*[SECONDS] * 6))
def test_bounded_and_never_rises_with_the_final_loss(forecast, low, high, spread, slope, seconds) -> None:
    settled = outcome(loss_forecast=forecast, loss_spread=spread, **dict(zip(COSTS, seconds, strict=True)))
    better, worse = (reward(replace(settled, loss_end=loss), slope) for loss in sorted((low, high)))
    assert -1.0 <= worse <= better <= 1.0


@QUICK
@given(LOSS, LOSS, SLOPE, st.tuples(*[SECONDS] * 6), st.sampled_from(COSTS), SECONDS)
def test_never_rises_with_any_cost(forecast, end, slope, seconds, name, more) -> None:
    settled = outcome(loss_forecast=forecast, loss_end=end, **dict(zip(COSTS, seconds, strict=True)))
    dearer = replace(settled, **{name: getattr(settled, name) + more})
    assert reward(dearer, slope) <= reward(settled, slope)
    if abs(reward(settled, slope)) < 0.99 and more > 1.0:
        assert reward(dearer, slope) < reward(settled, slope)


@QUICK
@given(LOSS, LOSS, st.floats(0.0, 1.0), st.floats(-0.1, 0.1), st.sampled_from([2.0**-10, 8.0, 2.0**20]))
def test_the_unit_of_the_loss_does_not_matter(forecast, end, spread, slope, unit) -> None:
    settled = outcome(loss_forecast=forecast, loss_end=end, loss_spread=spread)
    scaled = replace(
        settled,
        loss_before=unit * settled.loss_before,
        loss_forecast=unit * forecast,
        loss_end=unit * end,
        loss_spread=unit * spread,
    )
    assert reward(scaled, unit * slope) == pytest.approx(reward(settled, slope), abs=1e-12)


@pytest.mark.parametrize("slope", [0.0, -0.01, 1e-12])
def test_a_plateau_does_not_blow_a_gain_up(slope: float) -> None:
    """Half a spread better, on a curve that is as good as flat: half a probation, not millions of steps."""
    settled = outcome(loss_end=1.99)
    assert gained_steps(settled, slope_nats=slope, cycle_steps=CYCLE) == pytest.approx(8.0)
    noiseless = outcome(loss_end=1.99, loss_spread=0.0)
    assert 0.0 < gained_steps(noiseless, slope_nats=slope, cycle_steps=CYCLE) < 1e6
    nothing = outcome(loss_forecast=0.0, loss_end=0.0, loss_spread=0.0)
    assert gained_steps(nothing, slope_nats=0.0, cycle_steps=CYCLE) == 0.0


def test_a_useless_jump_that_is_judged_by_noise_is_not_worth_its_while() -> None:
    """Also at the tail, where the slope drowns: kept when lucky, undone when not, on average below 0."""
    rng = np.random.default_rng(0)
    for slope in (0.01, 0.001, 0.0):
        rewards = []
        for noise in rng.normal(0.0, 0.02, size=2000):
            kept = noise <= 0.02  # tolerance of one spread
            verdict = Verdict.ACCEPTED if kept else Verdict.REFUSED
            rewards.append(reward(outcome(verdict, loss_end=2.0 + noise), slope))
        assert np.mean(rewards) < -0.05


def test_a_margin_makes_the_gain_a_lower_bound() -> None:
    settled = outcome(loss_end=1.92)
    bound = gained_steps(settled, slope_nats=0.01, cycle_steps=CYCLE, margin_spreads=1.0)
    assert bound == pytest.approx(6.0)


def test_lost_steps_are_a_cost() -> None:
    settled = outcome(Verdict.REFUSED, lost_steps=16, lost_seconds=48.0)
    assert cost_steps(settled) == pytest.approx(17.0)
