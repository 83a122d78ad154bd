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

from common.control_rules import NEUTRAL
from common.messages import Controls, Phase, PhaseDecision, Verdict

# A proposal may stand for at most this many windows; beyond it the horizon is a mistake, not a plan
# (useful jumps in shared notes reached 8 windows).
MAX_HORIZON_WINDOWS = 64
# A window may be this many times longer than configured: a resting run still asks now and then.
MAX_WINDOW_STRETCH = 64
MAX_CHUNKS = 64
# Of an id that Outcome repeats: with a longer one the outcome might not fit into a message.
MAX_ID_CHARACTERS = 128


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
    window_steps: int = 0  # length of the present or the coming window; 0 = as configured

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
    controls: Controls = NEUTRAL  # in force
    trial_steps: int = 0  # until the controls that are wanted are judged; 0 = the probation of the rules
    steps_left: int | None = None  # real ones, with the controls that are wanted; None: by the rules


def first_state(rules: PhaseRules) -> PhaseState:
    return PhaseState(Phase.WARMUP, rules.statistics_steps)


def window_length(asked_steps: int, rules: PhaseRules) -> int:
    """Real steps of a window for which a decision asks `asked_steps`; 0 = as configured.

    Clamped rather than refused: a length moves no weight, so a wrong one is no reason to lose a jump.
    """
    if asked_steps == 0:
        return rules.window_steps
    return max(rules.window_steps, min(MAX_WINDOW_STRETCH * rules.window_steps, asked_steps))


def after_step(state: PhaseState, rules: PhaseRules) -> PhaseState:
    """One real step was taken."""
    if state.steps_left < 1 or state.phase is Phase.PREDICT:
        raise ValueError(f"no real step is due in {state}")
    steps_left, windows = state.steps_left - 1, state.windows
    if steps_left == 0 and state.phase is Phase.WARMUP:
        return _new_window(replace(state, steps_left=0), 0, rules)
    if steps_left == 0 and state.phase is Phase.FULL:
        windows += 1
    # Not `replace`: behind a step of training it takes 30 us, and this is done after every one.
    return PhaseState(state.phase, steps_left, windows, state.used_decision, state.window_steps)


def after_decision(
    state: PhaseState,
    decision_id: str | None,
    rules: PhaseRules,
    *,
    next_window_steps: int = 0,
    trial_steps: int = 0,
) -> PhaseState:
    """Leave a decision point: into probation with the id of an applied decision, else into a window.

    `next_window_steps` is the length asked for the coming window, which is after probation if there is one;
    `trial_steps` that of the probation, 0 = as configured.
    """
    if not state.is_decision_point:
        raise ValueError(f"no decision is due in {state}")
    if decision_id is None:
        return _new_window(state, next_window_steps, rules)
    return replace(
        state,
        phase=Phase.CORRECT,
        steps_left=trial_steps or rules.probation_steps,
        used_decision=decision_id,
        window_steps=next_window_steps,
    )


def before_twin(state: PhaseState, twin_steps: int) -> PhaseState:
    """A trial's steps are taken, those of the run without it are due before both are judged."""
    if not state.is_judgement_point:
        raise ValueError(f"no judgement is due in {state}")
    return replace(state, steps_left=twin_steps)


def after_judgement(state: PhaseState, rules: PhaseRules) -> PhaseState:
    """Probation is over, whatever the verdict."""
    if state.phase is not Phase.CORRECT:
        raise ValueError(f"no judgement is due in {state}")
    return _new_window(state, state.window_steps, rules)


def _new_window(state: PhaseState, asked_steps: int, rules: PhaseRules) -> PhaseState:
    steps = window_length(asked_steps, rules)
    stored = 0 if steps == rules.window_steps else steps
    return replace(state, phase=Phase.FULL, steps_left=steps, window_steps=stored)


def objection(
    decision: PhaseDecision | None,
    *,
    position: Position,
    state: PhaseState,
    rules: PhaseRules,
    veto: str | None,
    breach: str = "",
) -> Verdict | None:
    """Why this decision must not be applied, or None if it may be. Refusals are values.

    `breach` says what is wrong with its controls (controls.py), "" = nothing.
    """
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
    if breach or not _is_well_formed(decision, position, rules):
        return Verdict.MALFORMED
    if veto is not None:
        return Verdict.VETOED
    return None


def is_of_controls(decision: PhaseDecision) -> bool:
    """A proposal that moves no weight: other controls, on probation."""
    return decision.horizon_steps == 0 and decision.controls is not None


def _is_well_formed(decision: PhaseDecision, position: Position, rules: PhaseRules) -> bool:
    left_steps = rules.total_steps - position.step if position.steps_left is None else position.steps_left
    return (
        decision.phase is Phase.PREDICT
        and len(decision.decision_id) <= MAX_ID_CHARACTERS
        and (_changes_controls if is_of_controls(decision) else _has_delta)(decision, position, rules)
        and 1 <= decision.chunks <= MAX_CHUNKS
        and 0.0 <= decision.correction_share <= 1.0
        and (position.trial_steps or rules.probation_steps) <= left_steps
    )


def _changes_controls(decision: PhaseDecision, position: Position, rules: PhaseRules) -> bool:
    has_no_delta = not decision.coefficients and not decision.forecaster
    return has_no_delta and decision.controls != position.controls


def _has_delta(decision: PhaseDecision, position: Position, rules: PhaseRules) -> bool:
    return (
        1 <= decision.horizon_steps <= MAX_HORIZON_WINDOWS * rules.window_steps
        and decision.num_groups == position.num_groups
        and decision.num_directions == position.num_directions
        and len(decision.coefficients) in _lengths(decision, position)
        and all(math.isfinite(c) for c in decision.coefficients)
    )


def _lengths(decision: PhaseDecision, position: Position) -> tuple[int, ...]:
    """A forecaster may come without coefficients."""
    whole = position.num_groups * position.num_directions
    return (whole, 0) if decision.forecaster else (whole,)
