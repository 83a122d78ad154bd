"""The statistics behind the divergence signals, against slow twins and known distributions."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor_node.trend import fit_trend, lag_one_correlation, sigmas

SERIES = st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=40)


@given(SERIES)
def test_the_trend_is_that_of_numpys_least_squares(values: list[float]) -> None:
    x = np.arange(len(values), dtype=float)
    slope, origin = np.polyfit(x, values, 1)
    residuals = np.asarray(values) - origin - slope * x
    trend = fit_trend(values)
    assert trend.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert trend.level == pytest.approx(origin + slope * x[-1], abs=1e-6)
    assert trend.spread == pytest.approx(math.sqrt(residuals @ residuals / (len(x) - 2)), abs=1e-6)


def test_the_error_of_the_level_is_what_repetition_shows() -> None:
    rng = random.Random(0)
    fits = [fit_trend([0.1 * x + rng.gauss(0, 1) for x in range(16)]) for _ in range(4000)]
    seen = statistics.pstdev([fit.level for fit in fits])
    assert seen == pytest.approx(statistics.fmean([fit.level_error for fit in fits]), rel=0.05)


@pytest.mark.parametrize(
    ("t", "freedom", "normal"), [(3.365, 5, 2.326), (2.750, 30, 2.576), (4.144, 10, 3.09)]
)
def test_a_small_sample_needs_a_larger_deviation(t: float, freedom: int, normal: float) -> None:
    """One-sided quantiles of Student's t from the tables, against the normal ones of the same share."""
    assert sigmas(t, freedom) == pytest.approx(normal, abs=0.02)
    assert sigmas(-t, freedom) == -sigmas(t, freedom)


@given(SERIES.filter(lambda values: statistics.pstdev(values) > 1e-3), st.floats(-5, 5), st.floats(-5, 5))
def test_correlation_knows_no_level_and_no_slope(values: list[float], level: float, slope: float) -> None:
    moved = [value + level + slope * x for x, value in enumerate(values)]
    if fit_trend(values).spread > 1e-3:
        assert lag_one_correlation(moved) == pytest.approx(lag_one_correlation(values), abs=1e-5)


def test_correlation_tells_a_swing_from_noise() -> None:
    rng = random.Random(1)
    swing = [3.0 + 0.2 * (-1) ** x for x in range(64)]
    assert lag_one_correlation(swing) < -0.95
    noise = [lag_one_correlation([rng.gauss(0, 1) for _ in range(64)]) for _ in range(2000)]
    assert abs(statistics.fmean(noise)) < 0.05
    assert statistics.pstdev(noise) == pytest.approx(1 / 8, rel=0.1)
    assert lag_one_correlation([2.0] * 64) == 0.0


def test_three_values_are_no_trend() -> None:
    with pytest.raises(ValueError, match="3 values"):
        fit_trend([1.0, 2.0, 3.0])
