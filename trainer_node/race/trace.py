"""What the messages of a run tell a race: its phases, and how its forecasts came out.

Sees every message of the trainer, in order; reads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common import features
from common.messages import APPLIED_VERDICTS, Message, Observation, Outcome, Phase, PhaseDecision, Verdict
from trainer_node.race.run_result import PhaseSpan

SMOOTHED_STEPS = 4  # on either side: a forecast is of the mean loss, a single batch is mostly noise
_LOSS = features.INDEX["loss"]


class Trace:
    def __init__(self) -> None:
        self._spans: list[PhaseSpan] = []
        self._losses: dict[int, float] = {}  # training loss by step; of an undone step the newer one
        self._kept_jumps: list[int] = []  # steps at which weights were moved for good

    def see(self, message: Message) -> None:
        if isinstance(message, Observation):
            self._see_step(message)
        elif isinstance(message, Outcome) and message.verdict in APPLIED_VERDICTS:
            self._see_jump(message)

    def phases(self) -> tuple[PhaseSpan, ...]:
        """In the order in which they were lived through: steps that were undone appear, then again."""
        return tuple(self._spans)

    def forecasts(
        self, decisions: Sequence[PhaseDecision], horizon_steps: int
    ) -> tuple[tuple[float, float, float], ...]:
        """(forecast, spread, what happened) of the loss without a jump, `horizon_steps` after each decision.

        Where a jump was undone, what happened is the road taken after it; a kept one leaves no answer.
        """
        found = []
        for decision in decisions:
            happened = self._mean_loss(decision.base_step, horizon_steps)
            if decision.forecast is not None and math.isfinite(happened):
                found.append((decision.forecast.loss_without, decision.forecast.spread, happened))
        return tuple(found)

    def _mean_loss(self, base_step: int, horizon_steps: int) -> float:
        """Mean training loss around the horizon; NaN where a kept jump or the end of the run came first."""
        end_step = base_step + horizon_steps
        first = max(base_step + 1, end_step - SMOOTHED_STEPS)
        # As many steps before as after it, so that a falling loss does not lean the mean.
        last = end_step + (end_step - first)
        if any(base_step <= jump < last for jump in self._kept_jumps):
            return math.nan
        losses = [self._losses.get(step, math.nan) for step in range(first, last + 1)]
        return sum(losses) / len(losses)

    def _see_step(self, message: Observation) -> None:
        self._losses[message.step] = message.features[_LOSS]
        last = self._spans[-1] if self._spans else None
        phase = message.phase.value
        if last is not None and last.phase == phase and last.last_step == message.step - 1:
            self._spans[-1] = _span(phase, last.first_step, message.step)
        else:
            self._spans.append(_span(phase, message.step, message.step))

    def _see_jump(self, outcome: Outcome) -> None:
        """Told at its end: the jump goes before the steps of its probation, and before those of a twin."""
        base_step = outcome.base_step
        if outcome.verdict is Verdict.ACCEPTED:
            self._kept_jumps.append(base_step)
        place = len(self._spans)
        while place and _is_leg(self._spans[place - 1], base_step):
            place -= 1
        self._spans.insert(place, _span(Phase.PREDICT.value, base_step, base_step, outcome.verdict))


def _is_leg(span: PhaseSpan, base_step: int) -> bool:
    return span.phase == Phase.CORRECT.value and span.first_step == base_step + 1


def _span(phase: str, first_step: int, last_step: int, verdict: Verdict | None = None) -> PhaseSpan:
    return PhaseSpan(
        phase=phase, first_step=first_step, last_step=last_step, verdict=verdict.value if verdict else ""
    )
