"""A run with another batch takes in the same tokens, of the same data, and pays in the same coin."""

from __future__ import annotations

import dataclasses

import pytest

from common.config import load_settings
from common.errors import SettingsError
from common.settings import BatchSettings
from trainer_node.race.arm_table import ARMS, BATCH_FACTOR
from trainer_node.race.arms import run_settings, with_settings
from trainer_node.race.batch_size import least_factor, scale_of, sized
from trainer_node.race.run_arm import run_arm
from trainer_node.race.run_result import RunKey, RunResult
from trainer_node.race.space import RANGES, PowersOfTwo, trial_config
from trainer_node.race.tasks import CPU_TASKS, NEEDS_DATA, race_settings

SWEPT = ARMS["adamw-swept"]
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TASKS = [race_settings(task, "book.txt" if task in NEEDS_DATA else "") for task in CPU_TASKS]
TINY = load_settings(
    preset="race-digits",
    overrides=["trainer.steps=16", "trainer.model.channels=4", "trainer.schedule.warmup_steps=4"],
)


@pytest.mark.parametrize("base", TASKS, ids=CPU_TASKS)
@pytest.mark.parametrize("factor", FACTORS)
def test_a_sweep_over_the_batch_keeps_the_tokens_equal(base, factor: float) -> None:
    for steps in (base.trainer.steps, round(0.7 * base.trainer.steps)):
        trainer = run_settings(SWEPT, base, ((BATCH_FACTOR, factor),), steps=steps, seed=0).trainer
        items = trainer.batch.sequences * trainer.batch.accumulation
        of_task = base.trainer.batch.sequences * base.trainer.batch.accumulation
        assert items == factor * of_task
        assert abs(trainer.steps * items - steps * of_task) <= items / 2
        warm = trainer.schedule.warmup_steps * factor
        assert abs(warm - base.trainer.schedule.warmup_steps) <= factor / 2 or warm <= steps / 4


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_what_the_guard_holds_back_and_what_a_micro_batch_costs_stay_the_same(
    factor: float, accumulation: int
) -> None:
    base = with_settings(TINY, [("trainer.batch.accumulation", accumulation)])
    trainer = run_settings(SWEPT, base, ((BATCH_FACTOR, factor),), steps=16, seed=0).trainer
    whole = base.trainer
    held_back = trainer.batch.sequences * trainer.verify.guard_batches
    assert held_back == whole.batch.sequences * whole.verify.guard_batches
    scale = scale_of(trainer.batch, whole.batch)
    assert scale.steps == factor
    assert scale.passes * trainer.batch.accumulation == factor * accumulation
    assert scale.passes <= 1.0, "no micro-batch is larger than the task's"


def test_the_factor_1_changes_no_setting() -> None:
    assert run_settings(SWEPT, TINY, ((BATCH_FACTOR, 1.0),), steps=16, seed=0) == run_settings(
        SWEPT, TINY, (), steps=16, seed=0
    )


def test_a_batch_that_cannot_be_cut_is_one_line_that_says_so() -> None:
    with pytest.raises(SettingsError, match=r"a batch of 6 cannot be cut to 0\.25") as caught:
        sized(BatchSettings(sequences=6, accumulation=1), 0.25)
    assert "\n" not in str(caught.value)
    assert least_factor(BatchSettings(sequences=6, accumulation=2)) == 0.25


def test_the_sweep_draws_every_batch_of_its_range_and_rate_apart_from_it() -> None:
    drawn = [dict(trial_config(SWEPT, TINY, trial)) for trial in range(16)]
    over = RANGES[BATCH_FACTOR]
    assert isinstance(over, PowersOfTwo)
    assert {config[BATCH_FACTOR] for config in drawn} == set(FACTORS)
    assert (over.low, over.high) == (FACTORS[0], FACTORS[-1])
    assert len({config["trainer.optimizer.rate"] for config in drawn}) == 16


def test_a_start_that_would_cut_too_far_is_cut_as_far_as_it_can() -> None:
    base = with_settings(TINY, [("trainer.batch.sequences", 8)])
    config = dict(trial_config(ARMS["ours-hands-free-batch-low"], base, 0, ((BATCH_FACTOR, 0.25),)))
    assert config[BATCH_FACTOR] == 1 / 8


def swept_run(factor: float, arm: str = "adamw-swept", **more: int) -> RunResult:
    config = ((BATCH_FACTOR, factor), ("trainer.optimizer.rate", 0.003))
    key = RunKey(task="digits", arm=arm, config=config, planned_steps=16, seed=0, purpose="race")
    return run_arm(key, TINY, **more)


@pytest.mark.parametrize("arm", ["adamw-swept", "ours-ramp"])
def test_runs_of_every_batch_end_at_the_same_step_of_the_task_for_the_same_passes(arm: str) -> None:
    runs = {factor: swept_run(factor, arm) for factor in (0.25, 1.0, 4.0)}
    assert {run.final.steps for run in runs.values()} == {16}
    assert {run.final.passes for run in runs.values()} == {3.0 * 16}
    assert {run.final.backward_passes for run in runs.values()} == {16.0}
    assert [runs[factor].final.kept_steps for factor in runs] == [64, 16, 4]
    assert len({run.curve[0].loss for run in runs.values()}) == 1, "equal held-out data, equal weights"
    assert len({run.final.loss for run in runs.values()}) == 3


def test_a_reading_is_due_by_the_steps_of_the_task_whatever_the_batch() -> None:
    for factor in (0.25, 4.0):
        assert [p.steps for p in swept_run(factor, eval_every_steps=8).curve] == [0, 8, 16]
    assert [p.steps for p in swept_run(0.25).curve] == sorted(p.steps for p in swept_run(0.25).curve)


def test_curves_of_before_have_as_many_real_steps_as_steps() -> None:
    point = swept_run(1.0).final
    assert point.real_steps is None
    assert point.kept_steps == point.steps
    assert dataclasses.replace(point, real_steps=3).kept_steps == 3


def test_held_out_data_is_the_task_s_whatever_the_batch() -> None:
    """Regression draws it batch by batch: of another size it would be other data, and another target."""
    wanted = {"steps": 4, "schedule.warmup_steps": 1, "model.width": 8, "batch.sequences": 16}
    overrides = [f"trainer.{name}={value}" for name, value in wanted.items()]
    base = load_settings(preset="race-regression", overrides=overrides)
    first = set()
    for factor in (0.25, 1.0, 4.0):
        config = ((BATCH_FACTOR, factor),)
        key = RunKey(
            task="regression", arm="adamw-swept", config=config, planned_steps=4, seed=0, purpose="race"
        )
        first.add(run_arm(key, base).curve[0].loss)
    assert len(first) == 1
