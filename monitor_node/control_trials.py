"""Trials of controls: the join of decisions and outcomes in the order of the history. Pure; keeps no state.

Decisions and outcomes come on two streams without a common order (a monitor that starts late reads outcomes
first). So outcomes and restores are kept in the order in which the trainer told them, and what each decision
asked for is looked up: the result does not depend on who came first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from common import control_rules
from common import messages as m
from common.control_rules import NEUTRAL, is_beside_twin
from common.trial_seen import Seen, is_kept, seen_of

MOST_LOG2 = 40.0  # beyond it a factor is not meant
_MOST_TEXT = 200
_MOST_STEPS = 1 << 53  # and tokens: a page's numbers are floats
_SAME = 1e-6  # relative: a factor that went through a logarithm and back

Key = tuple[int, str]  # generation of the trainer (0 = not known), decision id
Factors = tuple[float, float]  # rate, batch
Kept = tuple[int, m.Controls]  # last step of the probation, from which on they stay


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a decision asks for."""

    controls: m.Controls | None  # None: of values that cannot be told
    base_step: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """An outcome that may be that of a trial, with what the trainer showed before it."""

    key: Key
    outcome: m.Outcome
    factors: Factors | None  # in force before it; None where no step was seen


@dataclass(frozen=True, kw_only=True, slots=True)
class Undone:
    """The run goes on behind this step with what was kept by then: a restore, a rollback or a resume."""

    step: int


Event = Settled | Undone


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    change: str  # "batch ×2"
    asked: Asked
    outcome: m.Outcome
    seen: Seen | None
    is_beside_twin: bool  # judged against a real run without it, not a forecast


def asked_by(decision: m.PhaseDecision) -> Asked | None:
    """None: a decision that leaves the controls as they stand."""
    if decision.phase is not m.Phase.PREDICT or decision.controls is None:
        return None
    return Asked(
        controls=decision.controls if is_sane(decision.controls) else None,
        base_step=decision.base_step,
        reason=decision.reason[:_MOST_TEXT],
    )


def append_event(events: list[Event], event: Event) -> None:
    """Restores in a row are kept as the one that went back furthest: refused jumps come by the hundred."""
    if events and isinstance(event, Undone) and isinstance(events[-1], Undone):
        event = Undone(step=min(event.step, events.pop().step))
    events.append(event)


def fold(
    kept: Sequence[Kept], events: Iterable[Event], asked: Mapping[Key, Asked]
) -> tuple[list[Kept], list[Trial]]:
    """(what is in force and what was before it, oldest first; every trial) after `events`."""
    stack, trials = list(kept), []
    for event in events:
        if isinstance(event, Undone):
            while stack and stack[-1][0] > event.step:
                stack.pop()
            continue
        wanted = asked_under(event.key, asked)
        if wanted is None:
            continue
        stands, outcome = standing(stack, event.factors), event.outcome
        change = change_words(stands, wanted.controls)
        if not change:
            continue  # a jump that leaves the controls as they stand
        seen = None
        if wanted.controls is not None:
            seen = seen_of(outcome, before=stands, after=wanted.controls)
        beside = wanted.controls is not None and is_beside_twin(wanted.controls, stands)
        trials.append(Trial(change=change, asked=wanted, outcome=outcome, seen=seen, is_beside_twin=beside))
        if is_kept(outcome) and wanted.controls is not None:
            stack.append((outcome.base_step + outcome.probation_steps, wanted.controls))
    return stack, trials


def standing(kept: Sequence[Kept], factors: Factors | None) -> m.Controls:
    """The newest kept ones; the factors by the trainer's word where that is another."""
    stands = kept[-1][1] if kept else NEUTRAL
    if factors is None or (_same(stands.rate_factor, factors[0]) and _same(stands.batch_factor, factors[1])):
        return stands
    return replace(stands, rate_factor=factors[0], batch_factor=factors[1])


def change_words(before: m.Controls, after: m.Controls | None) -> str:
    """ "batch ×2": what changes, for people; "" if nothing does."""
    if after is None:
        return "controls that are no numbers"
    if _same(before.rate_factor, after.rate_factor):
        before = replace(before, rate_factor=after.rate_factor)
    if _same(before.batch_factor, after.batch_factor):
        before = replace(before, batch_factor=after.batch_factor)
    return control_rules.words(before, after)[:_MOST_TEXT]


def is_sane(controls: m.Controls) -> bool:
    """Whether it can be told in numbers at all; how far a run may go is the trainer's question."""
    factors = (controls.rate_factor, controls.batch_factor)
    counts = (controls.context_tokens, controls.decay_start, controls.decay_steps)
    return all(2.0**-MOST_LOG2 <= factor <= 2.0**MOST_LOG2 for factor in factors) and all(
        0 <= count <= _MOST_STEPS for count in counts
    )


def asked_under(key: Key, asked: Mapping[Key, Asked]) -> Asked | None:
    """What the decision of an outcome asked for; None where it is not known, or asked for nothing."""
    if key[0]:
        return asked.get(key)
    return next((wanted for (_, name), wanted in asked.items() if name == key[1]), None)


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME)
