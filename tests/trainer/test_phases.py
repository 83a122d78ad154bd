import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Controls, Phase, PhaseDecision, Verdict
from tests.references import OBJECTIONS_IN_ORDER, PHASE_TABLE
from trainer_node.phases import (
    MAX_CHUNKS,
    MAX_HORIZON_WINDOWS,
    MAX_ID_CHARACTERS,
    MAX_WINDOW_STRETCH,
    PhaseRules,
    PhaseState,
    Position,
    after_decision,
    after_judgement,
    after_step,
    first_state,
    objection,
    window_length,
)

RULES = PhaseRules(statistics_steps=3, window_steps=4, probation_steps=5, total_steps=100)
POSITION = Position(generation=2, step=40, attempt=1, fingerprint="abc", num_groups=2, num_directions=4)
AT_DECISION = PhaseState(Phase.FULL, 0, windows=3, used_decision="20.0")
VALID = PhaseDecision(
    decision_id="40.1",
    phase=Phase.PREDICT,
    horizon_steps=10,
    num_groups=2,
    num_directions=4,
    coefficients=(0.5,) * 8,
    controls=Controls(),
    forecast=None,
    base_generation=2,
    base_step=40,
    base_attempt=1,
    base_fingerprint="abc",
    valid_until_step=40,
    reason="test",
)

STALE = [
    {"base_generation": 1},
    {"base_step": 39},
    {"base_attempt": 0},
    {"base_fingerprint": "abd"},
    {"valid_until_step": 39},
]
MALFORMED = [
    {"phase": Phase.CORRECT},
    {"phase": Phase.WARMUP},
    {"horizon_steps": 0},
    {"horizon_steps": -5},
    {"horizon_steps": MAX_HORIZON_WINDOWS * RULES.window_steps + 1},
    {"coefficients": (0.5,) * 7},
    {"coefficients": (0.5,) * 9},
    {"coefficients": ()},
    {"coefficients": (0.5,) * 7 + (math.nan,)},
    {"coefficients": (math.inf,) + (0.5,) * 7},
    {"num_groups": 4, "num_directions": 2},
    {"num_groups": 3},
    {"chunks": 0},
    {"chunks": MAX_CHUNKS + 1},
    {"correction_share": -0.1},
    {"correction_share": 1.1},
    {"correction_share": math.nan},
    {"coefficients": (0.5,) * 7, "forecaster": b"phi"},
]


OF_CONTROLS = dataclasses.replace(VALID, horizon_steps=0, coefficients=(), controls=Controls(rate_factor=2.0))
MALFORMED_OF_CONTROLS = [
    {"controls": None},
    {"controls": Controls()},
    {"coefficients": (0.5,) * 8},
    {"forecaster": b"phi"},
    {"horizon_steps": -1},
    {"chunks": 0},
    {"correction_share": math.nan},
    {"decision_id": "4" * (MAX_ID_CHARACTERS + 1)},
]


def verdict_of(decision, *, position=POSITION, state=AT_DECISION, veto=None):
    return objection(decision, position=position, state=state, rules=RULES, veto=veto)


def test_a_valid_decision_meets_no_objection():
    assert verdict_of(VALID) is None
    longest = MAX_HORIZON_WINDOWS * RULES.window_steps
    assert verdict_of(dataclasses.replace(VALID, horizon_steps=longest)) is None
    assert verdict_of(dataclasses.replace(VALID, valid_until_step=41)) is None


@pytest.mark.parametrize("change", STALE, ids=str)
def test_a_decision_for_other_weights_is_stale(change):
    assert verdict_of(dataclasses.replace(VALID, **change)) is Verdict.STALE


@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_a_malformed_decision_is_refused(change):
    assert verdict_of(dataclasses.replace(VALID, **change)) is Verdict.MALFORMED


def test_a_missing_resting_used_or_vetoed_decision_is_not_applied():
    used = dataclasses.replace(AT_DECISION, used_decision="40.1")
    assert verdict_of(None) is Verdict.MISSING
    assert verdict_of(dataclasses.replace(VALID, phase=Phase.FULL, horizon_steps=0)) is Verdict.REST
    assert verdict_of(VALID, state=used) is Verdict.USED
    assert verdict_of(VALID, veto="memory") is Verdict.VETOED
    assert verdict_of(VALID, veto="") is Verdict.VETOED


