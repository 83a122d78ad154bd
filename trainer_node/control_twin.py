"""A trial of another rate or batch against a real run without it: from the same weights, on the same batches.

    trial   controls.trial_steps steps with the new controls      (phase CORRECT, as for a jump)
    twin    from the same snapshot, as much time with the old ones (phase CORRECT, one attempt later)
    verdict the better one goes on, the other's steps are lost     (ACCEPTED or REFUSED)

No forecast is asked: over some steps of a curved loss it was wrong by more than a rate makes
(docs/lab-log.md, 2026-11-22). Both are measured on the guard batches with the mean of their weights
(leg_mean.py). A lower rate of a run that has learned nothing begins at the first weights instead
(first_weights.py). Other trials (context, tail, read-out) and jumps are judged in jump.py. Moves weights only
to and from snapshots.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from functools import partial

from torch import Tensor

from common.control_rules import is_beside_twin
from common.messages import Outcome, Verdict
from common.settings import TrainerSettings
from trainer_node import ledger as purposes
from trainer_node.controls import steps_left
from trainer_node.jump import fail_jump, restore_jump, take_snapshot
from trainer_node.leg_mean import LegMean
from trainer_node.out_of_memory import OutOfMemory, attempt
from trainer_node.phases import is_of_controls
from trainer_node.progress import Progress
from trainer_node.trial import Jump, JumpTools, Twin
from trainer_node.verify import is_better_than_twin, is_ruin

LONGEST_TWIN = 2.0  # times as much data as the trial had, and half at least: seconds can deceive


def has_twin(jump: Jump) -> bool:
    """Whether this trial is to be judged beside one. Without the guard nothing is undone or judged."""
    wanted = jump.decision.controls
    of_controls = jump.snapshot is not None and wanted is not None and is_of_controls(jump.decision)
    return of_controls and is_beside_twin(wanted, jump.controls_before)


def end_ruined_trial(tools: JumpTools, jump: Jump, newest_loss: Tensor) -> Outcome | None:
    """Half-way through a trial, if its training loss is beyond the ruin bound: back at once, without a twin.

    `newest_loss`: (), nats; the one number that the trainer waits for within a trial.
    """
    if jump.mean is None or jump.twin is not None or not jump.mean.is_half_way:
        return None
    loss = float(newest_loss)
    if not tools.basis.split.ranks.any(is_ruin(loss, bound=jump.ruin_loss)):
        return None
    jump.outcome = replace(jump.outcome, loss_end=loss, loss_forecast=math.nan, loss_spread=math.nan)
    return restore_jump(tools, jump, Verdict.REFUSED)


def begin_twin(tools: JumpTools, jump: Jump, progress: Progress, settings: TrainerSettings) -> Outcome | None:
    """The trial's steps are taken: keep where they led, and go back to where they began.

    None: the twin's steps are due, `jump.twin_steps` of them. An Outcome: memory ran out, the run is back.
    """
    left_steps = steps_left(jump.before_it.controls, settings, jump.before_it.clock)
    result = attempt(partial(_begin, tools, jump, progress, left_steps))
    return fail_jump(tools, jump, result) if isinstance(result, OutOfMemory) else result


def _begin(tools: JumpTools, jump: Jump, progress: Progress, most_steps: int) -> Outcome | None:
    assert jump.snapshot is not None, "a twin needs a way back"
    loss = mean_loss(tools, jump)
    with tools.ledger.span(purposes.SNAPSHOTS) as moving:
        store = tools.store.another()
        end = take_snapshot(tools, store)
        if end is None:
            store.close()
            return restore_jump(tools, jump, Verdict.FAILED)
        jump.snapshot.restore()
    taken = jump.take_leg()
    jump.outcome = replace(
        jump.outcome,
        loss_end=loss,
        attempt=jump.outcome.attempt + 1,
        probation_steps=len(taken.step_seconds),
        snapshot_seconds=jump.outcome.snapshot_seconds + moving.seconds,
    )
    jump.twin = Twin(
        trial=taken,
        end=end,
        store=store,
        progress=progress,
        steps=max(1, min(most_steps, twin_steps(tools, jump, taken.step_seconds))),
    )
    jump.mean = LegMean(tools.basis.parameters, jump.twin.steps)
    return None


def twin_steps(tools: JumpTools, jump: Jump, trial_seconds: list[float]) -> int:
    """As many as the trial took time for: equal time is what a batch must be judged by.

    With the same batch, as many as the trial. Several ranks have no time in common: they take equal data.
    """
    controls = jump.decision.controls
    assert controls is not None, "a trial of controls has some"
    change = controls.batch_factor / jump.controls_before.batch_factor
    equal_data, ordinary_seconds = len(trial_seconds) * change, jump.outcome.full_step_seconds
    if change == 1.0 or tools.basis.split.ranks.size > 1 or ordinary_seconds <= 0.0:
        return round(equal_data)
    # The median: a single compilation for the new shape is not what such a batch costs.
    equal_time = len(trial_seconds) * statistics.median(trial_seconds) / ordinary_seconds
    return round(min(LONGEST_TWIN * equal_data, max(equal_data / LONGEST_TWIN, equal_time)))


def finish_twin(tools: JumpTools, jump: Jump) -> Outcome:
    """Both were run: go on with the better one."""
    outcome = attempt(partial(_finish, tools, jump))
    return fail_jump(tools, jump, outcome) if isinstance(outcome, OutOfMemory) else outcome


def _finish(tools: JumpTools, jump: Jump) -> Outcome:
    twin = jump.twin
    assert twin is not None, "a twin is finished that was not begun"
    wanted, loss_without, before = jump.decision.controls, mean_loss(tools, jump), jump.outcome
    keeps = is_better_than_twin(
        loss_before=before.loss_before,
        loss_with=before.loss_end,
        loss_without=loss_without,
        spread=jump.guard_spread,
        is_way_out=wanted is not None and wanted.rate_factor < jump.controls_before.rate_factor,
    )
    restore_seconds = 0.0
    if keeps:
        with tools.ledger.span(purposes.SNAPSHOTS) as restoring:
            twin.end.restore()  # memory may run out: the leg is taken behind it
        restore_seconds = restoring.seconds
        jump.guard.forget_level()  # the mean's losses are none of the weights'
    lost = jump.take_leg() if keeps else twin.trial
    jump.lost_passes = lost.step_passes
    return replace(
        jump.outcome,
        verdict=Verdict.ACCEPTED if keeps else Verdict.REFUSED,
        loss_forecast=loss_without,
        loss_spread=jump.guard_spread,
        attempt=before.attempt + (1 if keeps else 0),
        lost_steps=len(lost.step_seconds),
        lost_seconds=sum(lost.step_seconds),
        passes=jump.outcome.passes + lost.step_passes,
        restore_seconds=before.restore_seconds + restore_seconds,
    )


def place_after(jump: Jump, verdict: Verdict) -> Progress | None:
    """How far the run is after the verdict; None: where it stands. Empties the twin's store."""
    twin = jump.twin
    if twin is not None:
        twin.store.close()
        if verdict in (Verdict.ACCEPTED, Verdict.REFUSED):
            return twin.progress if verdict is Verdict.ACCEPTED else None
    is_undone = verdict is not Verdict.ACCEPTED and jump.snapshot is not None
    return jump.before_it if is_undone else None


def mean_loss(tools: JumpTools, jump: Jump) -> float:
    """Nats on the guard batches, of the mean of the leg that has ended."""
    assert jump.mean is not None, "a leg without its mean"
    with tools.ledger.span(purposes.CHECKS, passes=tools.check_passes) as check, jump.mean.in_place():
        loss = tools.guard_loss()
    jump.mean = None
    jump.outcome = replace(
        jump.outcome,
        passes=jump.outcome.passes + tools.check_passes,
        check_seconds=jump.outcome.check_seconds + check.seconds,
    )
    return loss
