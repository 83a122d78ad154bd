"""Forecasts that wait for the step they speak of, and what happened there. Owns no calibration.

What happened is the mean training loss of the newest steps that end there: one step alone is mostly noise.
A forecast whose step was undone or skipped is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from common.errors import CheckpointError
from common.messages import Observation
from predictor_node.history import History

AVERAGED_STEPS = 8  # at most; never more than the probation has
LIMIT = 64  # a decision point adds one, its step is a probation away: a few at most are ever open


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    decision_id: str
    end_step: int
    attempt: int
    key: str  # of the calibration
    forecast: float  # nats
    spread: float  # nats
    averaged_steps: int  # that what happened is the mean of


@dataclass(frozen=True, slots=True)
class Met:
    pending: Pending
    happened: float  # nats


class PendingForecasts:
    def __init__(self) -> None:
        self._open: list[Pending] = []

    def add(self, pending: Pending) -> None:
        self._open = [*self._open[-(LIMIT - 1) :], pending]

    def observe(self, observation: Observation, history: History) -> list[Met]:
        """Forecasts for this step, with what happened."""
        due = [p for p in self._open if p.end_step <= observation.step or p.attempt != observation.attempt]
        if not due:
            return []
        self._open = [p for p in self._open if p not in due]
        met = []
        for p in due:
            losses = [row.loss for row in history.fitted_rows(p.averaged_steps)]
            happened = math.fsum(losses) / len(losses) if losses else math.nan
            is_there = p.end_step == observation.step and p.attempt == observation.attempt
            if is_there and math.isfinite(happened):
                met.append(Met(p, happened))
        return met

    def drop(self, decision_id: str) -> None:
        self._open = [pending for pending in self._open if pending.decision_id != decision_id]

    def state(self) -> list[dict[str, object]]:
        return [asdict(pending) for pending in self._open]

    def load(self, state: list[Mapping[str, object]]) -> None:
        """Raises CheckpointError."""
        try:
            self._open = [Pending(**values) for values in state]  # type: ignore[arg-type]
        except TypeError as error:
            raise CheckpointError(f"damaged forecasts: {error}") from None
