"""The phase machine: pure. State x event -> state; a decision -> what is wrong with it, if anything.

    WARMUP --statistics_steps--> FULL --window_steps--> decision point --apply--> (PREDICT) CORRECT
                                  ^                        | rest or refusal           | probation_steps
                                  +------------------------+-----------<---------------+ judgement point

PREDICT takes no real step, so it is never a resting state: the loop passes through it. Owns no
weights, no clock, no bus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from common.messages import Phase, PhaseDecision, Verdict

# A proposal may stand for at most this many windows; beyond it the horizon is a mistake, not a plan
# (useful jumps in shared notes reached 8 windows).
MAX_HORIZON_WINDOWS = 64


@dataclass(frozen=True, slots=True)
class PhaseRules:
    statistics_steps: int
    window_steps: int
    probation_steps: int
    total_steps: int


@dataclass(frozen=True, slots=True)
class PhaseState:
    phase: Phase
    steps_left: int  # real steps until this phase ends
    windows: int = 0  # FULL windows finished
    used_decision: str = ""  # id of the last decision that was applied

    @property
    def is_decision_point(self) -> bool:
        return self.phase is Phase.FULL and self.steps_left == 0

    @property
    def is_judgement_point(self) -> bool:
        return self.phase is Phase.CORRECT and self.steps_left == 0


@dataclass(frozen=True, slots=True)
class Position:
    """Where the trainer is when it looks at a decision."""

    generation: int
    step: int
    attempt: int
    fingerprint: str
    num_groups: int
    num_directions: int


def first_state(rules: PhaseRules) -> PhaseState:
    return PhaseState(Phase.WARMUP, rules.statistics_steps)


def after_step(state: PhaseState, rules: PhaseRules) -> PhaseState:
    """One real step was taken."""
    if state.steps_left < 1 or state.phase is Phase.PREDICT:
        raise ValueError(f"no real step is due in {state}")
    state = replace(state, steps_left=state.steps_left - 1)
    if state.phase is Phase.WARMUP and state.steps_left == 0:
        return replace(state, phase=Phase.FULL, steps_left=rules.window_steps)
    if state.is_decision_point:
        return replace(state, windows=state.windows + 1)
    return state


def after_decision(state: PhaseState, decision_id: str | None, rules: PhaseRules) -> PhaseState:
    """Leave a decision point: into probation with the id of an applied decision, else into a window."""
    if not state.is_decision_point:
        raise ValueError(f"no decision is due in {state}")
    if decision_id is None:
        return replace(state, steps_left=rules.window_steps)
    return replace(state, phase=Phase.CORRECT, steps_left=rules.probation_steps, used_decision=decision_id)


def after_judgement(state: PhaseState, rules: PhaseRules) -> PhaseState:
    """Probation is over, whatever the verdict."""
    if state.phase is not Phase.CORRECT:
        raise ValueError(f"no judgement is due in {state}")
    return replace(state, phase=Phase.FULL, steps_left=rules.window_steps)


def objection(
    decision: PhaseDecision | None,
    *,
    position: Position,
    state: PhaseState,
    rules: PhaseRules,
    veto: str | None,
) -> Verdict | None:
    """Why this decision must not be applied, or None if it may be. Refusals are values."""
    if decision is None:
        return Verdict.MISSING
    if (
        decision.base_generation != position.generation
        or decision.base_step != position.step
        or decision.base_attempt != position.attempt
        or decision.base_fingerprint != position.fingerprint
        or position.step > decision.valid_until_step
    ):
        return Verdict.STALE
    if decision.phase is Phase.FULL:
        return Verdict.REST
    if decision.decision_id == state.used_decision:
        return Verdict.USED
    if not _is_well_formed(decision, position, rules):
        return Verdict.MALFORMED
    if veto is not None:
        return Verdict.VETOED
    return None


def _is_well_formed(decision: PhaseDecision, position: Position, rules: PhaseRules) -> bool:
    return (
        decision.phase is Phase.PREDICT
        and 1 <= decision.horizon_steps <= MAX_HORIZON_WINDOWS * rules.window_steps
        and decision.num_groups == position.num_groups
        and decision.num_directions == position.num_directions
        and len(decision.coefficients) == position.num_groups * position.num_directions
        and all(math.isfinite(c) for c in decision.coefficients)
        and position.step + rules.probation_steps <= rules.total_steps
    )
