"""A policy for jumps with a pilot before it: controls have the first word at every decision point.

Owns the order of the two. Where the pilot has nothing to say, the policy answers as it would alone, but for
the length of the next window: while the pilot may still act, it is at most twice the usual one. A trial of
controls is no jump: the policy neither decides nor learns from its outcome, only from its steps.
"""

from __future__ import annotations

from dataclasses import replace

from common.errors import CheckpointError
from common.messages import Observation, Outcome, PhaseDecision
from common.settings import RunSettings
from predictor_node.history import History
from predictor_node.pilot import Pilot
from predictor_node.policy import DecisionInput, Policy, PolicyState

LONGEST_WINDOW_FACTOR = 2
_PILOT = "pilot"


def without_pilot(state: PolicyState) -> PolicyState:
    """For a run that goes on with all controls off."""
    values = {name: value for name, value in state.values.items() if name != _PILOT}
    return replace(state, values=values)


class PilotedPolicy:
    def __init__(self, settings: RunSettings, jumps: Policy) -> None:
        self.pilot, self.jumps = Pilot(settings), jumps
        self._longest_steps = LONGEST_WINDOW_FACTOR * settings.trainer.window_steps

    def observe(self, observation: Observation, history: History) -> None:
        self.pilot.observe(observation)
        self.jumps.observe(observation, history)

    def decide(self, point: DecisionInput) -> PhaseDecision:
        proposal = self.pilot.propose(point)
        if proposal is not None:
            return proposal
        step = point.observation.step
        here = replace(point, clock=self.pilot.clock_at(step), controls=self.pilot.in_force.controls)
        decision = self.jumps.decide(here)
        if decision.next_window_steps > self._longest_steps and self.pilot.may_act_later(step):
            return replace(decision, next_window_steps=self._longest_steps)
        return decision

    def settle(self, outcome: Outcome) -> None:
        if not self.pilot.settle(outcome):
            self.jumps.settle(outcome)

    def state(self) -> PolicyState:
        inner = self.jumps.state()
        return PolicyState(values={**inner.values, _PILOT: self.pilot.state()}, tensors=inner.tensors)

    def load(self, state: PolicyState) -> None:
        """A state of a run whose controls were all off has no pilot: it begins here.

        Raises CheckpointError.
        """
        pilot = state.values.get(_PILOT)
        self.jumps.load(without_pilot(state))
        if pilot is None:
            return
        if not isinstance(pilot, dict):
            raise CheckpointError("damaged state of the pilot: not a table")
        self.pilot.load(pilot)
