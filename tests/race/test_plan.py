"""The plan of a race: same plan, same runs; equal effort for all arms; a stop anywhere changes nothing."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence

import pytest

from common.config import load_settings
from common.errors import SettingsError
from tests.race.fake_race import fake_result
from trainer_node.race.arms import ARMS
from trainer_node.race.crossing_search import Found, Missed
from trainer_node.race.plan import TUNING_SEED, RacePlan, chosen_arms
from trainer_node.race.run_result import RunKey, RunResult
from trainer_node.race.space import RANGES, Around, Between, OneOf, PowersOfTwo, trial_config
from trainer_node.race.waves import Standing

ARM_CHOICE = ("adamw-constant", "adamw-decay", "ours-fixed", "ours")
BASE = load_settings(preset="digits", overrides=["trainer.steps=200"])


def make_plan(
    arms: Sequence[str] = ARM_CHOICE,
    *,
    rule: str = "decayed",
    seeds: int = 3,
    trials: int = 2,
    noise: float = 0.0,
) -> RacePlan:
    return RacePlan(
        task="digits", rule=rule, base=BASE, arms=chosen_arms(rule, tuple(arms)),
        seeds=tuple(range(seeds)), trials=trials,
    )  # fmt: skip


def run_all(plan: RacePlan, results: dict[str, RunResult] | None = None) -> tuple[list[RunKey], Standing]:
    """The race in one go; (keys in the order of their runs, how it ended)."""
    results = {} if results is None else results
    order: list[RunKey] = []
    while (wave := Standing(plan, results).next_wave()) is not None:
        assert wave.keys
        for key in wave.keys:
            assert key.identity not in results
            results[key.identity] = fake_result(key)
            order.append(key)
    return order, Standing(plan, results)


def test_the_same_plan_makes_the_same_runs_in_the_same_order() -> None:
    assert run_all(make_plan())[0] == run_all(make_plan())[0]


@pytest.mark.parametrize("stop_after", [0, 1, 7, 20, 33])
def test_a_race_that_was_stopped_makes_the_same_runs_as_one_that_was_not(stop_after: int) -> None:
    whole, _ = run_all(make_plan())
    there = list(whole[:stop_after])
    random.Random(stop_after).shuffle(there)  # several workers: lines of the file are in any order
    again, _ = run_all(make_plan(), {key.identity: fake_result(key) for key in there})
    assert {key.identity for key in again} == {key.identity for key in whole[stop_after:]}


def test_a_finished_race_has_nothing_left_to_run() -> None:
    assert run_all(make_plan())[1].next_wave() is None


def test_a_plain_arm_gets_the_trials_that_a_wrapping_one_spends_on_its_own_settings() -> None:
    plan = make_plan(tuple(ARMS))
    spent = Counter(key.arm for key in run_all(plan)[0] if key.seed == TUNING_SEED)
    for name, arm in ARMS.items():
        due = plan.trials * (1 if arm.wraps else plan.levels) if arm.tuned else 0
        assert spent[name] == due, name


def test_a_wrapping_arm_differs_from_the_plain_one_only_in_its_own_settings() -> None:
    _, end = run_all(make_plan(trials=2))
    inner, mine = end.tuned(ARMS["adamw-decay"]), end.tuned(ARMS["ours"])
    assert inner is not None
    assert mine is not None
    assert set(inner) <= set(mine)


def test_the_last_wave_times_every_arm_seed_by_seed() -> None:
    plan = make_plan()
    order, _ = run_all(plan)
    timed = [key for key in order if key.purpose == "time"]
    assert order[-len(timed) :] == timed
    assert sorted({key.arm for key in timed}) == sorted(plan.arms)
    assert [key.seed for key in timed] == sorted(key.seed for key in timed)
    assert {key.planned_steps for key in timed} == {plan.base_steps}


def test_a_race_that_was_stopped_before_it_was_timed_is_not_finished() -> None:
    """Else its evidence would hold seconds of runs that were made beside others."""
    plan = make_plan()
    order, end = run_all(plan)
    assert not any(end.missing_of(ARMS[name]) for name in plan.arms)
    last = next(key for key in reversed(order) if key.arm == "ours")
    untimed = {key.identity: fake_result(key) for key in order if key != last}
    assert [name for name in plan.arms if Standing(plan, untimed).missing_of(ARMS[name])] == ["ours"]


def test_an_arm_that_came_later_is_timed_in_turns_with_those_that_were_there() -> None:
    """A machine is not the same from day to day: its seconds alone would be compared with old ones."""
    plan, later = make_plan(("adamw-decay", "ours-fixed")), make_plan(("adamw-decay", "ours-fixed", "ours"))
    results = {key.identity: fake_result(key) for key in run_all(plan)[0]}
    while (wave := Standing(later, results).next_wave()) is not None and wave.phase != "time":
        results |= {key.identity: fake_result(key) for key in wave.keys}
    assert wave is not None
    assert {(key.seed, key.arm) for key in wave.keys} == {(s, arm) for s in later.seeds for arm in later.arms}
    one_left = results | {key.identity: fake_result(key) for key in wave.keys if key.seed != 1}
    left = Standing(later, one_left).next_wave()
    assert left is not None
    assert {(key.seed, key.arm) for key in left.keys} == {(1, arm) for arm in later.arms}


def test_the_tuned_config_is_the_one_with_the_lowest_held_out_loss() -> None:
    plan = make_plan(trials=6)
    order, end = run_all(plan)
    tried = [k for k in order if k.arm == "adamw-decay" and k.seed == TUNING_SEED]
    best = min(tried, key=lambda key: fake_result(key).final.read_loss)
    assert len(tried) == 12
    assert end.tuned(ARMS["adamw-decay"]) == best.config


def test_race_seeds_are_never_tuned_on() -> None:
    for key in run_all(make_plan())[0]:
        assert (key.purpose == "tune") == (key.seed == TUNING_SEED)
        assert key.purpose == "tune" or key.seed in make_plan().seeds


def test_the_target_is_fixed_before_any_other_arm_runs_with_a_race_seed() -> None:
    order, end = run_all(make_plan())
    phases = [key.purpose for key in order]
    assert phases == sorted(phases, key=["tune", "target", "race", "time"].index)
    own = [fake_result(key) for key in order if key.purpose == "target"]
    assert {run.key.arm for run in own} == {"adamw-decay"}
    assert end.target() == statistics.median(run.final.read_loss for run in own)


def test_all_seeds_of_an_arm_are_run_at_every_length_and_every_arm_at_the_base_length() -> None:
    plan = make_plan()
    order, _ = run_all(plan)
    seeds_at: dict[tuple[str, int], set[int]] = {}
    for key in order:
        if key.purpose != "tune":
            seeds_at.setdefault((key.arm, key.planned_steps), set()).add(key.seed)
    assert all(seeds == set(plan.seeds) for seeds in seeds_at.values())
    assert {arm for arm, steps in seeds_at if steps == plan.base_steps} == set(plan.arms)


def test_no_arm_is_read_below_the_planned_length_where_another_is_not() -> None:
    """Else equal runs cross at different steps: one interpolated from below, one at its first reading."""
    plan = make_plan()
    order, _ = run_all(plan)
    shorter = {(k.arm, k.planned_steps) for k in order if k.planned_steps < plan.base_steps}
    near = [n for arm, n in shorter if arm == "adamw-decay" and n < 0.7 * plan.base_steps]
    checked = {arm for arm, steps in shorter if steps == max(near)}
    assert checked == {arm for arm in plan.arms if ARMS[arm].rule != "constant"}


def test_the_crossing_is_the_smallest_length_whose_mean_end_passes() -> None:
    plan = make_plan()
    _, end = run_all(plan)
    target = end.target()
    assert target is not None
    for name in ("adamw-decay", "ours-fixed", "ours"):
        config = end.tuned(ARMS[name])
        assert config is not None

        def passes(k: int, name: str = name, config: tuple = config) -> bool:
            steps = plan.lattice.steps(k)
            keys = [
                RunKey(task="digits", arm=name, config=config, planned_steps=steps, seed=seed, purpose="race")
                for seed in plan.seeds
            ]
            return statistics.fmean(fake_result(key).final.read_loss for key in keys) <= target

        found = end.crossing(ARMS[name])
        assert isinstance(found, Found)
        assert passes(found.k)
        assert not passes(found.k - 1)


def test_arms_of_constant_rate_run_once_at_the_longest_length() -> None:
    order, _ = run_all(make_plan())
    lengths = {key.planned_steps for key in order if key.arm == "adamw-constant" and key.purpose == "race"}
    assert lengths == {200, 500}


def test_runs_of_a_wave_go_seed_by_seed_through_the_arms() -> None:
    plan, results = make_plan(), {}
    while (wave := Standing(plan, results).next_wave()) is not None:
        seeds = [key.seed for key in wave.keys]
        assert seeds == sorted(seeds)
        results.update({key.identity: fake_result(key) for key in wave.keys})


def test_failed_runs_count_as_infinite_and_the_race_ends() -> None:
    plan = make_plan()
    results: dict[str, RunResult] = {}
    failed: set[str] = set()
    while (wave := Standing(plan, results, failed).next_wave()) is not None:
        for key in wave.keys:
            if key.arm == "ours" and key.purpose == "race":
                failed.add(key.identity)
            else:
                results[key.identity] = fake_result(key)
    end = Standing(plan, results, failed)
    assert end.crossing(ARMS["ours"]) == Missed()
    assert end.missing_of(ARMS["ours"])
    assert not end.missing_of(ARMS["ours-fixed"])


def test_more_seeds_or_trials_keep_the_runs_that_are_there() -> None:
    few = {key.identity for key in run_all(make_plan(trials=2))[0] if key.purpose == "tune"}
    many = {key.identity for key in run_all(make_plan(trials=3))[0] if key.purpose == "tune"}
    plain = {identity for identity in few if "/adamw-" in identity}
    assert plain < many


def test_the_target_of_the_constant_rule_comes_from_the_constant_arm() -> None:
    _, end = run_all(make_plan((), rule="constant"))
    reference = end.reference_arm()
    assert reference is not None
    assert reference.name == "adamw-constant"
    assert all(ARMS[name].rule == "constant" for name in end.plan.arms)


def test_a_race_without_a_plain_arm_is_given_one() -> None:
    assert chosen_arms("decayed", ("ours",)) == ("adamw-decay", "ours")
    assert chosen_arms("constant", ("ours-constant",)) == ("adamw-constant", "ours-constant")
    with pytest.raises(SettingsError, match="did you mean adamw-decay"):
        chosen_arms("decayed", ("adamw-decai",))
    with pytest.raises(SettingsError, match="rules: constant"):
        chosen_arms("nosuch", ())


@pytest.mark.parametrize("name", ARMS)
def test_trials_lie_in_the_space_and_trial_0_is_the_preset(name: str) -> None:
    arm = ARMS[name]
    first = dict(trial_config(arm, BASE, 0))
    assert set(first) == {*arm.tuned, *(key for key, _ in arm.off_by)}
    if not arm.tuned:
        assert {trial_config(arm, BASE, trial) for trial in range(8)} == {trial_config(arm, BASE, 0)}
        return
    assert first.get("trainer.optimizer.rate", BASE.trainer.optimizer.rate) == BASE.trainer.optimizer.rate
    assert len({trial_config(arm, BASE, trial) for trial in range(8)}) >= 3
    for trial in range(1, 9):
        for key, value in trial_config(arm, BASE, trial):
            match RANGES[key]:
                case Around(factor, low, high, centre_if_zero):
                    centre = first[key] or centre_if_zero
                    assert (
                        max(low, centre / factor) * 0.9 - 1
                        <= value
                        <= min(high, centre * factor) * 1.001 + 0.5
                    )
                case Between(low, high):
                    assert low * 0.999 <= value <= high * 1.001
                case OneOf(words):
                    assert value in words
                case PowersOfTwo(low, high):
                    assert low <= value <= high
                    assert math.log2(value).is_integer()
            assert type(value) is type(first[key])
