"""What a jump is made of: the tools all jumps of a run share, the run before one, the jump on probation.

Values only; jump.py takes a jump from start to verdict, parts.py moves the weights, correct.py corrects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.control_rules import NEUTRAL
from common.messages import Controls, Outcome, PhaseDecision, Verdict
from common.settings import TrainerSettings, VerifySettings
from trainer_node.basis import Basis
from trainer_node.delta import (
    AppliedDelta,
    apply_delta,
    coefficients_of,
    linear_deltas,
    move,
    random_deltas,
)
from trainer_node.ledger import CHECK_PASSES, Ledger
from trainer_node.leg_mean import LegMean
from trainer_node.out_of_memory import OutOfMemory, attempt
from trainer_node.progress import Progress
from trainer_node.snapshot import Snapshot, TensorStore
from trainer_node.verify import GuardRecord
from trainer_node.weight_forecast import WeightForecaster


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
    ablation_seed: int | None = None  # deltas become random directions of the same norm
    on_out_of_memory: Callable[[OutOfMemory], None] = lambda _: None  # a jump hit it and was undone
    kept_with_weights: Callable[[], Sequence[Tensor]] = tuple  # set back with them
    restores_random: bool = True  # a loop whose batches go on keeps its random state too

    @property
    def check_passes(self) -> float:
        return CHECK_PASSES * self.settings.guard_batches

    def deltas(
        self, decision: PhaseDecision, forecaster: WeightForecaster | None
    ) -> Iterable[tuple[int, Tensor]]:
        """(parameter index, its delta), one at a time."""
        if forecaster is not None:
            deltas = self.basis.forecast_displacements(forecaster)
        else:
            deltas = linear_deltas(self.basis, coefficients_of(decision))
        if self.ablation_seed is None:
            return deltas
        shards = self.basis.split.shards
        key = (self.ablation_seed, decision.base_step, decision.base_attempt)
        return random_deltas(deltas, key=key if shards.size == 1 else (*key, shards.rank))

    def move(self, decision: PhaseDecision, forecaster: WeightForecaster | None) -> AppliedDelta:
        """Move the weights by the whole delta."""
        if forecaster is None and self.ablation_seed is None:
            return apply_delta(self.basis, coefficients_of(decision))
        return move(self.basis, self.deltas(decision, forecaster))


def jump_tools(
    settings: TrainerSettings,
    basis: Basis,
    store: TensorStore,
    *,
    optimizers: Sequence[torch.optim.Optimizer],
    guard_loss: Callable[[], float],
    ledger: Ledger,
    on_out_of_memory: Callable[[OutOfMemory], None],
    kept_with_weights: Callable[[], Sequence[Tensor]] = tuple,
    restores_random: bool = True,
) -> JumpTools:
    return JumpTools(
        basis=basis,
        optimizers=optimizers,
        store=store,
        guard_loss=guard_loss,
        ledger=ledger,
        settings=settings.verify,
        probation_steps=settings.probation_steps,
        ablation_seed=settings.seed if settings.basis.ablation == "random" else None,
        on_out_of_memory=on_out_of_memory,
        kept_with_weights=kept_with_weights,
        restores_random=restores_random,
    )


@dataclass(frozen=True, kw_only=True)
class Before:
    """The run just before the jump, as far as the verdict needs it."""

    attempt: int
    recent_losses: Sequence[float]
    first_loss: float
    loss_noise: float
    waiting_seconds: float
    full_step_seconds: float
    guard: GuardRecord = field(default_factory=GuardRecord)  # learns from every jump
    controls: Controls = NEUTRAL  # in force
    clock: float | None = None  # nominal steps kept (progress.py); None: as many as real ones
    batch_factor: float = 1.0  # of the steps on probation: each is so many nominal ones
    batch_change: float = 1.0  # the same, over that of a step before it


@dataclass(frozen=True, kw_only=True)
class Leg:
    """Real steps in a row that are judged together."""

    step_seconds: list[float]
    step_passes: float  # of all of them, forward-equivalents


@dataclass(frozen=True, kw_only=True)
class Twin:
    """The run without the proposal, which takes its steps now (control_twin.py)."""

    trial: Leg  # the steps with it
    end: Snapshot  # where they led
    store: TensorStore  # what that is kept in
    progress: Progress  # as it stood there
    steps: int  # of the twin


@dataclass
class Jump:
    """A proposal on probation, or its end."""

    decision: PhaseDecision
    outcome: Outcome
    snapshot: Snapshot | None  # None without the guard
    delta: AppliedDelta
    guard: GuardRecord
    step_seconds: list[float] = field(default_factory=list)  # of the probation's steps so far
    step_passes: float = 0.0  # the same in forward-equivalents
    losses: list[float] = field(default_factory=list)  # of the probation's training batches
    batch_factor: float = 1.0  # of the probation's steps
    controls_before: Controls = NEUTRAL  # in force before the proposal
    ruin_loss: float = math.inf  # nats: above that a training loss half-way through a trial ends it
    guard_spread: float = math.nan  # nats: what a guard loss shakes by over a probation
    lost_passes: float = 0.0  # of the steps that were undone
    undo: Progress | None = None  # as it stood before
    mean: LegMean | None = None  # of the steps now, where the trial is judged beside a twin
    twin: Twin | None = None
    is_return: bool = False  # it began at the first weights (first_weights.py)

    def took_step(self, seconds: float, passes: float) -> OutOfMemory | None:
        """A real step of the probation. Without memory for its mean it cannot be judged."""
        self.step_seconds.append(seconds)
        self.step_passes += passes
        shortage = attempt(self.mean.after_step) if self.mean is not None else None
        return shortage if isinstance(shortage, OutOfMemory) else None

    def take_leg(self) -> Leg:
        """The steps so far; those to come are counted anew."""
        leg = Leg(step_seconds=self.step_seconds, step_passes=self.step_passes)
        self.step_seconds, self.step_passes = [], 0.0
        return leg

    @property
    def before_it(self) -> Progress:
        assert self.undo is not None, "a proposal without what was before it"
        return self.undo

    @property
    def twin_steps(self) -> int:
        return self.twin.steps if self.twin is not None else 0

    @property
    def is_to_be_corrected(self) -> bool:
        """In the step that comes now."""
        is_wanted = self.decision.correction_share > 0.0 and self.decision.horizon_steps > 0
        return bool(self.snapshot and is_wanted and not self.step_seconds)


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
