"""The residual corrector: finds what is alike, removes a bias that is there, leaves alone what is noise."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from common.messages import Outcome, Verdict
from predictor_node.residuals import (
    CAPACITY,
    MAX_CORRECTION_SHARE,
    MAX_SCALE,
    MIN_SCALE,
    TOP,
    Residuals,
    scale_of,
)
from tests.predictor.test_reward import outcome
from trainer_node.correct import correction_of

D = 6
QUICK = settings(deadline=None, max_examples=100)
CONTEXT = [1.0, 0.5, -0.5, 2.0, 0.0, 1.0]


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def errors_with_and_without(
    *, bias: float, noise: float, level: float = 2.0, count: int = 600, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Two kinds of situation, biased by +bias and -bias; relative errors (without, with) of each forecast."""
    rng, residuals = np.random.default_rng(seed), Residuals(D)
    centres = rng.normal(0.0, 1.0, size=(2, D))
    without, corrected = [], []
    for step in range(0, 16 * count, 16):
        kind = int(rng.integers(2))
        context = centres[kind] + rng.normal(0.0, 0.15, size=D)
        forecast = level * (1.0 + 0.1 * rng.random())
        happened = forecast * (1.0 + bias * (1 - 2 * kind) + noise * rng.normal())
        advice = residuals.advise(context, step=step, forecast=forecast)
        without.append((happened - forecast) / forecast)
        corrected.append((happened - advice.loss) / forecast)
        residuals.add(context, step=step, forecast=forecast, happened=happened)
    return without, corrected


@pytest.mark.parametrize("level", [0.01, 2.0, 10.0, 60.0, 450.0])
def test_more_than_halves_the_error_where_forecasts_are_biased(level: float) -> None:
    """Also at the losses where the original's corrector had the wrong sign (10) or was NaN (60, 450)."""
    without, corrected = errors_with_and_without(bias=0.06, noise=0.02, level=level)
    assert all(map(math.isfinite, corrected))
    assert rms(corrected[50:]) < 0.5 * rms(without[50:])


@pytest.mark.parametrize("seed", range(4))
def test_leaves_forecasts_without_structure_as_good_as_they_were(seed: int) -> None:
    without, corrected = errors_with_and_without(bias=0.0, noise=0.03, count=500, seed=seed)
    assert rms(corrected) < 1.01 * rms(without)


def test_a_raw_context_of_any_size_does_not_blow_up() -> None:
    residuals = Residuals(D)
    for step in range(30):
        size = 10.0 ** (step * 10)
        residuals.add([size, -size, 1.0, 0.0, size, 450.0], step=step, forecast=450.0, happened=430.0)
    advice = residuals.advise([1e300, -1.0, 0.0, 60.0, 1e-300, 450.0], step=30, forecast=450.0)
    assert math.isfinite(advice.loss)
    assert 450.0 * (1.0 - MAX_CORRECTION_SHARE) <= advice.loss <= 450.0


@QUICK
@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(-10.0, 10.0)), max_size=30),
    st.floats(-1e6, 1e6),
)
def test_advice_is_bounded_whatever_was_stored(entries, forecast) -> None:
    residuals = Residuals(D)
    for step, (stored, happened, scale) in enumerate(entries):
        residuals.add(CONTEXT, step=step, forecast=stored, happened=happened, coefficient_scale=scale)
    advice = residuals.advise(CONTEXT, step=len(entries), forecast=forecast)
    assert abs(advice.loss - forecast) <= MAX_CORRECTION_SHARE * abs(forecast) * (1 + 1e-9)
    assert MIN_SCALE <= advice.coefficient_scale <= MAX_SCALE


# Neighbours


def test_says_nothing_before_there_are_neighbours_or_where_none_is_alike() -> None:
    residuals = Residuals(D)
    assert residuals.advise(CONTEXT, step=0, forecast=2.0) == (2.0, 1.0, 0)
    for step in range(20):
        residuals.add(CONTEXT, step=step, forecast=2.0, happened=2.2)
    assert residuals.advise([-value for value in CONTEXT], step=20, forecast=2.0) == (2.0, 1.0, 0)
    alike = residuals.advise(CONTEXT, step=20, forecast=2.0)
    assert alike.loss == pytest.approx(2.18, abs=0.01)
    assert alike.neighbours == TOP


