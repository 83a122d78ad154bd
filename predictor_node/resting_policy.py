"""The policy of a run that is too short to try anything: it always rests, learns nothing and needs no torch.

What it spares is the learned policy's world model and what that would learn for nobody (common/trying.py).
"""

from __future__ import annotations

from common.errors import CheckpointError
from common.messages import Observation, Outcome, PhaseDecision
from common.settings import RunSettings
from common.trying import why_never
from predictor_node.history import History
from predictor_node.policy import LAST_WINDOW_FACTOR, DecisionInput, PolicyState, rest

_STATE = {"policy": "resting"}


class RestingPolicy:
    def __init__(self, settings: RunSettings) -> None:
        self._reason = why_never(settings) or "nothing to decide"
        self._window_steps = LAST_WINDOW_FACTOR * settings.trainer.window_steps

    def decide(self, point: DecisionInput) -> PhaseDecision:
        """Asked only by a trainer that keeps directions all the same."""
        return rest(point, reason=self._reason, forecast=None, next_window_steps=self._window_steps)

    def observe(self, observation: Observation, history: History) -> None:
        """Nothing to learn for."""

    def settle(self, outcome: Outcome) -> None:
        """Nothing was tried."""

    def state(self) -> PolicyState:
        return PolicyState(values=dict(_STATE))

    def load(self, state: PolicyState) -> None:
        if dict(state.values) != _STATE or state.tensors:
            raise CheckpointError(f"not a state of the resting policy: {sorted(state.values)}")
