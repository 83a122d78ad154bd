"""What this run has shown so far: the newest observations, holes and set-backs accounted for.

Immutable: `append` returns a new History, so a snapshot costs nothing and a handler that fails
half-way leaves the old one in force. Decides nothing.
A repeat (same or older attempt, step already seen) is dropped. A set-back (attempt raised, step
not above the last) cuts back to the restored step: abandoned steps are not learned from. A hole
(steps that never arrived) restarts `contiguous_steps`; steps from before it stay as memory, but
no curve is fitted across it. Beside a twin (trainer_node/control_twin.py) the steps of a trial are set back
and come back if it is kept: what is set back for steps on trial is put aside until the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common import features
from common.messages import Observation, Outcome, Phase, Verdict

LIMIT_STEPS = 512  # two windows of 256; a longer window is fitted on its newest steps
_LOSS = features.INDEX["loss"]


@dataclass(frozen=True, slots=True)
class Row:
    """One real step as it was observed."""

    step: int
    attempt: int
    phase: Phase
    features: tuple[float, ...]  # (F) see common.features
    contiguous_steps: int  # steps without a hole that end here, >= 1

    @property
    def loss(self) -> float:
        """Training loss in nats."""
        return self.features[_LOSS]


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    rows: tuple[Row, ...] = ()  # oldest first, steps strictly rising, at most LIMIT_STEPS
    resuming: bool = False  # the next observation may carry any attempt
    missing_steps: int = 0  # steps skipped at holes
    repeats: int = 0  # observations dropped because they were known
    # Steps that were set back for others on trial. No state is saved before the verdict.
    aside: tuple[Row, ...] = ()

    @property
    def last(self) -> Row | None:
        return self.rows[-1] if self.rows else None

    @property
    def contiguous_steps(self) -> int:
        """Newest steps without a hole; may exceed the rows that are kept."""
        return self.rows[-1].contiguous_steps if self.rows else 0

    def is_repeat(self, observation: Observation) -> bool:
        last = self.last
        if last is None or self.resuming or observation.attempt > last.attempt:
            return False
        return observation.attempt < last.attempt or observation.step <= last.step

    def append(self, observation: Observation) -> History:
        if self.is_repeat(observation):
            return replace(self, repeats=self.repeats + 1)
        rows = _through(self.rows, observation.step - 1)
        contiguous_steps, missing_steps = 1, 0
        if rows:
            missing_steps = observation.step - 1 - rows[-1].step
            if not missing_steps and not self._hides_a_set_back(observation):
                contiguous_steps = rows[-1].contiguous_steps + 1
        row = Row(
            observation.step, observation.attempt, observation.phase, observation.features, contiguous_steps
        )
        return History(
            rows=(*rows[-(LIMIT_STEPS - 1) :], row),
            missing_steps=self.missing_steps + missing_steps,
            repeats=self.repeats,
            aside=self._aside(observation),
        )

    def _aside(self, observation: Observation) -> tuple[Row, ...]:
        if observation.phase is not Phase.CORRECT:
            return ()
        return tuple(row for row in self.rows if row.step >= observation.step) or self.aside

    def after(self, outcome: Outcome) -> History:
        """Where the run goes on from the end of what was put aside, that comes back: what was seen since is
        undone."""
        last, is_kept = self.last, outcome.verdict is Verdict.ACCEPTED
        stands = outcome.base_step + (outcome.probation_steps if is_kept else 0)
        is_back = last is not None and outcome.lost_steps > 0 and outcome.attempt > last.attempt
        if not is_back or not self.aside or self.aside[-1].step != stands:
            return self
        first = self.aside[0]
        before = (row for row in self.rows if row.step < first.step and row.attempt <= first.attempt)
        again = (replace(row, attempt=outcome.attempt) for row in self.aside)
        return replace(self, rows=(*before, *again)[-LIMIT_STEPS:], aside=())

    def resume_at(self, step: int) -> History:
        """The history of a run that goes on behind `step`; what lies beyond is forgotten."""
        return replace(self, rows=_through(self.rows, step), resuming=True, aside=())

    def fitted_rows(self, count: int) -> tuple[Row, ...]:
        """The newest rows, at most `count`, none from before the last hole."""
        return self.rows[-min(count, self.contiguous_steps, LIMIT_STEPS) :] if self.rows else ()

    def _hides_a_set_back(self, observation: Observation) -> bool:
        """An attempt never seen at all: some of the kept rows may have been undone meanwhile."""
        last = self.last
        return last is not None and not self.resuming and observation.attempt > last.attempt + 1


def _through(rows: tuple[Row, ...], step: int) -> tuple[Row, ...]:
    """Rows up to and including this step."""
    kept = len(rows)
    while kept and rows[kept - 1].step > step:
        kept -= 1
    return rows[:kept]