def test_takes_the_nearest_by_cosine() -> None:
    """Twins of the context are biased by +10 %, the many others by -10 %: only the twins speak."""
    rng, residuals = np.random.default_rng(0), Residuals(D)
    for step in range(200):
        if step % 20 == 0:
            residuals.add(CONTEXT, step=step, forecast=1.0, happened=1.1)
        else:
            residuals.add(rng.normal(size=D), step=step, forecast=1.0, happened=0.9)
    assert residuals.advise(CONTEXT, step=200, forecast=1.0).loss > 1.08


def test_the_newer_of_equal_neighbours_count_more_and_the_old_say_little() -> None:
    residuals = Residuals(D)
    for step, happened in ((0, 1.1), (0, 1.1), (0, 1.1), (2000, 1.2), (2000, 1.2), (2000, 1.2)):
        residuals.add(CONTEXT, step=step, forecast=1.0, happened=happened)
    assert residuals.advise(CONTEXT, step=2000, forecast=1.0).loss > 1.10
    assert abs(residuals.advise(CONTEXT, step=20_000, forecast=1.0).loss - 1.0) < 0.001


def test_what_is_the_opposite_of_this_situation_says_nothing() -> None:
    residuals = Residuals(D)
    for step in range(5):
        residuals.add(CONTEXT, step=step, forecast=1.0, happened=1.1)
    alone = residuals.advise(CONTEXT, step=10, forecast=1.0)
    for step in range(3):
        residuals.add([-value for value in CONTEXT], step=step, forecast=1.0, happened=0.7)
    assert residuals.advise(CONTEXT, step=10, forecast=1.0) == pytest.approx(alone)


def test_keeps_the_newest_and_no_more_than_it_says() -> None:
    residuals = Residuals(D)
    for step in range(CAPACITY):
        residuals.add(CONTEXT, step=step, forecast=1.0, happened=1.15)
    for step in range(CAPACITY, 2 * CAPACITY):
        residuals.add(CONTEXT, step=step, forecast=1.0, happened=0.95)
    assert len(residuals) == CAPACITY
    assert residuals.advise(CONTEXT, step=2 * CAPACITY, forecast=1.0).loss == pytest.approx(0.955, abs=0.005)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_without_change(bad: float) -> None:
    residuals = Residuals(D)
    before = json.dumps(residuals.state())
    assert not residuals.add([bad, *CONTEXT[1:]], step=0, forecast=1.0, happened=1.0)
    assert not residuals.add(CONTEXT, step=0, forecast=bad, happened=1.0)
    assert not residuals.add(CONTEXT, step=0, forecast=1.0, happened=bad)
    assert not residuals.add([0.0] * D, step=0, forecast=1.0, happened=1.0)  # like nothing
    assert json.dumps(residuals.state()) == before
    with pytest.raises(ValueError):
        residuals.add([1.0], step=0, forecast=1.0, happened=1.0)


def test_what_an_earlier_run_left_is_as_old_as_the_new_one() -> None:
    residuals = Residuals(D)
    for step in (50_000, 50_000, 50_000, 50_000):
        residuals.add(CONTEXT, step=step, forecast=1.0, happened=1.1)
    residuals.new_run()
    assert residuals.advise(CONTEXT, step=0, forecast=1.0).loss == pytest.approx(1.08, abs=0.001)
    assert residuals.advise(CONTEXT, step=2000, forecast=1.0).loss < 1.07


# Coefficient scale


def advised_scale(scales: list[float]) -> float:
    residuals = Residuals(D)
    for step, scale in enumerate(scales):
        residuals.add(CONTEXT, step=step, forecast=2.0, happened=2.0, coefficient_scale=scale)
    return residuals.advise(CONTEXT, step=len(scales), forecast=2.0).coefficient_scale


