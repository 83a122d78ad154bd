"""The last 64 steps and plain statistics of them. In plain Python: an array costs more than it saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import mul

LONG, SHORT = 64, 16
TINY = 1e-12
_OFFSETS: dict[int, tuple[float, ...]] = {}  # by count: positions about their middle


@dataclass(slots=True)
class Rolling:
    """The last LONG values, oldest first once unrolled."""

    values: list[float] = field(default_factory=list)

    def push(self, value: float) -> None:
        self.values.append(value)
        if len(self.values) > LONG:
            del self.values[0]

    def newest(self, count: int) -> list[float]:
        return self.values[-count:]


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Population deviation."""
    count = len(values)
    mean = sum(values) / count
    return mean, math.sqrt(sum([(value - mean) * (value - mean) for value in values]) / count)


def extreme(of: Callable[[list[float]], float], values: list[float]) -> float:
    """Least or greatest; NaN if one of them is, wherever it stands."""
    total = sum(values)
    return of(values) if total == total or not any(map(math.isnan, values)) else math.nan


def slope(values: list[float]) -> float:
    """Least-squares slope per step."""
    n = len(values)
    if n < 2:
        return 0.0
    middle = (n - 1) / 2
    offsets = _OFFSETS.get(n) or _OFFSETS.setdefault(n, tuple(x - middle for x in range(n)))
    return sum(map(mul, offsets, values)) / (n * (n * n - 1) / 12)


def exponential_averages(averages: list[float], value: float, steps: tuple[int, ...]) -> list[float]:
    """With one more value, of these spans; begun anew where one of them is not finite."""
    if not averages or not all(math.isfinite(a) for a in averages):
        return [value] * len(steps)
    return [a + (value - a) * 2 / (n + 1) for a, n in zip(averages, steps, strict=True)]


def per_second(per_step: float, seconds: list[float]) -> float:
    """Over the time of the same steps: also right where some of them had another batch."""
    return ratio(per_step * len(seconds), sum(seconds))


def ratio(value: float, base: float) -> float:
    """Zero where the base is."""
    return value / base if abs(base) > TINY else 0.0


def log10(value: float) -> float:
    """Of at least TINY; what is not finite stays as it is."""
    return math.log10(max(value, TINY)) if math.isfinite(value) else value
