"""Each law of the campaign holds for an honest run and is broken by a forged breach of it.

The honest run is the recorded one in tests/fixtures; a forgery changes one thing in its evidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import codec
from common.bus import STREAM_START, Entry, EntryId
from common.features import INDEX
from common.messages import APPLIED_VERDICTS, Observation, Outcome, PhaseDecision
from common.recording import read_recording
from common.streams import DECISIONS, HISTORY
from tests.campaign.laws import LAWS, Evidence, holes, violations
from tests.campaign.lineage import lineage, taken_decisions
from tests.campaign.lives import Life, expected, lives_of

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "digits-lockstep.hpt"
MODEL = b"the weights of the end"


@pytest.fixture(scope="module")
def honest() -> Evidence:
    entries = read_recording(FIXTURE).entries
    return evidence_of(list(entries), [Life(generation=1, behind=STREAM_START, missing=())])


def evidence_of(entries: list[Entry], lives: list[Life]) -> Evidence:
    """As evidence.gather would, of a run that left these entries."""
    made = expected(entries, lives)
    ended = [codec.decode_entry(e) for e in entries if e.kind == "RunEnded"]
    newest = list(made.states)[-1:]
    return Evidence(
        entries=entries,
        recording=entries,
        recording_fault="",
        data_was_lost=False,
        lives=lives,
        expected=made,
        saved_states={name: made.states[name] for name in newest},
        broken_checkpoints=[],
        model=MODEL,
        replayed_model=MODEL,
        taken=taken_decisions(entries, lineage(entries), {})[0],
        undecided=taken_decisions(entries, lineage(entries), {})[1],
        summary={"status": "finished", "real_steps": ended[-1].step, "val_loss_last": 0.1},
        steps=ended[-1].step,
        unpublished_told=False,
        stack_traces=[],
        attack_notes=[],
    )


def test_an_honest_run_breaks_no_law(honest: Evidence) -> None:
    assert violations(honest) == []
    assert len(honest.expected.decisions) > 3
    assert honest.saved_states


# ---- forgeries: each changes one thing -----------------------------------------------------------


def first(evidence: Evidence, kind: type, where: Callable[[Any], bool] = lambda message: True) -> Entry:
    return next(
        entry
        for entry in evidence.entries
        if entry.kind == kind.__name__ and where(codec.decode_entry(entry))
    )


def changed(entry: Entry, **fields: Any) -> Entry:
    return replace(entry, body=codec.encode(replace(codec.decode_entry(entry), **fields)))


def swapped(evidence: Evidence, entry: Entry, other: Entry) -> Evidence:
    entries = [other if one is entry else one for one in evidence.entries]
    return replace(evidence, entries=entries, recording=entries)


def added(evidence: Evidence, entry: Entry) -> Evidence:
    entries = [*evidence.entries, entry]
    return replace(evidence, entries=entries, recording=entries)


def is_applied(outcome: Outcome) -> bool:
    return outcome.verdict in APPLIED_VERDICTS


def next_id(evidence: Evidence, stream: str) -> EntryId:
    newest = max(entry.id for entry in evidence.entries if entry.stream == stream)
    return EntryId(newest.generation, newest.sequence + 1)


def duplicated_id(honest: Evidence) -> Evidence:
    return added(honest, first(honest, Observation))


def stale_generation(honest: Evidence) -> Evidence:
    newer = replace(first(honest, Observation), id=EntryId(9, 1))
    stale = replace(first(honest, Observation), id=next_id(honest, HISTORY))
    return added(added(honest, newer), stale)


def step_observed_twice(honest: Evidence) -> Evidence:
    return added(honest, replace(first(honest, Observation), id=next_id(honest, HISTORY)))


def unreported_gap(honest: Evidence) -> Evidence:
    gone = first(honest, Observation, lambda m: m.step == 20)
    entries = [entry for entry in honest.entries if entry is not gone]
    return evidence_of(entries, list(honest.lives))


def observation_applied_though_reported_missing(honest: Evidence) -> Evidence:
    """The predictor says that it never got some entries, and decided as if it had."""
    gone = first(honest, Observation, lambda m: m.step == 20).id
    hole = (gone, EntryId(gone.generation, gone.sequence + 1))
    lives = [replace(honest.lives[0], missing=(hole,))]
    return replace(honest, lives=lives, expected=expected(honest.entries, lives))


def flipped_byte_in_a_decision(honest: Evidence) -> Evidence:
    entry = first(honest, PhaseDecision, lambda m: bool(m.coefficients))
    decision = codec.decode_entry(entry)
    assert isinstance(decision, PhaseDecision)
    coefficients = (decision.coefficients[0] + 1e-9, *decision.coefficients[1:])
    return swapped(honest, entry, changed(entry, coefficients=coefficients))


def flipped_byte_in_a_state(honest: Evidence) -> Evidence:
    (name,) = honest.saved_states
    files = dict(honest.saved_states[name])
    files["history.safetensors"] = files["history.safetensors"][:-1] + b"\x00\x01"
    return replace(honest, saved_states={name: files})


def delta_applied_twice(honest: Evidence) -> Evidence:
    return added(honest, replace(first(honest, Outcome, is_applied), id=next_id(honest, HISTORY)))


def delta_of_another_generation(honest: Evidence) -> Evidence:
    outcome = codec.decode_entry(first(honest, Outcome, is_applied))
    assert isinstance(outcome, Outcome)
    entry = first(honest, PhaseDecision, lambda m: m.decision_id == outcome.decision_id)
    return swapped(honest, entry, changed(entry, base_generation=7))


def flipped_byte_in_the_weights(honest: Evidence) -> Evidence:
    return replace(honest, model=MODEL[:-1] + bytes([MODEL[-1] ^ 1]))


def unrecorded_decision(honest: Evidence) -> Evidence:
    gone = first(honest, PhaseDecision)
    entries = [entry for entry in honest.entries if entry is not gone]
    return evidence_of(entries, list(honest.lives))


def damaged_checkpoint(honest: Evidence) -> Evidence:
    return replace(honest, broken_checkpoints=["step-00000040.gen-1: model.safetensors is damaged"])


def loss_not_finite(honest: Evidence) -> Evidence:
    entry = first(honest, Observation)
    observation = codec.decode_entry(entry)
    assert isinstance(observation, Observation)
    features = list(observation.features)
    features[INDEX["loss"]] = float("nan")
    return swapped(honest, entry, changed(entry, features=tuple(features)))


def run_that_stopped(honest: Evidence) -> Evidence:
    return replace(honest, steps=honest.steps + 1)


def end_not_told(honest: Evidence) -> Evidence:
    entries = [entry for entry in honest.entries if entry.kind != "RunEnded"]
    return replace(honest, entries=entries, recording=entries)


def entry_not_recorded(honest: Evidence) -> Evidence:
    return replace(honest, recording=list(honest.entries)[:-1])


def recorded_otherwise(honest: Evidence) -> Evidence:
    recording = list(honest.entries)
    recording[3] = replace(recording[3], body=b"\x00" + recording[3].body)
    return replace(honest, recording=recording, data_was_lost=True)


def stack_trace(honest: Evidence) -> Evidence:
    return replace(honest, stack_traces=["monitor.log: KeyError: 'a'"])


def unfenced_trainer(honest: Evidence) -> Evidence:
    return replace(honest, attack_notes=["the older trainer was not fenced: it went on"])


FORGERIES: tuple[tuple[str, Callable[[Evidence], Evidence]], ...] = (
    ("ids_come_once", duplicated_id),
    ("no_stale_generation_writes", stale_generation),
    ("steps_are_observed_once", step_observed_twice),
    ("gaps_are_reported", unreported_gap),
    ("states_follow_from_what_was_applied", observation_applied_though_reported_missing),
    ("decisions_follow_from_what_was_applied", flipped_byte_in_a_decision),
    ("states_follow_from_what_was_applied", flipped_byte_in_a_state),
    ("no_delta_is_applied_twice", delta_applied_twice),
    ("every_delta_was_decided_for_its_start", delta_of_another_generation),
    ("parameters_are_those_of_the_decisions", flipped_byte_in_the_weights),
    ("parameters_are_those_of_the_decisions", unrecorded_decision),
    ("checkpoints_verify", damaged_checkpoint),
    ("losses_are_finite", loss_not_finite),
    ("the_run_is_finished", run_that_stopped),
    ("the_end_is_told", end_not_told),
    ("the_recording_is_the_run", entry_not_recorded),
    ("the_recording_is_the_run", recorded_otherwise),
    ("no_stack_trace", stack_trace),
    ("attacks_went_as_they_must", unfenced_trainer),
)


@pytest.mark.parametrize(("law", "forge"), FORGERIES, ids=[forge.__name__ for _, forge in FORGERIES])
def test_a_forged_breach_is_found_by_its_law(
    honest: Evidence, law: str, forge: Callable[[Evidence], Evidence]
) -> None:
    broken = {text.partition(":")[0] for text in violations(forge(honest))}
    assert law in broken


def test_every_law_is_seen_to_fail() -> None:
    assert {law.__name__ for law in LAWS} == {law for law, _ in FORGERIES}


def test_a_reported_gap_is_no_violation(honest: Evidence) -> None:
    """The predictor that met the hole and said so made other decisions, and they follow from what it got."""
    gone = first(honest, Observation, lambda m: m.step == 20)
    lives = [
        replace(honest.lives[0], missing=((gone.id, EntryId(gone.id.generation, gone.id.sequence + 1)),))
    ]
    entries = [entry for entry in honest.entries if entry is not gone and entry.stream != DECISIONS]
    said = [
        Entry(DECISIONS, EntryId(1, number), PhaseDecision.__name__, body, 0.0)
        for number, body in enumerate(expected(entries, lives).decisions.values(), start=1)
    ]
    evidence = evidence_of([*entries, *said], lives)
    assert holes(evidence.entries, HISTORY)
    found = [text for text in violations(evidence) if "recorded by nobody" not in text]
    assert found == []


def test_lives_are_read_from_the_log_of_the_predictor() -> None:
    log = [
        {"event": "serving", "generation": 1, "behind": "0-0"},
        {"event": "entries_missing", "first": "1-4", "read_instead": "1-9"},
        {"event": "stopped"},
        {"event": "serving", "generation": 3, "behind": "1-20"},
    ]
    lives = lives_of(log)
    assert [(life.generation, life.behind) for life in lives] == [(1, STREAM_START), (3, EntryId(1, 20))]
    assert [sequence for sequence in range(1, 12) if lives[0].has_missed(EntryId(1, sequence))] == [
        4,
        5,
        6,
        7,
        8,
    ]
    assert not lives[1].has_missed(EntryId(1, 5))


def test_a_life_that_began_from_a_saved_state_is_followed_from_there(honest: Evidence) -> None:
    (name,) = honest.saved_states
    states = list(honest.expected.states)
    second = replace(honest.lives[0], generation=2, behind=_applied(honest, states[0]))
    made = expected(honest.entries, [honest.lives[0], second])
    assert made.unknown == ()
    assert made.states[name] == honest.expected.states[name]
    assert {key[1:] for key in made.decisions if key[0] == 2} < {key[1:] for key in made.decisions}


def test_a_life_from_a_state_that_nobody_saved_is_said_to_be_unknown(honest: Evidence) -> None:
    lives = [*honest.lives, replace(honest.lives[0], generation=2, behind=EntryId(1, 2))]
    made = expected(honest.entries, lives)
    assert len(made.unknown) == 1


def _applied(evidence: Evidence, state: str) -> EntryId:
    return next(
        entry.id
        for entry in evidence.entries
        if entry.kind == "CheckpointWritten"
        and dataclasses.asdict(codec.decode_entry(entry))["name"] == state
    )
