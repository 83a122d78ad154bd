"""Where the target is reached, and which runs of a race count for it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.race.synthetic_race import BASE_STEPS, READ_MID_RUN, SEEDS, TARGET, race_results, record, run
from trainer_node.race.crossing import (
    MISS,
    crossing_in_curve,
    crossing_over_lengths,
    final_loss_at_passes,
    loss_at,
)
from trainer_node.race.figures import race_figures
from trainer_node.race.run_result import RunResult

losses = st.floats(1.0, 3.0)


def ended(steps: int, loss: float, *, seconds_per_step: float = 0.1, diverged: bool = False) -> RunResult:
    return run("snoo", steps, 0, losses=[loss], seconds_per_step=seconds_per_step, diverged=diverged)


def test_a_crossing_lies_between_two_lengths_by_the_logarithm() -> None:
    crossing = crossing_over_lengths([ended(400, 1.9), ended(100, 2.1)], 2.0)
    assert crossing.steps == pytest.approx(200)
    assert crossing.passes == pytest.approx(600)
    assert crossing.seconds == crossing.trainer_seconds == pytest.approx(20)
    assert not crossing.at_most


def test_the_cost_of_a_step_is_that_of_the_neighbouring_runs() -> None:
    slow_start = [ended(100, 2.1, seconds_per_step=0.2), ended(400, 1.9, seconds_per_step=0.1)]
    assert crossing_over_lengths(slow_start, 2.0).seconds == pytest.approx(200 * 0.15)


def test_a_longer_run_that_ends_worse_does_not_undo_a_crossing() -> None:
    bumpy = [ended(100, 2.1), ended(200, 2.3), ended(400, 1.9), ended(800, 2.2)]
    smooth = [ended(200, 2.1), ended(400, 1.9)]
    assert crossing_over_lengths(bumpy, 2.0) == crossing_over_lengths(smooth, 2.0)


def test_beyond_the_longest_length_is_a_miss_and_at_the_shortest_it_is_at_most_that() -> None:
    assert crossing_over_lengths([ended(100, 2.2), ended(400, 2.001)], 2.0) == MISS
    assert crossing_over_lengths([], 2.0) == MISS
    first = crossing_over_lengths([ended(100, 1.9), ended(400, 1.8)], 2.0)
    assert (first.steps, first.at_most) == (100, True)


def test_a_diverged_run_is_a_miss_at_its_length() -> None:
    assert crossing_over_lengths([ended(100, 2.1), ended(400, 1.0, diverged=True)], 2.0) == MISS
    after = crossing_over_lengths([ended(100, 2.1, diverged=True), ended(400, 1.9)], 2.0)
    assert (after.steps, after.at_most) == (400, True)
    assert crossing_in_curve(run("snoo", 40, 0, losses=[1.0], diverged=True), 2.0, "raw") == MISS


@given(st.lists(losses, min_size=1, max_size=6), st.integers(0, 5), losses)
def test_a_worse_loss_never_brings_the_crossing_forward(ends: list[float], at: int, other: float) -> None:
    worse = [max(loss, other) if i == at else loss for i, loss in enumerate(ends)]

    def steps(found: list[float]) -> float:
        return crossing_over_lengths([ended(100 * 2**i, loss) for i, loss in enumerate(found)], 2.0).steps

    assert steps(worse) >= steps(ends) * (1 - 1e-12)


def test_a_curve_crosses_where_the_line_between_two_readings_does() -> None:
    curve = run("snoo", 40, 0, losses=[2.4, 2.2, 1.8, 2.5])
    crossing = crossing_in_curve(curve, 2.0, "raw")
    assert crossing.steps == pytest.approx(25)
    assert crossing.passes == pytest.approx(75)
    assert crossing.seconds == pytest.approx(2.5)
    assert crossing_in_curve(curve, 1.7, "raw") == MISS
    assert crossing_in_curve(curve, 2.4, "raw").at_most


def test_the_predictor_costs_time_unless_it_has_a_core_of_its_own() -> None:
    crossing = crossing_in_curve(run("ours", 40, 0, losses=[2.2, 1.8]), 2.0, "read")
    assert crossing.seconds == pytest.approx(1.05 * crossing.trainer_seconds)


def test_a_loss_that_became_no_number_is_no_crossing() -> None:
    assert crossing_in_curve(run("snoo", 40, 0, losses=[2.2, math.nan, 1.9]), 2.0, "raw").at_most


def test_quality_is_read_between_readings_and_nowhere_else() -> None:
    curve = run("snoo", 40, 0, losses=[2.4, 2.2, 1.8, 1.6])
    assert loss_at(curve, 25, "raw") == pytest.approx(2.0)
    assert loss_at(curve, 75, "raw", of="passes") == pytest.approx(2.0)
    assert math.isnan(loss_at(curve, 41, "raw"))
    assert final_loss_at_passes([ended(100, 2.2), ended(400, 1.8)], 600) == pytest.approx(2.0)
    assert math.isnan(final_loss_at_passes([ended(100, 2.2), ended(400, 1.8)], 1201))


def test_known_speeds_are_found_again() -> None:
    arms = ("adamw-decay-ema", "muon-decay", "snoo", "lookahead", "adamw-constant")
    figures = race_figures(record(arms), race_results(arms, noise=0.0), read_mid_run=READ_MID_RUN)
    for arm, speed in zip(arms, (1.0, 1.6, 1.02, 0.94, 0.55), strict=True):
        found = figures.arm(arm)
        assert found is not None
        assert found.ratio_passes.median == pytest.approx(speed, rel=0.01)
        assert not found.misses
    assert figures.missing == ()


def test_the_reading_is_chosen_once_for_an_arm() -> None:
    """Seed 0 would cross earlier as it is, the other two as handed out: the majority decides for all."""
    runs = []
    for seed, (raw, read) in enumerate([(1.5, 2.5), (2.5, 1.5), (2.5, 1.5)]):
        result = run("schedule-free", 1000, seed, losses=[2.6, 2.6])
        end = dataclasses.replace(result.final, loss=raw, read_loss=read)
        runs.append(dataclasses.replace(result, curve=(result.curve[0], end)))
    race = record(("schedule-free",), seeds=(0, 1, 2), target=2.0, reference_arm="schedule-free")
    (arm,) = race_figures(race, runs, read_mid_run=READ_MID_RUN).arms
    assert arm.reading == "read"
    assert [arm.crossings[seed].missed for seed in (0, 1, 2)] == [True, False, False]


def test_only_runs_of_this_race_count() -> None:
    race = record(("snoo",), seeds=(0, 1), reference_arm="snoo")
    own = [run("snoo", n, seed) for n in (300, 500) for seed in (0, 1)]
    one = run("snoo", 400, 0)
    strangers = [
        run("snoo", 400, 7),
        run("snoo", 400, 0, task="deep"),
        run("snoo", 300, 0, purpose="audit", losses=[1.0]),
        run("snoo", 400, 0, purpose="tune"),
        dataclasses.replace(one, key=dataclasses.replace(one.key, config=(("rate", 1),))),
    ]
    alone = race_figures(race, own, read_mid_run=READ_MID_RUN)
    assert race_figures(race, [*strangers, *own], read_mid_run=READ_MID_RUN).arms == alone.arms
    assert alone.arms[0].lengths == (300, 500)


def test_a_seed_without_a_run_is_missing_and_not_missed() -> None:
    arms = ("adamw-decay-ema", "snoo")
    results = race_results(arms)
    without = [r for r in results if (r.key.arm, r.key.seed) != ("snoo", 4)]
    figures = race_figures(record(arms), without, read_mid_run=READ_MID_RUN)
    snoo = figures.arm("snoo")
    assert snoo is not None
    assert (snoo.misses, snoo.ratio.pairs) == (0, len(SEEDS) - 1)
    assert f"snoo: {BASE_STEPS} steps, seed 4: no run yet" in figures.missing


def test_any_two_arms_are_compared_both_ways() -> None:
    arms = ("adamw-decay", "snoo", "ours")
    race = record(arms, reference_arm="adamw-decay")
    figures = race_figures(race, race_results(arms), read_mid_run=READ_MID_RUN)
    there, back = figures.pair("ours", "snoo"), figures.pair("snoo", "ours")
    assert there is not None
    assert back is not None
    assert (there.wins, there.losses, there.sign_p) == (back.losses, back.wins, back.sign_p)
    assert len(figures.pairs) == 6


def test_what_prediction_costs_is_in_the_quality_at_equal_passes() -> None:
    (ours,) = race_figures(
        record(("ours",), reference_arm="ours", target=TARGET),
        race_results(("ours",)),
        read_mid_run=READ_MID_RUN,
    ).arms
    assert ours.final_quality_equal_passes_median > ours.final_quality_median


def test_equal_passes_are_those_of_the_task_s_own_micro_batches() -> None:
    """With four of them a step costs four times as much in every arm: losses at equal cost stay the same."""

    def four_times(result: RunResult) -> RunResult:
        curve = tuple(dataclasses.replace(point, passes=4 * point.passes) for point in result.curve)
        return dataclasses.replace(result, curve=curve)

    arms = ("adamw-decay", "ours")
    race, results = record(arms, reference_arm="adamw-decay"), race_results(arms)
    one = race_figures(race, results, read_mid_run=READ_MID_RUN)
    four = race_figures(race, map(four_times, results), read_mid_run=READ_MID_RUN)
    for name in arms:
        before, after = one.arm(name), four.arm(name)
        assert before is not None
        assert after is not None
        assert not math.isnan(before.final_quality_equal_passes_median)
        assert after.final_quality_equal_passes_median == pytest.approx(
            before.final_quality_equal_passes_median
        )
