"""Jumps with what was said for them: outcomes joined with decisions, bounded. Pure; decides nothing.

They come on two streams without a common order: beside a run both in one read, and to a monitor that starts
late decisions come hundreds ahead of their outcomes, or behind them where old history was trimmed. So both
are kept and joined when somebody looks: the result does not depend on who came first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from common import messages as m
from common.trial_seen import is_kept

ProposalMark = tuple[int, int, str, float | None, float | None, str]
Key = tuple[int, str]  # generation of the trainer (0 = not known), decision id

MAX_OUTCOMES = 400
MAX_DECISIONS = 4096  # of jumps: what is kept of one is a line of text
NEWEST_ROWS = 12
_MOST_TEXT = 200

_WHY = {
    m.Verdict.ACCEPTED: "kept: no worse than without the jump",
    m.Verdict.REFUSED: "undone: worse than without the jump",
    m.Verdict.RUINED: "undone at once: the loss was beyond the ruin bound",
    m.Verdict.ABORTED: "undone: the run was stopped on probation",
    m.Verdict.STALE: "not taken: it came too late",
    m.Verdict.USED: "not taken: it was applied before",
    m.Verdict.VETOED: "not taken: the monitor vetoes",
    m.Verdict.MALFORMED: "not taken: it cannot be applied",
    m.Verdict.FAILED: "undone or not taken: no room for it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What is kept of a decision, whose coefficients may be many."""

    reason: str
    predicted_loss: float | None  # nats


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalRow:
    outcome: m.Outcome
    said: Said | None  # None: not seen, e.g. trimmed away
    at_unix_seconds: float


@dataclass(kw_only=True)
class ProposalBook:
    _generation: int = 0
    _said: dict[Key, Said] = field(default_factory=dict)
    _outcomes: list[tuple[Key, m.Outcome, float]] = field(default_factory=list)
    _marks: list[ProposalMark] | None = None  # of these, until the next message

    def started(self, generation: int) -> None:
        self._generation = generation

    def decided(self, decision: m.PhaseDecision) -> None:
        if decision.horizon_steps <= 0:
            return
        self._said[decision.base_generation, decision.decision_id] = said_by(decision)
        if len(self._said) > MAX_DECISIONS:
            del self._said[next(iter(self._said))]
        self._marks = None

    def settled(self, outcome: m.Outcome, at_unix_seconds: float) -> None:
        if outcome.horizon_steps <= 0:
            return
        key = (self._generation, outcome.decision_id)
        self._outcomes.append((key, outcome, at_unix_seconds))
        self._marks = None
        if len(self._outcomes) > MAX_OUTCOMES:
            gone = {key for key, _, _ in self._outcomes[: MAX_OUTCOMES // 2]}
            del self._outcomes[: MAX_OUTCOMES // 2]
            for key in gone.difference(key for key, _, _ in self._outcomes):
                self._said.pop(key, None)

    @property
    def rows(self) -> list[ProposalRow]:
        """The newest, oldest first."""
        return [
            ProposalRow(outcome=outcome, said=self._said_under(key), at_unix_seconds=at)
            for key, outcome, at in self._outcomes[-NEWEST_ROWS:]
        ]

    @property
    def marks(self) -> list[ProposalMark]:
        if self._marks is None:
            self._marks = [
                proposal_mark(outcome, self._said_under(key)) for key, outcome, _ in self._outcomes
            ]
        return self._marks

    def _said_under(self, key: Key) -> Said | None:
        if key[0]:
            return self._said.get(key)
        return next((said for (_, name), said in self._said.items() if name == key[1]), None)


def said_by(decision: m.PhaseDecision) -> Said:
    forecast = decision.forecast
    return Said(reason=decision.reason[:_MOST_TEXT], predicted_loss=forecast.loss if forecast else None)


def proposal_mark(outcome: m.Outcome, said: Said | None) -> ProposalMark:
    """(base step, horizon, verdict, loss without the jump, loss with it, why).

    Losses are on the guard batches at the end of probation, nats; the one without is the trainer's forecast.
    """
    return (
        outcome.base_step,
        outcome.horizon_steps,
        outcome.verdict.value,
        _known(outcome.loss_forecast),
        _known(outcome.loss_end),
        why(outcome, said),
    )


def why(outcome: m.Outcome, said: Said | None) -> str:
    """What became of it, with the losses that decided, and what the predictor said for it."""
    text = _WHY.get(outcome.verdict, outcome.verdict.value)
    if outcome.verdict is m.Verdict.REFUSED and is_kept(outcome):
        text = "kept: its loss was not finite, but without the guard nothing is undone"
    if math.isfinite(outcome.loss_end) and math.isfinite(outcome.loss_forecast):
        text += f" ({outcome.loss_end:.4g} with it, {outcome.loss_forecast:.4g} without)"
    return f"{text}; proposed as {said.reason}" if said is not None and said.reason else text


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
