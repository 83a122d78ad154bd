"""Whether a run is long enough to try a jump: known before its first step, to all nodes alike.

The learned predictor may lose a share of the run on jumps that do not pay (predictor_node/budget.py). Where
one refused jump costs more than that, none is ever tried: it rests to the end. The trainer then keeps no
directions, no averages and closes no windows: it would pay for them and never use them. Amounts are
forward-equivalents ("passes": a training step of one micro-batch is 3).
"""

from __future__ import annotations

import math

from common.control_rules import any_on
from common.message_bounds import CHECK_PASSES, STEP_PASSES
from common.settings import RunSettings, TrainerSettings

# By predictor.temper: of the run's passes, what trying may cost on balance (predictor_node/tempers.py).
EXPLORATION_SHARES = {"conservative": 0.005, "balanced": 0.01, "aggressive": 0.05}
WORST_FACTOR = 2.0  # times that share is the net loss that is never exceeded


def check_passes(trainer: TrainerSettings, chunks: int = 1) -> float:
    """Of one jump in `chunks` parts: before it, after each part, and after the probation."""
    verify = trainer.verify
    return (2 + chunks) * CHECK_PASSES * verify.guard_batches * verify.enabled


def refusal_passes(trainer: TrainerSettings) -> float:
    """What a refused jump costs at most: its checks and the steps of its probation."""
    return check_passes(trainer) + trainer.probation_steps * STEP_PASSES * trainer.batch.accumulation


def least_steps(settings: RunSettings) -> int:
    """Of the shortest run that may try a jump; 0 for a policy that knows no budget."""
    if settings.predictor.policy != "learned":
        return 0
    share = WORST_FACTOR * EXPLORATION_SHARES[settings.predictor.temper]
    step_passes = STEP_PASSES * settings.trainer.batch.accumulation
    return math.ceil(refusal_passes(settings.trainer) / (share * step_passes))


def may_ever_jump(settings: RunSettings) -> bool:
    return settings.predictor.enabled and settings.trainer.steps >= least_steps(settings)


def keeps_directions(settings: RunSettings) -> bool:
    """Whether the trainer holds a basis: for jumps, controls, an averaged read-out, or weight histories."""
    trainer = settings.trainer
    wanted = trainer.read_out == "average" or trainer.basis.history_snapshots > 0 or any_on(trainer.controls)
    return settings.predictor.enabled and (wanted or may_ever_jump(settings))


def why_never(settings: RunSettings) -> str:
    """In words for people; "" where the run may jump."""
    if not settings.predictor.enabled:
        return "prediction is off"
    if may_ever_jump(settings):
        return ""
    return (
        f"a run of {settings.trainer.steps:,} steps is too short to pay for one refused jump:"
        f" {least_steps(settings):,} would do"
    )
