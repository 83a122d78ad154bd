"""The numbers behind every claim: ratios of paired runs, their interval, their test, and calibration. Pure.

All ratios are reference / arm on the same seed (common random numbers), so above 1 means faster than the
reference. Infinity is a value: an arm that missed has ratio 0; a reference that missed where the arm did
not gives infinity; where both missed there is nothing to compare, and the pair is counted, not used.
Nowhere does an infinity improve a finite figure: a median that would average a finite with an
infinite ratio takes the finite one, and one that would average a finite ratio with that of a miss is 0.

Sources: percentile bootstrap (Efron & Tibshirani 1993, chapter 13); exact sign test (Conover 1999, 3.4);
geometric mean over tasks as in AlgoPerf (arXiv 2306.07179).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_261_121  # any fixed number: the same results always give the same interval
NORMAL_80 = 1.2815515655446004  # half width of the central 80 % of a normal, in standard deviations
# The same for 10 %, 20 %, ... 90 %: where a calibration curve is read.
NORMAL_DECILES = (
    0.12566134685507402, 0.2533471031357997, 0.38532046640756773, 0.5244005127080407,
    0.6744897501960817, 0.8416212335729142, 1.0364333894937896, NORMAL_80, 1.6448536269514722,
)  # fmt: skip
MEANINGFUL_LOSS = 1.02  # a task on which an arm takes more than 2 % longer is a regression


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Two arms on their common seeds. `median` is NaN when no pair could be compared."""

    median: float
    low95: float
    high95: float
    pairs: int  # compared
    both_missed: int  # not compared: neither reached the target
    wins: int  # seeds on which the arm was strictly faster
    losses: int
    sign_p: float  # exact, two-sided; ties left out

    @property
    def ties(self) -> int:
        return self.pairs - self.wins - self.losses


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How often what happened lay within the forecast's interval; shares in [0, 1]."""

    points: int
    covered_80: float
    by_level: tuple[float, ...]  # within the central 10 %, 20 %, ... 90 %
    by_tenth: tuple[float, ...]  # within the central 80 %, per tenth of the run; NaN where it has no point


def time_median(times: Sequence[float]) -> float:
    """Median of costs; averaging with an infinite one is infinite. NaN for none."""
    return float(np.mean(_middle_pair(np.sort(np.asarray(times, dtype=float))))) if len(times) else math.nan


def ratio_median(ratios: Sequence[float]) -> float:
    """Median; a middle pair of which one is infinite, or 0 for a miss, counts as the lower. NaN for none."""
    if not len(ratios):
        return math.nan
    return float(_ratio_medians(np.asarray(ratios, dtype=float)[None, :])[0])


def bootstrap_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the median. One value says nothing: (0, inf). None: (NaN, NaN).

    The ends are order statistics rounded outwards, so that infinities need no arithmetic.
    """
    return bootstrap_interval_of_rows([[ratio] for ratio in ratios])


def bootstrap_interval_of_rows(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The same of the median over rows of equal length, of which whole ones are drawn."""
    count = len(rows)
    if count < 2:
        return (0.0, math.inf) if count else (math.nan, math.nan)
    picks_RN = np.random.default_rng(BOOTSTRAP_SEED).integers(0, count, size=(RESAMPLES, count))
    drawn_RM = np.asarray(rows, dtype=float)[picks_RN].reshape(RESAMPLES, -1)
    medians_R = np.sort(_ratio_medians(drawn_RM))
    low = math.floor(0.025 * (RESAMPLES - 1))
    high = math.ceil(0.975 * (RESAMPLES - 1))
    return float(medians_R[low]), float(medians_R[high])


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least this uneven, were each side equally likely. 1 for no data."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


def ratio_of(reference: Mapping[int, float], arm: Mapping[int, float]) -> Ratio:
    """From costs by seed (seconds or passes, infinite for a miss), on the seeds that both have."""
    ratios, wins, losses, both_missed = [], 0, 0, 0
    for seed in sorted(reference.keys() & arm.keys()):
        slow, fast = reference[seed], arm[seed]
        if math.isinf(slow) and math.isinf(fast):
            both_missed += 1
            continue
        ratios.append(0.0 if math.isinf(fast) else 1.0 if slow == fast else slow / fast)
        wins += fast < slow
        losses += fast > slow
    low, high = bootstrap_interval(ratios)
    return Ratio(
        median=ratio_median(ratios), low95=low, high95=high, pairs=len(ratios), both_missed=both_missed,
        wins=wins, losses=losses, sign_p=sign_test(wins, losses),
    )  # fmt: skip