def test_jumps_that_were_always_too_long_are_proposed_shorter() -> None:
    assert advised_scale([0.7, 0.75, 0.7, 0.65] * 5) == pytest.approx(0.73, abs=0.02)
    assert advised_scale([0.1] * 20) == MIN_SCALE
    assert advised_scale([3.0] * 20) == MAX_SCALE


def test_scales_without_agreement_or_unknown_change_nothing() -> None:
    assert advised_scale([0.2, 1.8] * 10) == 1.0
    assert advised_scale([math.nan] * 20) == 1.0
    assert advised_scale([math.nan] * 8 + [0.5, 0.5]) == 1.0  # two are too few


def parabola(minimum: float, bend: float) -> Outcome:
    """loss(t) = bend * ((t - minimum)^2 - minimum^2) + 2; jumped to t = 1."""

    def loss(t: float) -> float:
        return bend * ((t - minimum) ** 2 - minimum**2) + 2.0

    slope = 2.0 * bend * (1.0 - minimum)
    return replace(outcome(), loss_before=loss(0.0), loss_after=loss(1.0), slope_after=slope)


@QUICK
@given(st.floats(-2.0, 3.0), st.floats(0.01, 10.0))
def test_finds_the_minimum_of_a_parabola_within_what_a_correction_may_do(minimum, bend) -> None:
    within = min(max(minimum, 0.0), MAX_SCALE)
    assert scale_of(parabola(minimum, bend), correction_share=0.0) == pytest.approx(within, abs=1e-6)


@QUICK
@given(st.floats(-2.0, 3.0), st.floats(0.1, 10.0), st.sampled_from([0.2, 0.5, 1.0]))
def test_says_the_same_of_a_jump_whether_the_trainer_corrected_it_or_not(minimum, bend, share) -> None:
    plain = parabola(minimum, bend)
    made = correction_of(
        loss_before=plain.loss_before,
        loss_after=plain.loss_after,
        slope_after=plain.slope_after,
        share=share,
    )
    corrected = replace(plain, correction=made)
    assert scale_of(corrected, correction_share=share) == pytest.approx(
        scale_of(plain, correction_share=0.0), abs=1e-6
    )


def test_a_correction_that_was_made_says_how_far_the_whole_one_was() -> None:
    made = replace(outcome(), correction=-0.2)
    assert scale_of(made, correction_share=0.5) == pytest.approx(0.6)


def test_a_curve_without_a_minimum_or_a_slope_says_nothing() -> None:
    assert math.isnan(scale_of(parabola(0.5, -1.0), correction_share=0.0))
    assert math.isnan(scale_of(outcome(Verdict.RUINED), correction_share=0.5))


# State


@pytest.mark.parametrize("count", [0, 5, CAPACITY + 7])
def test_goes_on_after_a_restart_with_the_same_bits(count: int) -> None:
    rng = np.random.default_rng(1)
    unbroken, restored = Residuals(D), Residuals(D)
    for step in range(count):
        unbroken.add(rng.normal(size=D), step=step, forecast=2.0, happened=2.0 + rng.normal())
    restored.load(json.loads(json.dumps(unbroken.state())))
    for step in range(count, count + 30):
        context = rng.normal(size=D)
        assert restored.advise(context, step=step, forecast=2.0) == unbroken.advise(
            context, step=step, forecast=2.0
        )
        for residuals in (unbroken, restored):
            residuals.add(context, step=step, forecast=2.0, happened=1.9, coefficient_scale=0.8)
    assert restored.state() == unbroken.state()


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    residuals = Residuals(D)
    residuals.add(CONTEXT, step=0, forecast=2.0, happened=2.1)
    before = residuals.state()
    for damaged in ({}, Residuals(D + 1).state(), {**before, "count": 3}):
        with pytest.raises(CheckpointError):
            residuals.load(damaged)
    assert residuals.state() == before
