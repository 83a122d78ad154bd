"""Calibration: an 80 % interval covers 80 %, whatever was stated; trust never depends on the loss's unit."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from predictor_node.calibration import (
    COLD_CONFIDENCE,
    LEVEL,
    MIN_SCORES,
    NORMAL_FACTOR,
    WINDOW,
    Calibration,
    allowed_horizon_steps,
    bucket_of,
)

QUICK = settings(deadline=None, max_examples=150)
KEY = "9-16"


def seen(count: int, *, overconfidence: float = 1.0, seed: int = 0, unit: float = 1.0) -> Calibration:
    """After `count` forecasts of 2 nats whose errors are `overconfidence` times their stated spreads."""
    rng, calibration = random.Random(seed), Calibration()
    for _ in range(count):
        spread = rng.uniform(0.01, 0.1)
        happened = 2.0 + overconfidence * rng.gauss(0.0, spread)
        calibration.observe(KEY, forecast=2.0 * unit, spread=spread * unit, happened=happened * unit)
    return calibration


@pytest.mark.parametrize("overconfidence", [0.2, 1.0, 5.0])
def test_the_interval_covers_its_level_whatever_the_spreads_are_worth(overconfidence: float) -> None:
    calibration = seen(1000, overconfidence=overconfidence)
    assert calibration.factor(KEY) == pytest.approx(overconfidence * NORMAL_FACTOR, rel=0.15)
    rng, held = random.Random(9), 0
    for _ in range(2000):
        error = abs(overconfidence * rng.gauss(0.0, 0.05))
        held += error <= 0.05 * calibration.factor(KEY)
    assert 0.75 <= held / 2000 <= 0.85
    coverage = calibration.coverage(KEY)
    assert coverage is not None
    assert 0.7 <= coverage <= 0.9


def test_conformal_coverage_holds_for_small_samples_on_average() -> None:
    """Marginal coverage >= level is exact for any n and any distribution: here 12 heavy-tailed scores."""
    rng, held = random.Random(3), 0
    for _ in range(3000):
        calibration = Calibration()
        for _ in range(12):
            calibration.observe(KEY, forecast=0.0, spread=1.0, happened=rng.paretovariate(1.0))
        held += rng.paretovariate(1.0) <= calibration.factor(KEY)
    assert LEVEL - 0.02 <= held / 3000 <= LEVEL + 1 / 13 + 0.02


def test_follows_a_run_that_changes() -> None:
    calibration, rng = seen(1000, overconfidence=1.0), random.Random(4)
    for _ in range(WINDOW):
        calibration.observe(KEY, forecast=2.0, spread=0.05, happened=2.0 + 4.0 * rng.gauss(0.0, 0.05))
    assert calibration.count(KEY) == WINDOW
    assert calibration.factor(KEY) == pytest.approx(4.0 * NORMAL_FACTOR, rel=0.25)


def test_horizons_have_factors_of_their_own_and_a_new_one_borrows_from_all() -> None:
    calibration = seen(100, overconfidence=3.0)
    borrowed = calibration.factor("65+")
    assert borrowed == calibration.factor(KEY)
    for _ in range(MIN_SCORES):
        calibration.observe("65+", forecast=2.0, spread=0.1, happened=2.7)
    assert calibration.factor("65+") == pytest.approx(7.0)
    assert calibration.factor(KEY) == borrowed


def test_before_there_are_scores_the_spread_is_taken_for_a_normal_one() -> None:
    assert Calibration().factor(KEY) == NORMAL_FACTOR
    assert Calibration().coverage(KEY) is None
    assert seen(MIN_SCORES - 1, overconfidence=50.0).factor(KEY) == NORMAL_FACTOR


def test_coverage_is_judged_by_the_factor_of_the_time() -> None:
    """Not by one that has seen the score: a surprise counts as a miss."""
    calibration = Calibration()
    for _ in range(MIN_SCORES):
        calibration.observe(KEY, forecast=1.0, spread=0.1, happened=1.0)
    calibration.observe(KEY, forecast=1.0, spread=0.1, happened=2.0)
    assert calibration.coverage(KEY) == pytest.approx(MIN_SCORES / (MIN_SCORES + 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["forecast", "spread", "happened"])
def test_numbers_that_are_not_finite_are_refused_without_change(name: str, bad: float) -> None:
    calibration = seen(20)
    before = calibration.state()
    assert not calibration.observe(KEY, **{"forecast": 1.0, "spread": 0.1, "happened": 1.0, name: bad})
    assert not calibration.observe(KEY, forecast=1.0, spread=-0.1, happened=1.0)
    assert calibration.state() == before


def test_a_spread_of_zero_is_right_only_when_the_forecast_is() -> None:
    calibration = Calibration()
    calibration.observe(KEY, forecast=1.0, spread=0.0, happened=1.0)
    calibration.observe(KEY, forecast=1.0, spread=0.0, happened=1.1)
    assert calibration.coverage(KEY) == 0.5
    json.dumps(calibration.state(), allow_nan=False)


# Confidence


@pytest.mark.parametrize("unit", [2.0**-12, 2.0**9])
def test_confidence_does_not_depend_on_the_unit_of_the_loss(unit: float) -> None:
    """The original's could never trust a loss of 100, nor distrust one of 0.01 (hybrid.md, row 23)."""
    plain, scaled = seen(50), seen(50, unit=unit)
    assert scaled.factor(KEY) == plain.factor(KEY)
    assert scaled.confidence(KEY, forecast=2.0 * unit, spread=0.03 * unit) == pytest.approx(
        plain.confidence(KEY, forecast=2.0, spread=0.03), rel=1e-12
    )


