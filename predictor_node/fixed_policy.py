"""The fixed policy: a line fit over the trainer's directions, with horizons taken in turn.

    c[drift]      = drift_gain * horizon / window_steps     drift = displacement over one window
    c[slow_drift] = slow_gain  * horizon / window_steps
    c[pull_back]  = pull_back                               c[momentum] = 0

and rest where `rest_reason` says so. Drift alone is step-K Nesterov / line-fit nowcasting
(docs/parity.md). Learns nothing; its only state is how many proposals it made.
"""

from __future__ import annotations

import math

from common.errors import CheckpointError
from common.messages import Observation, Outcome, Phase, PhaseDecision
from common.settings import RunSettings
from predictor_node.forecast import LossCurve, fit_loss_curve, forecast_at
from predictor_node.history import History
from predictor_node.policy import (
    DecisionInput,
    PolicyState,
    basis_reason,
    history_reason,
    make_decision,
    phase_of_run_reason,
    rest,
)

FITTED_WINDOWS = 2  # of 1 to 4, two or three had the least error (see forecast.py for the curves)
MAX_FITTED_STEPS = 256  # keeps a decision below 0.2 ms whatever the window


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
        decision = make_decision(
            point,
            phase=Phase.PREDICT,
            horizon_steps=horizon_steps,
            coefficients=coefficients,
            forecast=forecast_at(curve, end_step=end_step, gained_steps=gained_steps),
            reason=f"line fit over {horizon_steps} steps",
        )
        self._proposals += 1  # last: a decision that fails changes nothing
        return decision

    def observe(self, observation: Observation, history: History) -> None:
        """A fixed rule learns nothing."""

    def settle(self, outcome: Outcome) -> None:
        """A fixed rule learns nothing."""

    def state(self) -> PolicyState:
        return PolicyState(values={"proposals": self._proposals})

    def load(self, state: PolicyState) -> None:
        values = state.values
        proposals = values.get("proposals")
        if type(proposals) is not int or proposals < 0 or len(values) != 1 or state.tensors:
            raise CheckpointError(f"not a state of the fixed policy: {dict(values)!r:.80}")
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
            phase_of_run_reason(self._settings, point)
            or history_reason(self._settings, point.history, curve)
            or basis_reason(point)
            or self._coefficient_reason(point)
        )

    def _coefficient_reason(self, point: DecisionInput) -> str:
        row = self._row(point.directions, self._next_horizon_steps())
        if not all(map(math.isfinite, row)):
            return "a coefficient is not finite"
        return "" if any(row) else "all gains are zero"
