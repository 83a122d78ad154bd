"""What the loop needs from the outside world, and the two simplest answers to it.

DecisionSource is where decisions, vetoes and requests come from. NoDecisions: a plain trainer.
RecordedDecisions: the decisions of a recording, so that a run can be repeated with no predictor.
The live one is inbox.Inbox. Implementations never raise because a predictor, monitor or server is away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from common.messages import Order, PhaseDecision


class DecisionSource(Protocol):
    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        """The decision for the window that ended at `step`, or None after `seconds`.

        With None as `seconds` (lockstep) it waits until the decision is there or the predictor is
        known to be gone.
        """

    def veto(self) -> str | None:
        """Reason of the monitor's veto that is in force, or None."""

    def take_orders(self) -> list[Order]:
        """Orders that have arrived since the last call. Never blocks."""


class NoDecisions:
    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        return None

    def veto(self) -> str | None:
        return None

    def take_orders(self) -> list[Order]:
        return []


class RecordedDecisions(NoDecisions):
    """Decisions by (step, attempt). Their generation is rewritten to the present one."""

    def __init__(self, decisions: Iterable[PhaseDecision], *, generation: int) -> None:
        self._decisions = {
            (d.base_step, d.base_attempt): replace(d, base_generation=generation) for d in decisions
        }

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        return self._decisions.get((step, attempt))