@QUICK
@given(st.integers(0, 30), st.floats(-100.0, 100.0), st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_confidence_is_bounded_and_never_rises_with_the_spread(count, forecast, one, other) -> None:
    calibration, (narrow, wide) = seen(count), sorted((one, other))
    low = calibration.confidence(KEY, forecast=forecast, spread=wide)
    high = calibration.confidence(KEY, forecast=forecast, spread=narrow)
    assert 0.0 <= low <= high <= 1.0


def test_confidence_falls_when_forecasts_were_worse_than_they_said() -> None:
    honest, overconfident = seen(100), seen(100, overconfidence=4.0)
    assert overconfident.confidence(KEY, forecast=2.0, spread=0.03) < 0.5 * (
        honest.confidence(KEY, forecast=2.0, spread=0.03) + 0.1
    )


def test_a_perfect_record_of_perfect_forecasts_is_trusted_fully_once_it_is_long_enough() -> None:
    calibration = Calibration()
    assert calibration.confidence(KEY, forecast=2.0, spread=0.0) == COLD_CONFIDENCE
    for _ in range(MIN_SCORES):
        calibration.observe(KEY, forecast=2.0, spread=0.0, happened=2.0)
    assert calibration.confidence(KEY, forecast=2.0, spread=0.0) == 1.0


@pytest.mark.parametrize(("forecast", "spread"), [(math.nan, 0.1), (2.0, math.inf), (2.0, -0.1), (0.0, 0.1)])
def test_numbers_that_mean_nothing_earn_no_confidence(forecast: float, spread: float) -> None:
    assert seen(50).confidence(KEY, forecast=forecast, spread=spread) == 0.0


# Horizon


@QUICK
@given(
    st.integers(0, 500),
    st.floats(-0.5, 1.5),
    st.floats(-0.5, 1.5),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(0, 50),
)
def test_the_horizon_is_bounded_and_monotone(longest, one, other, few, many, shortest) -> None:
    (doubtful, sure), (few, many) = sorted((one, other)), sorted((few, many))

    def allowed(confidence: float, row: int) -> int:
        return allowed_horizon_steps(
            longest, confidence=confidence, proposals_in_a_row=row, min_steps=shortest
        )

    assert min(shortest, longest) <= allowed(doubtful, many) <= allowed(sure, many) <= longest
    assert allowed(sure, many) <= allowed(sure, few)


def test_the_horizon_has_the_originals_shape() -> None:
    assert allowed_horizon_steps(100, confidence=0.9, proposals_in_a_row=2) == 64  # 100 * 0.81 * 0.8
    assert allowed_horizon_steps(75, confidence=1.0, proposals_in_a_row=0) == 75
    assert allowed_horizon_steps(75, confidence=1.0, proposals_in_a_row=99) == 37
    assert allowed_horizon_steps(75, confidence=0.0, proposals_in_a_row=0) == 0
    assert allowed_horizon_steps(75, confidence=math.nan, proposals_in_a_row=0, min_steps=5) == 5


def test_buckets_part_the_usual_horizons() -> None:
    horizons = (0, 5, 10, 15, 25, 50, 75)
    assert [bucket_of(steps) for steps in horizons] == ["0", "1-8", "9-16", "9-16", "17-32", "33-64", "65+"]
    assert (bucket_of(8), bucket_of(64), bucket_of(10_000)) == ("1-8", "33-64", "65+")


# State


def test_goes_on_after_a_restart() -> None:
    calibration, restored = seen(300), Calibration()
    restored.load(json.loads(json.dumps(calibration.state())))
    for one in (calibration, restored):
        one.observe(KEY, forecast=1.0, spread=0.1, happened=1.3)
        one.observe("0", forecast=1.0, spread=0.1, happened=1.3)
    assert restored.state() == calibration.state()
    assert restored.factor(KEY) == calibration.factor(KEY)


@pytest.mark.parametrize(
    "kept", [{"scores": [1.0]}, {"scores": [-1.0], "hits": [1]}, [1.0], {"scores": "x", "hits": []}]
)
def test_a_damaged_state_is_refused_and_changes_nothing(kept: object) -> None:
    calibration = seen(20)
    before = calibration.state()
    with pytest.raises(CheckpointError):
        calibration.load({KEY: kept})
    assert calibration.state() == before
