"""Ratios, intervals and tests are what they claim to be, and a miss never helps the one who missed."""

from __future__ import annotations

import itertools
import math
import random
import statistics as standard

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_node.race.statistics import (
    BOOTSTRAP_SEED,
    NORMAL_80,
    NORMAL_DECILES,
    RESAMPLES,
    best_possible_coverage,
    bootstrap_interval,
    calibration,
    geometric_mean,
    ratio_median,
    ratio_of,
    regressions,
    sign_test,
    time_median,
)

times = st.floats(0.5, 500.0)
maybe_missed = st.one_of(times, st.just(math.inf))


def by_seed(costs: list[float]) -> dict[int, float]:
    return dict(enumerate(costs))


@pytest.mark.parametrize("count", [2, 3, 10, 60])
def test_the_interval_equals_that_of_a_slow_bootstrap_on_the_same_draws(count: int) -> None:
    dice = random.Random(count)
    ratios = [dice.uniform(0.8, 1.3) for _ in range(count)]
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, count, size=(RESAMPLES, count))
    medians = sorted(standard.median(ratios[i] for i in draw) for draw in draws.tolist())
    low, high = bootstrap_interval(ratios)
    assert low == pytest.approx(medians[249], rel=1e-12)  # floor(0.025 * 9999)
    assert high == pytest.approx(medians[9750], rel=1e-12)  # ceil(0.975 * 9999)
    assert min(ratios) <= low <= ratio_median(ratios) <= high <= max(ratios)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    dice, hits = random.Random(5), 0
    for _ in range(60):
        low, high = bootstrap_interval([math.exp(0.1 * dice.gauss(0, 1)) for _ in range(20)])
        hits += low <= 1 <= high
    assert 50 <= hits <= 60


def test_one_seed_says_nothing_about_the_interval() -> None:
    assert bootstrap_interval([1.4]) == (0.0, math.inf)
    assert all(map(math.isnan, bootstrap_interval([])))


@pytest.mark.parametrize(("wins", "losses"), list(itertools.product(range(7), repeat=2)))
def test_the_sign_test_counts_all_outcomes_of_fair_coins(wins: int, losses: int) -> None:
    count = wins + losses
    tosses = list(itertools.product((0, 1), repeat=count))
    as_uneven = [toss for toss in tosses if abs(2 * sum(toss) - count) >= abs(wins - losses)]
    assert sign_test(wins, losses) == pytest.approx(len(as_uneven) / len(tosses))


@given(st.lists(maybe_missed, min_size=1, max_size=12))
def test_an_arm_identical_to_the_reference_has_ratio_exactly_one(costs: list[float]) -> None:
    ratio = ratio_of(by_seed(costs), by_seed(costs))
    assert ratio.both_missed == sum(map(math.isinf, costs))
    assert (ratio.wins, ratio.losses, ratio.sign_p) == (0, 0, 1.0)
    if ratio.pairs:
        assert ratio.median == 1.0
    if ratio.pairs > 1:
        assert (ratio.low95, ratio.high95) == (1.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(maybe_missed, maybe_missed), min_size=1, max_size=8), st.sampled_from([0.25, 8.0]))
def test_the_unit_of_time_does_not_matter(pairs: list[tuple[float, float]], unit: float) -> None:
    reference, arm = ([pair[i] for pair in pairs] for i in (0, 1))
    scaled = ratio_of(by_seed([c * unit for c in reference]), by_seed([c * unit for c in arm]))
    assert repr(scaled) == repr(ratio_of(by_seed(reference), by_seed(arm)))  # NaN equals NaN


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(times, times), min_size=1, max_size=8))
def test_twice_as_fast_an_arm_has_twice_the_ratio(pairs: list[tuple[float, float]]) -> None:
    reference, arm = ([pair[i] for pair in pairs] for i in (0, 1))
    once = ratio_of(by_seed(reference), by_seed(arm))
    twice = ratio_of(by_seed(reference), by_seed([cost / 2 for cost in arm]))
    assert (twice.median, twice.low95, twice.high95) == (2 * once.median, 2 * once.low95, 2 * once.high95)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(times, maybe_missed), min_size=2, max_size=9), st.data())
