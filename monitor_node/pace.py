"""Does prediction pay? Progress per second of this run against the same trainer without prediction. Pure.

    progress = (real steps kept + what accepted jumps were worth in steps) / seconds
    plain    = (real steps kept + real steps undone) / (seconds - seconds spent for prediction)

Seconds are the trainer's own (timing.py) without held-out losses and checkpoints, which plain training pays
as well. A jump of h virtual steps is not taken to be worth h steps: its worth is how many ordinary steps the
loss fell by from before the jump to the end of probation, less the steps of the probation, at most h either
way; an ordinary step brings what the training loss fell by over the 64 steps before. That is noisy for one
jump, and those that are kept look better than they are, having been kept for it. What keeping averages adds
to every step is not in the account: below two percent this knows little. The mean step, not the median: a
slow step would be as slow without prediction.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from common.messages import Outcome, Verdict
from monitor_node import timing
from monitor_node.timing import Account, TimeBook

MIN_STEPS = 64  # before there is a word on it
MAX_JUMPS = 1024
_NO_STEP = 1 << 62  # above all
_LEAST_SECONDS = 1e-3
FOR_PREDICTION = (
    timing.VERIFICATION, timing.SNAPSHOTS, timing.JUMPS, timing.WINDOWS, timing.WAITING, timing.CORRECTIONS
)  # fmt: skip
PLAIN_AS_WELL = (timing.EVALUATION, timing.CHECKPOINTS)


def worth_steps(outcome: Outcome, fall_per_step: float | None) -> float:
    """Real steps that a jump has spared, below 0 if it cost some; 0 where the losses do not show any.

    `fall_per_step`: of the training loss before the jump, nats.
    """
    if outcome.verdict is not Verdict.ACCEPTED or outcome.probation_steps < 1:
        return 0.0
    fell_by = outcome.loss_before - outcome.loss_end
    if fall_per_step is None or not fall_per_step > 0.0 or not math.isfinite(fell_by):
        return 0.0
    horizon_steps = float(outcome.horizon_steps)
    return max(-horizon_steps, min(horizon_steps, fell_by / fall_per_step - outcome.probation_steps))


@dataclass(kw_only=True)
class WorthBook:
    """What all accepted jumps up to a step were worth. Bounded: two old jumps become one, again and again."""

    # (base step, worth of all so far, their virtual steps)
    _upto: list[tuple[int, float, int]] = field(default_factory=list)

    def add(self, outcome: Outcome, fall_per_step: float | None) -> None:
        if outcome.verdict is not Verdict.ACCEPTED:
            return
        worth, virtual = self.before(_NO_STEP)
        worth += worth_steps(outcome, fall_per_step)
        self._upto.append((outcome.base_step, worth, virtual + outcome.horizon_steps))
        if len(self._upto) > MAX_JUMPS:
            half = MAX_JUMPS // 2
            self._upto = [*self._upto[1:half:2], *self._upto[half:]]

    def undo_from(self, step: int) -> None:
        while self._upto and self._upto[-1][0] >= step:
            self._upto.pop()

    def before(self, step: int) -> tuple[float, int]:
        """Worth and virtual steps of the jumps that began below this step."""
        place = bisect_left(self._upto, step, key=lambda entry: entry[0])
        return self._upto[place - 1][1:] if place else (0.0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    progress_per_second: float
    plain_progress_per_second: float
    kept_steps: int
    lost_steps: int
    virtual_steps: int
    worth_steps: float  # of the virtual ones
    cost_share: float  # of the time, for prediction

    @property
    def saved_share(self) -> float:
        """Of the time that plain training takes; below 0 it costs more than that."""
        return 1.0 - self.plain_progress_per_second / self.progress_per_second


def pace_between(older: Account, newer: Account, worth: WorthBook) -> Pace | None:
    """None where no step was kept or no time went by."""
    kept_steps, lost_steps = newer.step - older.step, max(0, newer.lost_steps - older.lost_steps)
    seconds = newer.total_seconds - older.total_seconds - _spent(older, newer, *PLAIN_AS_WELL)
    cost_seconds = _spent(older, newer, *FOR_PREDICTION)
    (worth_then, virtual_then), (worth_now, virtual_now) = worth.before(older.step), worth.before(newer.step)
    worth_here = worth_now - worth_then
    if kept_steps < 1 or seconds - cost_seconds < _LEAST_SECONDS or kept_steps + worth_here <= 0.0:
        return None
    return Pace(
        progress_per_second=(kept_steps + worth_here) / seconds,
        plain_progress_per_second=(kept_steps + lost_steps) / (seconds - cost_seconds),
        kept_steps=kept_steps,
        lost_steps=lost_steps,
        virtual_steps=virtual_now - virtual_then,
        worth_steps=worth_here,
        cost_share=cost_seconds / seconds,
    )


def _spent(older: Account, newer: Account, *purposes: str) -> float:
    return max(0.0, newer.of(*purposes) - older.of(*purposes))


def whole_pace(book: TimeBook, worth: WorthBook) -> Pace | None:
    """Since the first account of the trainer's newest start; None before MIN_STEPS."""
    if len(book.accounts) < 2:
        return None
    found = pace_between(book.accounts[0], book.accounts[-1], worth)
    return found if found is not None and found.kept_steps >= MIN_STEPS else None


def pace_rows(book: TimeBook, worth: WorthBook) -> list[tuple[int, float, float]]:
    """(step, progress per second, plain progress per second), each of the last minutes before that step."""
    rows = []
    for place in range(1, len(book.accounts)):
        newer = book.accounts[place]
        found = pace_between(book.before(place, seconds=timing.RECENT_SECONDS), newer, worth)
        if found is not None:
            pair = round(found.progress_per_second, 6), round(found.plain_progress_per_second, 6)
            rows.append((newer.step, *pair))
    return rows


def pace_section(pace: Pace | None, *, steps_are_alike: bool = True) -> dict[str, Any]:
    """`steps_are_alike`: False where controls were changed: then steps of this run and of plain training are
    not worth the same, and what was saved is not known.
    """
    if pace is None:
        because = f"known after {MIN_STEPS} steps and two accounts of the trainer's time"
        return {
            "progress_per_second": None,
            "plain_progress_per_second": None,
            "saved_share": None,
            "because": because,
        }
    return {
        "progress_per_second": round(pace.progress_per_second, 6),
        "plain_progress_per_second": round(pace.plain_progress_per_second, 6),
        "saved_share": round(pace.saved_share, 4) if steps_are_alike else None,
        "because": (
            f"of {pace.kept_steps + pace.lost_steps:,} steps taken {pace.lost_steps:,} were undone;"
            f" the {pace.virtual_steps:,} virtual steps were worth {pace.worth_steps:.0f} by their losses;"
            f" prediction took {pace.cost_share:.1%} of the time"
            + ("" if steps_are_alike else "; steps with other controls are not worth the same")
        ),
    }