def pooled_ratio_of(reference: Mapping[int, float], arms: Sequence[Mapping[int, float]]) -> Ratio:
    """Several arms as one: the median over arms and seeds. Seeds are what is drawn anew for the interval,
    each with all its arms: the arms of one seed are not independent of each other.

    Wins, losses and `pairs` count seeds, by the median over their arms. Left out is a seed that an arm lacks,
    or on which the reference and some arm both missed.
    """
    seeds = sorted(reference.keys() & set.intersection(*(set(arm) for arm in arms)))
    lost = [s for s in seeds if math.isinf(reference[s]) and any(math.isinf(arm[s]) for arm in arms)]
    rows = [
        [0.0 if math.isinf(arm[seed]) else reference[seed] / arm[seed] for arm in arms]
        for seed in seeds
        if seed not in lost
    ]
    middles = [ratio_median(row) for row in rows]
    wins, losses = sum(m > 1 for m in middles), sum(m < 1 for m in middles)
    low, high = bootstrap_interval_of_rows(rows)
    return Ratio(
        median=ratio_median([ratio for row in rows for ratio in row]), low95=low, high95=high,
        pairs=len(rows), both_missed=len(lost), wins=wins, losses=losses, sign_p=sign_test(wins, losses),
    )  # fmt: skip


def geometric_mean(ratios: Iterable[float]) -> float:
    """Over tasks; one task with ratio 0 makes it 0, whatever the others are. NaN for none."""
    ratios = list(ratios)
    if not ratios:
        return math.nan
    if min(ratios) <= 0:
        return 0.0
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def regressions(ratios: Iterable[float]) -> int:
    """Tasks on which the arm takes more than 2 % longer than the reference."""
    return sum(ratio < 1 / MEANINGFUL_LOSS for ratio in ratios)


def best_possible_coverage(seeds: int) -> float:
    """No interval of a median that rests on this many seeds covers more: 1 - 2 * 0.5^n (order statistics)."""
    return max(0.0, 1 - 2 * 0.5**seeds)


def calibration(runs: Sequence[Sequence[tuple[float, float, float]]]) -> Calibration | None:
    """From (forecast, spread, happened) in the order of each run; None without any forecast.

    A forecast that is not a number, or a loss that became one, counts as not covered.
    """
    points = [(i * 10 // len(run), *point) for run in runs for i, point in enumerate(run)]
    if not points:
        return None
    tenth_N, forecast_N, spread_N, happened_N = np.asarray(points, dtype=float).T
    with np.errstate(invalid="ignore"):  # infinite forecast of an infinite loss: NaN, so not covered
        miss_N = np.abs(happened_N - forecast_N)
    covered_80_N = miss_N <= NORMAL_80 * spread_N
    tenths = [covered_80_N[tenth_N == tenth] for tenth in range(10)]
    return Calibration(
        points=len(points),
        covered_80=float(covered_80_N.mean()),
        by_level=tuple(float((miss_N <= width * spread_N).mean()) for width in NORMAL_DECILES),
        by_tenth=tuple(float(tenth.mean()) if tenth.size else math.nan for tenth in tenths),
    )


def _middle_pair(sorted_N: np.ndarray) -> np.ndarray:
    count = sorted_N.shape[-1]
    return sorted_N[..., [(count - 1) // 2, count // 2]]


def _ratio_medians(ratios_RN: np.ndarray) -> np.ndarray:
    """(R, N) -> (R,)"""
    low_R, high_R = _middle_pair(np.sort(ratios_RN, axis=-1)).T
    is_infinite_R = (low_R == 0.0) | np.isinf(high_R)  # a time or the other: no mean of both is one
    return np.where(is_infinite_R | (high_R == low_R), low_R, (low_R + high_R) / 2)