@pytest.mark.parametrize(("step", "verdict"), [(95, None), (96, Verdict.MALFORMED)])
def test_a_jump_is_taken_only_if_its_probation_ends_within_the_run(step, verdict):
    decision = dataclasses.replace(VALID, base_step=step, valid_until_step=step)
    assert verdict_of(decision, position=dataclasses.replace(POSITION, step=step)) is verdict


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_of_several_objections_the_first_in_the_table_is_given(data):
    faults = data.draw(st.sets(st.sampled_from(OBJECTIONS_IN_ORDER)))
    decision, state, veto = VALID, AT_DECISION, None
    if Verdict.MALFORMED in faults:
        decision = dataclasses.replace(decision, **data.draw(st.sampled_from(MALFORMED)))
    if Verdict.REST in faults:
        decision = dataclasses.replace(decision, phase=Phase.FULL)
    if Verdict.STALE in faults:
        decision = dataclasses.replace(decision, **data.draw(st.sampled_from(STALE)))
    if Verdict.USED in faults:
        state = dataclasses.replace(state, used_decision=decision.decision_id)
    if Verdict.VETOED in faults:
        veto = "memory"
    if Verdict.MISSING in faults:
        decision = None
    wanted = next((verdict for verdict in OBJECTIONS_IN_ORDER if verdict in faults), None)
    assert verdict_of(decision, state=state, veto=veto) is wanted


def test_a_proposal_of_controls_alone_needs_others_than_those_in_force_and_no_delta():
    assert verdict_of(OF_CONTROLS) is None
    for change in MALFORMED_OF_CONTROLS:
        assert verdict_of(dataclasses.replace(OF_CONTROLS, **change)) is Verdict.MALFORMED, change
    there = dataclasses.replace(POSITION, controls=OF_CONTROLS.controls)
    assert verdict_of(OF_CONTROLS, position=there) is Verdict.MALFORMED
    assert verdict_of(dataclasses.replace(OF_CONTROLS, controls=Controls()), position=there) is None
    assert verdict_of(OF_CONTROLS, veto="memory") is Verdict.VETOED


@pytest.mark.parametrize("decision", [VALID, OF_CONTROLS])
def test_what_breaks_the_rules_of_controls_or_comes_too_late_is_malformed(decision):
    options = {"state": AT_DECISION, "rules": RULES, "veto": None}
    assert objection(decision, position=POSITION, breach="too fast", **options) is Verdict.MALFORMED
    for left_steps, verdict in [(5, None), (4, Verdict.MALFORMED)]:
        here = dataclasses.replace(POSITION, steps_left=left_steps)
        assert objection(decision, position=here, **options) is verdict


