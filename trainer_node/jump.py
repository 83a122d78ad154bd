"""One proposal from snapshot to verdict: PREDICT and the two ends of CORRECT.

    start   guard loss, snapshot, apply, guard loss   -> RUINED (already restored) or on probation
    finish  guard loss after the probation's steps     -> ACCEPTED, or REFUSED (restored)
    abort   the run stops during probation             -> ABORTED (restored)

Everything it costs is in the Outcome. Real steps are the loop's business; phases are phases.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from common.errors import EnvironmentFault
from common.messages import Outcome, PhaseDecision, Verdict
from common.settings import VerifySettings
from trainer_node import ledger as purposes
from trainer_node.basis import Basis
from trainer_node.delta import AppliedDelta, apply_delta, coefficients_of
from trainer_node.fingerprint import fingerprint
from trainer_node.ledger import CHECK_PASSES, Ledger
from trainer_node.snapshot import Snapshot, TensorStore
from trainer_node.verify import NoJumpForecast, forecast_without_jump, is_ruin, judge, ruin_bound


@dataclass(frozen=True, kw_only=True)
class JumpTools:
    """What every jump of a run shares."""

    basis: Basis
    optimizers: Sequence[torch.optim.Optimizer]
    store: TensorStore
    guard_loss: Callable[[], float]  # nats on the held-back batches, evaluation mode
    ledger: Ledger
    settings: VerifySettings
    probation_steps: int


@dataclass(frozen=True, kw_only=True)
class Before:
    """The run just before the jump, as far as the verdict needs it."""

    attempt: int
    recent_losses: Sequence[float]
    first_loss: float
    loss_noise: float
    waiting_seconds: float
    full_step_seconds: float


@dataclass
class Jump:
    """A proposal on probation, or its end."""

    decision: PhaseDecision
    outcome: Outcome
    snapshot: Snapshot
    delta: AppliedDelta
    step_seconds: list[float] = field(default_factory=list)  # of the probation's steps so far
    step_passes: float = 0.0  # the same in forward-equivalents


def blank_outcome(
    decision_id: str,
    verdict: Verdict,
    *,
    step: int,
    attempt: int,
    horizon_steps: int = 0,
    waiting_seconds: float = 0.0,
    full_step_seconds: float = 0.0,
) -> Outcome:
    """The outcome of a decision that moved no weight."""
    return Outcome(
        decision_id=decision_id,
        verdict=verdict,
        base_step=step,
        attempt=attempt,
        horizon_steps=horizon_steps,
        loss_before=math.nan,
        loss_after=math.nan,
        loss_end=math.nan,
        loss_forecast=math.nan,
        loss_spread=math.nan,
        delta_norm=0.0,
        delta_cosine=math.nan,
        probation_steps=0,
        lost_steps=0,
        passes=0.0,
        waiting_seconds=waiting_seconds,
        snapshot_seconds=0.0,
        jump_seconds=0.0,
        check_seconds=0.0,
        restore_seconds=0.0,
        lost_seconds=0.0,
        full_step_seconds=full_step_seconds,
    )


def start_jump(tools: JumpTools, decision: PhaseDecision, before: Before) -> Jump | Outcome:
    """Take the jump. An Outcome means it is over already: FAILED, MALFORMED (zero delta) or RUINED."""
    outcome = blank_outcome(
        decision.decision_id,
        Verdict.ACCEPTED,
        step=decision.base_step,
        attempt=before.attempt,
        horizon_steps=decision.horizon_steps,
        waiting_seconds=before.waiting_seconds,
        full_step_seconds=before.full_step_seconds,
    )
    check_passes = CHECK_PASSES * tools.settings.guard_batches
    with tools.ledger.span(purposes.SNAPSHOTS) as saving:
        try:
            averages = tools.basis.averages.moving_tensors()
            snapshot = Snapshot(tools.store, tools.basis.parameters, tools.optimizers, averages)
        except EnvironmentFault:
            return replace(outcome, verdict=Verdict.FAILED)
    with tools.ledger.span(purposes.CHECKS, passes=check_passes) as check_before:
        loss_before = tools.guard_loss()
    with tools.ledger.span(purposes.JUMPS) as jumping:
        delta = apply_delta(tools.basis, coefficients_of(decision))
        moved = fingerprint(tools.basis.parameters) != decision.base_fingerprint
    with tools.ledger.span(purposes.CHECKS, passes=check_passes) as check_after:
        loss_after = tools.guard_loss()
    forecast = forecast_without_jump(before.recent_losses, horizon_steps=tools.probation_steps)
    outcome = replace(
        outcome,
        loss_before=loss_before,
        loss_after=loss_after,
        loss_forecast=loss_before + forecast.change,
        loss_spread=forecast.spread,
        delta_norm=delta.norm,
        passes=2 * check_passes,
        snapshot_seconds=saving.seconds,
        jump_seconds=jumping.seconds,
        check_seconds=check_before.seconds + check_after.seconds,
    )
    bound = ruin_bound(
        loss_before=loss_before,
        first_loss=before.first_loss,
        ruin_share=tools.settings.ruin_share,
        noise=before.loss_noise,
    )
    jump = Jump(decision, outcome, snapshot, delta)
    if not moved:
        return _restore(tools, jump, Verdict.MALFORMED)
    if is_ruin(loss_after, bound=bound):
        return _restore(tools, jump, Verdict.RUINED)
    return jump


def finish_jump(tools: JumpTools, jump: Jump) -> Outcome:
    """Judge at the end of probation; restore if refused."""
    check_passes = CHECK_PASSES * tools.settings.guard_batches
    with tools.ledger.span(purposes.CHECKS, passes=check_passes) as check:
        loss_end = tools.guard_loss()
    before = jump.outcome
    forecast = NoJumpForecast(change=before.loss_forecast - before.loss_before, spread=before.loss_spread)
    verdict = judge(
        loss_before=before.loss_before,
        loss_end=loss_end,
        forecast=forecast,
        tolerance=tools.settings.tolerance,
    )
    moved_Gm = tools.basis.sampled(tools.basis.parameters) - jump.delta.weights_Gm
    jump.outcome = replace(
        before,
        verdict=verdict,
        loss_end=loss_end,
        delta_cosine=tools.basis.cosine(jump.delta.sample_Gm, moved_Gm),
        probation_steps=len(jump.step_seconds),
        passes=before.passes + check_passes,
        check_seconds=before.check_seconds + check.seconds,
    )
    return jump.outcome if verdict is Verdict.ACCEPTED else _restore(tools, jump, verdict)


def abort_jump(tools: JumpTools, jump: Jump) -> Outcome:
    return _restore(tools, jump, Verdict.ABORTED)


def _restore(tools: JumpTools, jump: Jump, verdict: Verdict) -> Outcome:
    with tools.ledger.span(purposes.SNAPSHOTS) as restoring:
        jump.snapshot.restore()
    lost_steps = len(jump.step_seconds)
    return replace(
        jump.outcome,
        verdict=verdict,
        attempt=jump.outcome.attempt + (1 if lost_steps else 0),
        probation_steps=lost_steps,
        lost_steps=lost_steps,
        lost_seconds=sum(jump.step_seconds),
        passes=jump.outcome.passes + jump.step_passes,
        restore_seconds=restoring.seconds,
    )
