"""Statistics of a short noisy series: its trend, how unusual a value is, whether it oscillates. Pure.

n values, equally spaced, oldest first. Small n is honest n: Student's t, not the normal distribution.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

MIN_POINTS = 4  # two for the line, two degrees of freedom for the spread


class Trend(NamedTuple):
    level: float  # of the fitted line at the newest value
    mean: float
    level_error: float  # one standard error of that level
    spread: float  # one standard deviation of a single value about the line
    freedom: int  # degrees of freedom of the spread


def fit_trend(values: Sequence[float]) -> Trend:
    """Ordinary least squares (Draper & Smith, Applied Regression Analysis, eq. 1.4.7).

    Raises ValueError for fewer than MIN_POINTS values.
    """
    n = len(values)
    if n < MIN_POINTS:
        raise ValueError(f"{n} values do not make a trend")
    mean_x, mean = (n - 1) / 2, sum(values) / n
    square_x = n * (n * n - 1) / 12
    places = _centred(n)
    slope = sum(map(mul, places, values)) / square_x
    residuals = [value - mean - slope * x for x, value in zip(places, values, strict=True)]
    spread = math.sqrt(sum(map(mul, residuals, residuals)) / (n - 2))
    return Trend(
        level=mean + slope * mean_x,
        mean=mean,
        level_error=spread * math.sqrt(1 / n + mean_x * mean_x / square_x),
        spread=spread,
        freedom=n - 2,
    )


def sigmas(t: float, freedom: int) -> float:
    """The normal deviate that is as unusual as Student's t (Wallace 1959, Ann. Math. Statist. 30, 1121)."""
    share = (8 * freedom + 1) / (8 * freedom + 3)
    return math.copysign(share * math.sqrt(freedom * math.log1p(t * t / freedom)), t)


def lag_one_correlation(values: Sequence[float]) -> float:
    """Of the deviations from the line through all values; -1 is a pure swing from step to step.

    White noise about a line has mean -1/n and standard deviation 1/sqrt(n); 0 for a constant.
    """
    n = len(values)
    mean = sum(values) / n
    places = _centred(n)
    slope = sum(map(mul, places, values)) * 12 / (n * (n * n - 1))
    deviations = [value - mean - slope * x for x, value in zip(places, values, strict=True)]
    total = sum([d * d for d in deviations])
    if total <= n * (1e-12 * abs(mean)) ** 2:
        return 0.0
    return float(sum([a * b for a, b in itertools.pairwise(deviations)]) / total)


@functools.lru_cache(maxsize=128)
def _centred(n: int) -> tuple[float, ...]:
    """0 to n - 1 less their mean."""
    return tuple(x - (n - 1) / 2 for x in range(n))