EVENTS = {
    "step": after_step,
    "apply": lambda state, rules: after_decision(state, "some id", rules),
    "go on": lambda state, rules: after_decision(state, None, rules),
    "judge": after_judgement,
}


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_the_machine_makes_the_transitions_of_the_table_and_no_other(data):
    rules = PhaseRules(
        statistics_steps=data.draw(st.integers(1, 5)),
        window_steps=data.draw(st.integers(2, 5)),
        probation_steps=data.draw(st.integers(1, 5)),
        total_steps=100,
    )
    lengths = {
        Phase.WARMUP: rules.statistics_steps,
        Phase.FULL: rules.window_steps,
        Phase.CORRECT: rules.probation_steps,
    }
    state, in_phase, windows = first_state(rules), 0, 0
    # Steps more often than the rest, and many of them: a cycle is up to 15 steps long.
    kinds = [*EVENTS, "step", "step", "step"]
    for event in data.draw(st.lists(st.sampled_from(kinds), min_size=40, max_size=80)):
        legal = PHASE_TABLE[state.phase, state.steps_left == 0]
        if event not in legal:
            with pytest.raises(ValueError):
                EVENTS[event](state, rules)
            continue
        following = EVENTS[event](state, rules)
        assert following.phase in legal[event]
        assert following.phase is not Phase.PREDICT
        if event == "step":
            in_phase += 1
            windows += following.is_decision_point
            if following.phase is not state.phase:
                assert in_phase == lengths[state.phase]
                in_phase = 0
        else:
            in_phase = 0
        assert following.steps_left == lengths[following.phase] - in_phase
        assert following.windows == windows
        assert following.used_decision == ("some id" if event == "apply" else state.used_decision)
        state = following


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_run_under_random_decisions_and_vetoes_applies_only_what_is_sound(data):
    """A loop in miniature: whatever comes, real steps go on and a bad decision never moves weights."""
    state, step, attempt, applied = first_state(RULES), 0, 0, []
    for _ in range(data.draw(st.integers(40, 80))):
        assert state.phase is not Phase.PREDICT
        if state.is_decision_point:
            here = dataclasses.replace(POSITION, step=step, attempt=attempt)
            change = data.draw(st.sampled_from([{}, *STALE, *MALFORMED]))
            fresh = dataclasses.replace(
                VALID, decision_id=f"{step}.{attempt}", base_step=step, base_attempt=attempt,
                valid_until_step=step,
            )  # fmt: skip
            if "base_step" in change or "valid_until_step" in change:
                change = dict.fromkeys(change, step - 1)
            if "base_attempt" in change:
                change = {"base_attempt": attempt - 1}
            decision = data.draw(st.sampled_from([None, fresh, dataclasses.replace(fresh, **change)]))
            again = data.draw(st.booleans()) and bool(applied)
            if again and decision is not None:
                decision = dataclasses.replace(decision, decision_id=applied[-1])
            veto = data.draw(st.sampled_from([None, "memory"]))
            verdict = objection(decision, position=here, state=state, rules=RULES, veto=veto)
            is_sound = decision == fresh and veto is None and decision.decision_id not in applied[-1:]
            assert (verdict is None) == (is_sound and step + RULES.probation_steps <= RULES.total_steps)
            state = after_decision(state, None if verdict else decision.decision_id, RULES)
            applied += [] if verdict else [decision.decision_id]
        elif state.is_judgement_point:
            if data.draw(st.booleans()):  # refused
                step, attempt = step - RULES.probation_steps, attempt + 1
            state = after_judgement(state, RULES)
        else:
            state, step = after_step(state, RULES), step + 1


def test_a_forecaster_may_come_without_coefficients():
    for coefficients in ((), VALID.coefficients):
        decision = dataclasses.replace(VALID, coefficients=coefficients, forecaster=b"phi")
        assert verdict_of(decision) is None


@pytest.mark.parametrize(
    ("asked", "given_steps"), [(0, 4), (4, 4), (9, 9), (1, 4), (-7, 4), (256, 256), (10**9, 256)]
)
def test_a_window_is_as_long_as_asked_within_bounds(asked, given_steps):
    assert MAX_WINDOW_STRETCH * RULES.window_steps == 256
    assert window_length(asked, RULES) == given_steps
    rested = after_decision(AT_DECISION, None, RULES, next_window_steps=asked)
    jumped = after_decision(AT_DECISION, "40.1", RULES, next_window_steps=asked)
    assert (jumped.phase, jumped.steps_left) == (Phase.CORRECT, RULES.probation_steps)
    judged = after_judgement(jumped, RULES)
    for state in (rested, judged):
        assert (state.phase, state.steps_left) == (Phase.FULL, given_steps)
        assert state.window_steps in (0, given_steps)


def test_a_long_window_is_followed_by_one_as_configured():
    state = after_decision(AT_DECISION, None, RULES, next_window_steps=9)
    for _ in range(9):
        assert not state.is_decision_point
        state = after_step(state, RULES)
    assert state.is_decision_point
    assert (state.windows, state.window_steps) == (AT_DECISION.windows + 1, 9)
    assert after_decision(state, None, RULES) == dataclasses.replace(
        AT_DECISION, steps_left=4, windows=AT_DECISION.windows + 1
    )
