"""How decisions are made: the interface of a policy, and when any policy must rest.

Pure: no clock, no global random numbers, no bus; every decision is a function of what was observed and of
`state()`. A decision is for its decision point only. The policies: fixed_policy.py, learned.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from common.control_rules import NEUTRAL, schedule_of
from common.messages import (
    Controls,
    DecisionPoint,
    Forecast,
    Observation,
    Outcome,
    Phase,
    PhaseDecision,
)
from common.settings import RunSettings, ScheduleSettings
from predictor_node.forecast import LossCurve
from predictor_node.history import History

TAIL_SHARE = 0.8  # cosine and linear have no kink; from here on their rate is at most a fifth of the peak


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionInput:
    """All that a decision may depend on, besides the policy's own state."""

    observation: Observation
    point: DecisionPoint
    generation: int  # of the trainer
    history: History  # the observation included
    num_groups: int
    directions: tuple[str, ...]
    clock: float | None = None  # nominal step, where it is not the step: the batch was changed
    controls: Controls = NEUTRAL  # in force

    @property
    def schedule_step(self) -> float:
        """By which the schedule goes."""
        return self.observation.step if self.clock is None else self.clock


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyState:
    """Everything that later decisions depend on. Never changed after it was given out."""

    values: Mapping[str, object] = field(default_factory=dict)  # JSON-able
    tensors: bytes = b""  # safetensors, or nothing


class Policy(Protocol):
    def observe(self, observation: Observation, history: History) -> None:
        """One real step that was not known before; `history` includes it."""
        ...

    def decide(self, point: DecisionInput) -> PhaseDecision: ...

    def settle(self, outcome: Outcome) -> None:
        """What became of a decision; once per decision."""
        ...

    def state(self) -> PolicyState: ...

    def load(self, state: PolicyState) -> None:
        """Take over a state. Raises CheckpointError when it is not one of this policy's."""
        ...


LAST_WINDOW_FACTOR = 64  # where nothing will be tried any more: the most that the trainer grants


def rest(
    point: DecisionInput, *, reason: str, forecast: Forecast | None, arm: str = "", next_window_steps: int = 0
) -> PhaseDecision:
    """A decision for FULL."""
    return make_decision(
        point,
        phase=Phase.FULL,
        horizon_steps=0,
        coefficients=(),
        forecast=forecast,
        reason=reason,
        arm=arm,
        next_window_steps=next_window_steps,
    )


def make_decision(
    point: DecisionInput,
    *,
    phase: Phase,
    horizon_steps: int,
    coefficients: tuple[float, ...],
    forecast: Forecast | None,
    reason: str,
    arm: str = "",
    forecaster: bytes = b"",
    correction_share: float = 0.0,
    chunks: int = 1,
    next_window_steps: int = 0,
    controls: Controls | None = None,
) -> PhaseDecision:
    step, attempt = point.observation.step, point.observation.attempt
    return PhaseDecision(
        decision_id=f"{step}.{attempt}",
        phase=phase,
        horizon_steps=horizon_steps,
        num_groups=point.num_groups,
        num_directions=len(point.directions),
        coefficients=coefficients,
        controls=controls,
        forecast=forecast,
        base_generation=point.generation,
        base_step=step,
        base_attempt=attempt,
        base_fingerprint=point.point.fingerprint,
        valid_until_step=step,
        reason=reason,
        arm=arm,
        chunks=chunks,
        correction_share=correction_share,
        next_window_steps=next_window_steps,
        forecaster=forecaster,
    )


def phase_of_run_reason(settings: RunSettings, point: DecisionInput) -> str:
    trainer, step = settings.trainer, point.schedule_step
    steps, schedule = schedule_of(point.controls, trainer)
    if point.observation.phase is Phase.WARMUP:
        return "warm-up"
    if point.point.window <= settings.predictor.rest_windows:
        return f"window {point.point.window} of {settings.predictor.rest_windows} rested after warm-up"
    if step < schedule.warmup_steps:
        return "the learning rate is warming up"
    if is_in_tail(settings, point):
        return "the learning rate is decaying"
    if steps - step < trainer.probation_steps * point.controls.batch_factor:
        return "too few steps left for probation"
    return ""


def is_in_tail(settings: RunSettings, point: DecisionInput) -> bool:
    steps, schedule = schedule_of(point.controls, settings.trainer)
    return point.schedule_step >= tail_start_step(schedule, steps)


def tail_start_step(schedule: ScheduleSettings, steps: int) -> float:
    """First step of the decay tail; infinite for a constant rate."""
    if schedule.name == "constant":
        return math.inf
    if schedule.name == "wsd":
        return steps - schedule.decay_share * steps
    return TAIL_SHARE * steps


def history_reason(settings: RunSettings, history: History, curve: LossCurve | None) -> str:
    if history.contiguous_steps < settings.trainer.window_steps:
        return f"only {history.contiguous_steps} steps since a gap in the history"
    return "" if curve else "too few finite losses for a forecast"


def basis_reason(point: DecisionInput) -> str:
    """Gram matrices (G*K*K): finite, of the announced shape, with a drift to follow."""
    gram, num_directions = point.point.gram, len(point.directions)
    if len(gram) != point.num_groups * num_directions * num_directions:
        return f"{len(gram)} Gram entries do not fit the announced basis"
    if not all(map(math.isfinite, gram)):
        return "a Gram entry is not finite"
    if "drift" not in point.directions:
        return "the trainer holds no drift direction"
    drift = point.directions.index("drift")
    diagonal = gram[drift * (num_directions + 1) :: num_directions * num_directions]
    return "" if any(norm_squared > 0.0 for norm_squared in diagonal) else "the drift is zero"
