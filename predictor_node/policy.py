"""How decisions are made: the interface, and the fixed policy.

The fixed policy proposes a line fit over the trainer's directions, with horizons taken in turn:

    c[drift]      = drift_gain * horizon / window_steps     drift = displacement over one window
    c[slow_drift] = slow_gain  * horizon / window_steps
    c[pull_back]  = pull_back                               c[momentum] = 0

and rests where `rest_reason` says so. Drift alone is step-K Nesterov / line-fit nowcasting
(docs/parity.md). Pure: no clock, no random numbers, no bus; every decision is a function of the
point and of `state()`. A decision is for its decision point only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from common.errors import CheckpointError
from common.messages import Controls, DecisionPoint, Forecast, Observation, Phase, PhaseDecision
from common.settings import RunSettings, ScheduleSettings
from predictor_node.forecast import LossCurve, fit_loss_curve, forecast_at
from predictor_node.history import History

FITTED_WINDOWS = 2  # of 1 to 4, two or three had the least error (see forecast.py for the curves)
MAX_FITTED_STEPS = 256  # keeps a decision below 0.2 ms whatever the window
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


class Policy(Protocol):
    def decide(self, point: DecisionInput) -> PhaseDecision: ...

    def state(self) -> Mapping[str, object]:
        """Everything that later decisions depend on; JSON-able, never changed after it was given out."""
        ...

    def load(self, state: Mapping[str, object]) -> None:
        """Take over a state. Raises CheckpointError when it is not one of this policy's."""
        ...


class FixedPolicy:
    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._proposals = 0

    def decide(self, point: DecisionInput) -> PhaseDecision:
        """One decision for this point. Measured p50, 24 groups: window 16 0.03 ms, window 256 0.1 ms."""
        trainer, knobs = self._settings.trainer, self._settings.predictor
        count = min(FITTED_WINDOWS * trainer.window_steps, MAX_FITTED_STEPS)
        curve = fit_loss_curve(point.history.fitted_rows(count))
        reason = self._rest_reason(point, curve)
        end_step = point.observation.step + trainer.probation_steps
        if reason or curve is None:
            resting = forecast_at(curve, end_step=end_step, gained_steps=0.0) if curve else None
            return rest(point, reason=reason, forecast=resting)
        horizon_steps = self._next_horizon_steps()
        coefficients = self._row(point.directions, horizon_steps) * point.num_groups
        gained_steps = horizon_steps * (knobs.drift_gain + knobs.slow_gain)
        decision = _decision(
            point,
            phase=Phase.PREDICT,
            horizon_steps=horizon_steps,
            coefficients=coefficients,
            forecast=forecast_at(curve, end_step=end_step, gained_steps=gained_steps),
            reason=f"line fit over {horizon_steps} steps",
        )
        self._proposals += 1  # last: a decision that fails changes nothing
        return decision

    def state(self) -> dict[str, int]:
        return {"proposals": self._proposals}

    def load(self, state: Mapping[str, object]) -> None:
        proposals = state.get("proposals")
        if type(proposals) is not int or proposals < 0 or len(state) != 1:
            raise CheckpointError(f"not a state of the fixed policy: {dict(state)!r}")
        self._proposals = proposals

    def _next_horizon_steps(self) -> int:
        horizons = self._settings.predictor.horizon_steps
        return horizons[self._proposals % len(horizons)]

    def _row(self, directions: tuple[str, ...], horizon_steps: int) -> tuple[float, ...]:
        """(K) coefficients, the same for every group."""
        knobs = self._settings.predictor
        windows = horizon_steps / self._settings.trainer.window_steps
        known = {
            "drift": knobs.drift_gain * windows,
            "slow_drift": knobs.slow_gain * windows,
            "pull_back": knobs.pull_back,
        }
        return tuple(known.get(direction, 0.0) for direction in directions)

    def _rest_reason(self, point: DecisionInput, curve: LossCurve | None) -> str:
        """Why there is no proposal here, or ""."""
        if not self._settings.predictor.enabled:
            return "prediction is off"
        return (
            _phase_of_run_reason(self._settings, point)
            or _history_reason(self._settings, point.history, curve)
            or _basis_reason(point)
            or self._coefficient_reason(point)
        )

    def _coefficient_reason(self, point: DecisionInput) -> str:
        row = self._row(point.directions, self._next_horizon_steps())
        if not all(map(math.isfinite, row)):
            return "a coefficient is not finite"
        return "" if any(row) else "all gains are zero"


def rest(point: DecisionInput, *, reason: str, forecast: Forecast | None) -> PhaseDecision:
    """A decision for FULL."""
    return _decision(
        point, phase=Phase.FULL, horizon_steps=0, coefficients=(), forecast=forecast, reason=reason
    )


def _decision(
    point: DecisionInput,
    *,
    phase: Phase,
    horizon_steps: int,
    coefficients: tuple[float, ...],
    forecast: Forecast | None,
    reason: str,
) -> PhaseDecision:
    step, attempt = point.observation.step, point.observation.attempt
    return PhaseDecision(
        decision_id=f"{step}.{attempt}",
        phase=phase,
        horizon_steps=horizon_steps,
        num_groups=point.num_groups,
        num_directions=len(point.directions),
        coefficients=coefficients,
        controls=Controls(),
        forecast=forecast,
        base_generation=point.generation,
        base_step=step,
        base_attempt=attempt,
        base_fingerprint=point.point.fingerprint,
        valid_until_step=step,
        reason=reason,
    )


def _phase_of_run_reason(settings: RunSettings, point: DecisionInput) -> str:
    trainer, step = settings.trainer, point.observation.step
    if point.observation.phase is Phase.WARMUP:
        return "warm-up"
    if point.point.window <= settings.predictor.rest_windows:
        return f"window {point.point.window} of {settings.predictor.rest_windows} rested after warm-up"
    if step < trainer.schedule.warmup_steps:
        return "the learning rate is warming up"
    if step >= tail_start_step(trainer.schedule, trainer.steps):
        return "the learning rate is decaying"
    if trainer.steps - step < trainer.probation_steps:
        return "too few steps left for probation"
    return ""


def tail_start_step(schedule: ScheduleSettings, steps: int) -> float:
    """First step of the decay tail; infinite for a constant rate."""
    if schedule.name == "constant":
        return math.inf
    if schedule.name == "wsd":
        return steps - schedule.decay_share * steps
    return TAIL_SHARE * steps


def _history_reason(settings: RunSettings, history: History, curve: LossCurve | None) -> str:
    if history.contiguous_steps < settings.trainer.window_steps:
        return f"only {history.contiguous_steps} steps since a gap in the history"
    return "" if curve else "too few finite losses for a forecast"


def _basis_reason(point: DecisionInput) -> str:
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
