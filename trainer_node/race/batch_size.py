"""A batch other than the task's: the same tokens in fewer or more steps. Pure.

Planned lengths, windows and warm-up of a race are in steps of the task's batch, whatever batch an arm has:
they are the same share of the tokens in every arm. A larger batch accumulates more micro-batches, as the
control does (common/control_rules.py); a smaller one accumulates less, then cuts the micro-batch. What the
guard holds back stays the same: a larger share of digits would be missing from training. What is held out
is the task's (run_arm.py). `Scale` is the way back to the task's units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from common.errors import SettingsError
from common.settings import BatchSettings, TrainerSettings
from trainer_node.race.arm_table import BATCH_FACTOR

# In real steps, however large the batch: the shortest that any preset of a race has.
LEAST_STATISTICS_STEPS, LEAST_WINDOW_STEPS, LEAST_PROBATION_STEPS = 16, 8, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What a micro-batch and a step of a run are worth in those of its task."""

    passes: float = 1.0
    steps: float = 1.0


SAME = Scale()


def batch_factor(config: Iterable[tuple[str, Any]]) -> float:
    return float(dict(config).get(BATCH_FACTOR, 1.0))


def steps_of(task_steps: float, factor: float) -> int:
    """Real steps that take in the tokens of so many steps of the task: off by half a batch at most."""
    return max(1, round(task_steps / factor))


def least_factor(batch: BatchSettings) -> float:
    """The smallest power of two that the task's batch can be cut by."""
    items = batch.sequences * batch.accumulation
    return 1.0 / (items & -items)


def sized(batch: BatchSettings, factor: float) -> BatchSettings:
    """Raises SettingsError where the batch cannot be cut so."""
    fewer = math.gcd(batch.accumulation, round(1 / factor)) if factor < 1 else 1
    sequences = batch.sequences * min(1.0, factor * fewer)
    accumulation = batch.accumulation * max(1.0, factor) / fewer
    if sequences < 1 or not sequences.is_integer() or not accumulation.is_integer():
        items = batch.sequences * batch.accumulation
        raise SettingsError(f"a batch of {items} cannot be cut to {factor:g} of it: choose a power of two")
    return BatchSettings(sequences=int(sequences), accumulation=int(accumulation))


def resized(trainer: TrainerSettings, factor: float) -> TrainerSettings:
    """The task's settings with another batch: its lengths in steps shrink or grow against it.

    `steps` is left to the caller, as is a warm-up that would be too long for them.
    """
    if factor == 1.0:
        return trainer
    schedule = trainer.schedule
    if schedule.warmup_steps:
        schedule = replace(schedule, warmup_steps=steps_of(schedule.warmup_steps, factor))
    batch = sized(trainer.batch, factor)
    parts = trainer.batch.sequences // batch.sequences
    return replace(
        trainer,
        batch=batch,
        verify=replace(trainer.verify, guard_batches=trainer.verify.guard_batches * parts),
        schedule=schedule,
        statistics_steps=_at_least(LEAST_STATISTICS_STEPS, trainer.statistics_steps, factor),
        window_steps=_at_least(LEAST_WINDOW_STEPS, trainer.window_steps, factor),
        probation_steps=_at_least(LEAST_PROBATION_STEPS, trainer.probation_steps, factor),
        controls=replace(
            trainer.controls,
            trial_steps=_at_least(LEAST_PROBATION_STEPS, trainer.controls.trial_steps, factor),
        ),
    )


def scale_of(batch: BatchSettings, task: BatchSettings) -> Scale:
    sequences = batch.sequences / task.sequences
    return Scale(passes=sequences, steps=sequences * batch.accumulation / task.accumulation)


def _at_least(least: int, steps: int, factor: float) -> int:
    return max(min(least, steps), steps_of(steps, factor))
