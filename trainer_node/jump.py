"""One proposal from snapshot to verdict: PREDICT and the two ends of CORRECT.

    start    guard loss, snapshot, apply, guard loss   -> RUINED (already restored) or on probation
    finish   guard loss after the probation's steps     -> ACCEPTED, or REFUSED (restored)
    abort    the run stops during probation             -> ABORTED (restored)

A proposal of other controls alone goes the same way without a move: they are the cycle's to put in force and
to set back. (Another rate or batch is judged beside a real run without it, in control_twin.py.)

Without the guard (verify.enabled = false, for races) there is no snapshot and no check, so there is
no way back: a jump is kept whatever becomes of it. Everything it costs is in the Outcome. Memory that
runs out on the way fails the jump, with the same restore. Real steps are the loop's business; phases are
phases.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from common.errors import EnvironmentFault
from common.messages import Outcome, PhaseDecision, Verdict
from trainer_node import ledger as purposes
from trainer_node.delta import AppliedDelta
from trainer_node.out_of_memory import OutOfMemory, TornUpdate, attempt, release
from trainer_node.parts import move_at_once, move_in_parts
from trainer_node.phases import is_of_controls
from trainer_node.snapshot import Snapshot, TensorStore
from trainer_node.trial import Before, Jump, JumpTools, blank_outcome
from trainer_node.verify import NoJumpForecast, forecast_without_jump, judge, ruin_bound
from trainer_node.weight_forecast import WeightForecaster

# Over more probations than this the loss bends: such a pause says nothing about the guard's noise.
LONGEST_SAMPLE_PROBATIONS = 8


def start_jump(
    tools: JumpTools, decision: PhaseDecision, before: Before, forecaster: WeightForecaster | None = None
) -> Jump | Outcome:
    """Take the jump. An Outcome means it is over already: FAILED, MALFORMED (zero delta), RUINED or REFUSED.

    `forecaster` is the one that the decision brings, if it does.
    """
    outcome = blank_outcome(
        decision.decision_id,
        Verdict.ACCEPTED,
        step=decision.base_step,
        attempt=before.attempt,
        horizon_steps=decision.horizon_steps,
        waiting_seconds=before.waiting_seconds,
        full_step_seconds=before.full_step_seconds,
    )
    if not tools.settings.enabled:
        return _jump_unguarded(tools, decision, before, outcome, forecaster)
    with tools.ledger.span(purposes.SNAPSHOTS) as saving:
        snapshot = take_snapshot(tools, tools.store)
    if snapshot is None:
        return replace(outcome, verdict=Verdict.FAILED)
    outcome = replace(outcome, snapshot_seconds=saving.seconds)
    jump = Jump(
        decision,
        outcome,
        snapshot,
        _no_delta(tools),
        before.guard,
        batch_factor=before.batch_factor,
        controls_before=before.controls,
    )
    verdict = attempt(partial(_look_and_leap, tools, jump, before, forecaster))
    if isinstance(verdict, OutOfMemory):
        return fail_jump(tools, jump, verdict)
    return jump if verdict is None else restore_jump(tools, jump, verdict)


def _no_delta(tools: JumpTools) -> AppliedDelta:
    return AppliedDelta(0.0, tools.basis.empty_sample(), tools.basis.empty_sample())


def take_snapshot(
    tools: JumpTools, store: TensorStore, *, also: Callable[[], Sequence[Tensor]] = tuple
) -> Snapshot | None:
    """With what `also` names. None without room for it, on the host, the disk or the device: nothing has
    changed then.
    """

    def take() -> Snapshot:
        extra = [*tools.basis.averages.moving_tensors(), *tools.kept_with_weights(), *also()]
        return Snapshot(
            store,
            tools.basis.parameters,
            tools.optimizers,
            extra,
            with_random=tools.restores_random,
        )

    try:
        snapshot = attempt(take)
    except EnvironmentFault:
        snapshot = None
    if isinstance(snapshot, OutOfMemory):
        tools.on_out_of_memory(snapshot)
        snapshot = None
    is_missing = tools.basis.split.ranks.any(snapshot is None)  # one rank without room: none jumps
    return None if is_missing else snapshot


def _look_and_leap(
    tools: JumpTools, jump: Jump, before: Before, forecaster: WeightForecaster | None
) -> Verdict | None:
    """What is wrong with the jump at once, if anything."""
    _look(tools, jump, before)
    bound = ruin_bound(
        loss_before=jump.outcome.loss_before,
        first_loss=before.first_loss,
        ruin_share=tools.settings.ruin_share,
        noise=before.loss_noise,
    )
    if is_of_controls(jump.decision):
        jump.outcome = replace(jump.outcome, loss_after=jump.outcome.loss_before)
        jump.ruin_loss = bound
        return None
    if jump.decision.chunks > 1:
        deltas = tools.deltas(jump.decision, forecaster)
        return move_in_parts(tools, jump, deltas, bound=bound, slack=before.loss_noise)
    return move_at_once(tools, jump, forecaster, bound=bound)


def _look(tools: JumpTools, jump: Jump, before: Before) -> None:
    """The guard loss before the jump, and what it would be after probation without one."""
    with tools.ledger.span(purposes.CHECKS, passes=tools.check_passes) as check:
        loss_before = tools.guard_loss()
    # The record counts nominal steps, so that it holds at every batch; recent losses are of real steps.
    nominal_steps = tools.probation_steps * before.batch_factor
    before.guard.observe(
        jump.decision.base_step if before.clock is None else before.clock,
        loss_before,
        longest_steps=LONGEST_SAMPLE_PROBATIONS * nominal_steps,
    )
    jump.guard_spread = before.guard.trend(before.loss_noise)[2]
    forecast = forecast_without_jump(
        before.recent_losses,
        horizon_steps=tools.probation_steps * before.batch_change,
        guard_horizon_steps=nominal_steps,
        guard=before.guard,
        loss_noise=before.loss_noise,
    )
    jump.outcome = replace(
        jump.outcome,
        loss_before=loss_before,
        loss_forecast=loss_before + forecast.change,
        loss_spread=forecast.spread,
        passes=tools.check_passes,
        check_seconds=check.seconds,
    )


def _jump_unguarded(
    tools: JumpTools,
    decision: PhaseDecision,
    before: Before,
    outcome: Outcome,
    forecaster: WeightForecaster | None,
) -> Jump | Outcome:
    if is_of_controls(decision):
        return Jump(decision, outcome, None, _no_delta(tools), before.guard)
    with tools.ledger.span(purposes.JUMPS) as jumping:
        delta = attempt(lambda: tools.move(decision, forecaster))
        if isinstance(delta, OutOfMemory):
            raise TornUpdate("a jump without its guard", delta)
        moved = tools.basis.fingerprint() != decision.base_fingerprint
    outcome = replace(outcome, delta_norm=delta.norm, jump_seconds=jumping.seconds, chunks_applied=1)
    if not moved:
        return replace(outcome, verdict=Verdict.MALFORMED)
    return Jump(decision, outcome, None, delta, before.guard)


def finish_jump(tools: JumpTools, jump: Jump) -> Outcome:
    """Judge at the end of probation; restore if refused, or if there is no memory to judge with."""
    outcome = attempt(partial(_judge_jump, tools, jump))
    return fail_jump(tools, jump, outcome) if isinstance(outcome, OutOfMemory) else outcome


def _judge_jump(tools: JumpTools, jump: Jump) -> Outcome:
    moved_Gm = tools.basis.sampled(tools.basis.parameters) - jump.delta.weights_Gm
    jump.outcome = replace(
        jump.outcome,
        delta_cosine=tools.basis.cosine(jump.delta.sample_Gm, moved_Gm),
        probation_steps=len(jump.step_seconds),
    )
    if jump.snapshot is None:
        return _keep_unguarded(jump)
    with tools.ledger.span(purposes.CHECKS, passes=tools.check_passes) as check:
        loss_end = tools.guard_loss()
    before = jump.outcome
    change = before.loss_forecast - before.loss_before
    verdict = judge(
        loss_before=before.loss_before,
        loss_end=loss_end,
        forecast=NoJumpForecast(change=change, spread=before.loss_spread),
        tolerance=tools.settings.tolerance,
    )
    jump.outcome = replace(
        before,
        verdict=verdict,
        loss_end=loss_end,
        passes=before.passes + tools.check_passes,
        check_seconds=before.check_seconds + check.seconds,
    )
    if verdict is not Verdict.ACCEPTED:
        return restore_jump(tools, jump, verdict)
    # It stands at the guard loss before the jump.
    jump.guard.move_to(jump.guard.step + before.probation_steps * jump.batch_factor, loss_end)
    return jump.outcome


def fail_jump(tools: JumpTools, jump: Jump, shortage: OutOfMemory) -> Outcome:
    """Memory ran out: FAILED and restored. Raises TornUpdate where there is no way back.

    The gradients go first, since proving the restore takes a few MiB on the device.
    """
    release(tools.basis.owners)
    if jump.snapshot is None:
        raise TornUpdate("a jump without its guard", shortage)
    tools.on_out_of_memory(shortage)
    return restore_jump(tools, jump, Verdict.FAILED)


def abort_jump(tools: JumpTools, jump: Jump) -> Outcome:
    """The run stops: restored, or kept where there is no way back."""
    if jump.snapshot is None:
        jump.outcome = replace(jump.outcome, probation_steps=len(jump.step_seconds))
        return _keep_unguarded(jump)
    return restore_jump(tools, jump, Verdict.ABORTED)


def _keep_unguarded(jump: Jump) -> Outcome:
    """ACCEPTED, or REFUSED when a training loss was not finite; kept in both cases: nothing is lost."""
    sound = all(math.isfinite(loss) for loss in jump.losses)
    return replace(jump.outcome, verdict=Verdict.ACCEPTED if sound else Verdict.REFUSED)


def restore_jump(tools: JumpTools, jump: Jump, verdict: Verdict) -> Outcome:
    """Back to before the proposal. Lost are the steps since, those of a twin (control_twin.py) too."""
    assert jump.snapshot is not None, "a restore needs a snapshot"
    with tools.ledger.span(purposes.SNAPSHOTS) as restoring:
        jump.snapshot.restore()
    is_moved = bool(jump.step_seconds)
    lost = [jump.take_leg(), *([jump.twin.trial] if jump.twin else [])]
    lost_steps = sum(len(leg.step_seconds) for leg in lost)
    jump.lost_passes = sum(leg.step_passes for leg in lost)
    return replace(
        jump.outcome,
        verdict=verdict,
        attempt=jump.outcome.attempt + is_moved,
        probation_steps=lost_steps,
        lost_steps=lost_steps,
        lost_seconds=sum(sum(leg.step_seconds) for leg in lost),
        passes=jump.outcome.passes + jump.lost_passes,
        restore_seconds=jump.outcome.restore_seconds + restoring.seconds,
    )