def test_missing_the_target_never_makes_an_arm_look_better(
    pairs: list[tuple[float, float]], data: st.DataObject
) -> None:
    reference, arm = ([pair[i] for pair in pairs] for i in (0, 1))
    missed = data.draw(st.integers(0, len(arm) - 1))
    with_miss = [math.inf if i == missed else cost for i, cost in enumerate(arm)]
    before = ratio_of(by_seed(reference), by_seed(arm))
    after = ratio_of(by_seed(reference), by_seed(with_miss))
    assert after.median <= before.median
    assert after.low95 <= before.low95
    assert after.high95 <= before.high95
    assert after.wins <= before.wins
    assert time_median(with_miss) >= time_median(arm)


def test_misses_are_zero_infinite_or_left_out() -> None:
    ratio = ratio_of({0: 10.0, 1: math.inf, 2: math.inf, 3: 8.0}, {0: math.inf, 1: 5.0, 2: math.inf, 4: 1.0})
    assert (ratio.pairs, ratio.both_missed, ratio.wins, ratio.losses) == (2, 1, 1, 1)
    assert ratio.median == 0.0  # of 0 and infinity: the finite one
    assert (ratio.low95, ratio.high95) == (0.0, math.inf)
    nothing = ratio_of({0: math.inf}, {0: math.inf})
    assert math.isnan(nothing.median)
    assert nothing.pairs == 0


def test_the_median_of_a_finite_and_an_infinite_ratio_is_the_finite_one() -> None:
    assert ratio_median([0.9, math.inf]) == 0.9
    assert ratio_median([0.9, math.inf, math.inf]) == math.inf
    assert time_median([0.9, math.inf]) == math.inf


def test_an_arm_that_missed_on_half_of_the_seeds_has_ratio_0_as_its_time_is_infinite() -> None:
    assert ratio_median([0.0, 3.0]) == 0.0
    half = ratio_of(dict.fromkeys(range(4), 10.0), {0: math.inf, 1: math.inf, 2: 2.0, 3: 2.0})
    assert (half.median, half.wins, half.losses) == (0.0, 2, 2)
    assert time_median([math.inf, math.inf, 2.0, 2.0]) == math.inf


def test_one_failed_task_brings_the_geometric_mean_to_zero() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([2.0, 0.0, math.inf]) == 0.0
    assert math.isnan(geometric_mean([]))


def test_more_than_two_percent_longer_is_a_regression() -> None:
    assert regressions([1 / 1.03, 1 / 1.01, 1.0, 1 / 1.02, 0.0]) == 2


@pytest.mark.parametrize("seeds", [2, 6])
def test_no_interval_within_the_data_covers_the_median_more_often(seeds: int) -> None:
    """It fails whenever all seeds lie on the same side of the true median."""
    one_sided = [draw for draw in itertools.product((0, 1), repeat=seeds) if len(set(draw)) == 1]
    assert best_possible_coverage(seeds) == pytest.approx(1 - len(one_sided) / 2**seeds)


def test_a_forecaster_that_knows_its_spread_is_calibrated_at_every_level() -> None:
    dice = random.Random(1)
    run = [(f, s, f + s * dice.gauss(0, 1)) for f, s in ((2.0, 0.1), (1.5, 0.4)) * 5000]
    found = calibration([run])
    assert found is not None
    assert found.points == 10_000
    assert found.covered_80 == pytest.approx(0.8, abs=0.02)
    assert found.by_level == pytest.approx([i / 10 for i in range(1, 10)], abs=0.02)
    assert found.by_tenth == pytest.approx([0.8] * 10, abs=0.05)


def test_the_levels_are_those_of_a_normal() -> None:
    normal = standard.NormalDist()
    assert [2 * normal.cdf(width) - 1 for width in NORMAL_DECILES] == pytest.approx(
        [i / 10 for i in range(1, 10)]
    )
    assert NORMAL_DECILES[7] == NORMAL_80


def test_a_forecast_that_is_no_number_counts_as_wrong() -> None:
    found = calibration([[(math.nan, 0.1, 1.0), (1.0, 0.1, math.inf), (math.inf, 1.0, math.inf)], []])
    assert found is not None
    assert (found.points, found.covered_80) == (3, 0.0)
    assert calibration([[], []]) is None


def test_calibration_is_told_by_the_tenth_of_each_run() -> None:
    early_wrong = [(0.0, 1.0, 9.0)] + [(0.0, 1.0, 0.0)] * 9
    found = calibration([early_wrong, early_wrong])
    assert found is not None
    assert found.by_tenth == (0.0, *[1.0] * 9)
