"""Replay: the same history gives the same bytes; anything else is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from common import codec
from common.bus import Entry, EntryId
from common.errors import RecordingError
from common.messages import Alert, Message, PhaseDecision
from common.streams import DECISIONS, HISTORY, PREDICTOR, notes_of
from predictor_node.holes import PASSED_OVER
from predictor_node.node import Predictor
from predictor_node.replay import line_of, replay
from predictor_node.state import FolderStore, MemoryStore
from tests.predictor.scripted import Log, ScriptedTrainer, small_settings


def entry_of(stream: str, entry_id: EntryId, message: Message) -> Entry:
    return Entry(stream, entry_id, type(message).__name__, codec.encode(message), 0.0)


def entries_of(log: Log, *, generation: int = 1) -> list[Entry]:
    history = [entry_of(HISTORY, entry_id, message) for entry_id, message in log.entries]
    answers = [
        entry_of(
            DECISIONS if isinstance(answer, PhaseDecision) else notes_of(PREDICTOR),
            EntryId(generation, number),
            answer,
        )
        for number, answer in enumerate(log.answers, start=1)
    ]
    return history + answers


def whole_run() -> Log:
    log = Log(Predictor(MemoryStore(keep_all=True)).handle)
    ScriptedTrainer(small_settings()).run(log.publish)
    return log


def resumed_run(*, loses_state: bool = False) -> Log:
    """Trainer and predictor are killed behind a checkpoint and go on from it."""
    store = MemoryStore(keep_all=True)
    log = Log(Predictor(store).handle)
    trainer = ScriptedTrainer(small_settings())
    trainer.run(log.publish, until_step=200)
    name = list(trainer.checkpoints)[1]
    restarted = Predictor(MemoryStore() if loses_state else store)
    log.answer = restarted.handle
    trainer.resumed(name, generation=2).run(log.publish)
    return log


WHOLE = whole_run()
ENTRIES = entries_of(WHOLE)
DECISION_ENTRIES = [entry for entry in ENTRIES if entry.stream == DECISIONS]
HISTORY_ENTRIES = [entry for entry in ENTRIES if entry.stream == HISTORY]


def with_decision(position: int, **changes: object) -> list[Entry]:
    """The recording with one recorded decision altered."""
    victim = DECISION_ENTRIES[position]
    decision = codec.decode_entry(victim)
    assert isinstance(decision, PhaseDecision)
    altered = replace(victim, body=codec.encode(replace(decision, **changes)))  # type: ignore[arg-type]
    return [altered if entry is victim else entry for entry in ENTRIES]


def test_whole_run_is_reproduced() -> None:
    result = replay(ENTRIES, is_sealed=True)
    assert (result.difference, result.duplicates, result.notes) == ("", 0, ())
    assert list(result.decisions) == WHOLE.decisions


def test_resumed_run_is_reproduced_from_the_beginning() -> None:
    """Generation 2 reuses decision ids of steps that generation 1 had gone on to."""
    log = resumed_run()
    ids = [decision.decision_id for decision in log.decisions]
    assert len(set(ids)) < len(ids)
    result = replay(entries_of(log), is_sealed=True)
    assert (result.difference, result.notes) == ("", ())
    assert len(result.decisions) == len(log.decisions)


def test_state_that_the_live_predictor_lost_is_lost_in_replay_too() -> None:
    log = resumed_run(loses_state=True)
    assert [answer for answer in log.answers if isinstance(answer, Alert)]
    result = replay(entries_of(log), is_sealed=True)
    assert result.difference == ""
    assert "starts afresh" in result.notes[0]


def test_recording_that_begins_with_a_resume_needs_the_state_folder(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "predictor")
    log = Log(Predictor(store).handle)
    trainer = ScriptedTrainer(small_settings("trainer.checkpoint.keep=100"))
    trainer.run(log.publish, until_step=200)
    name = list(trainer.checkpoints)[1]
    second = Log(Predictor(store).handle)
    trainer.resumed(name, generation=2).run(second.publish)
    entries = entries_of(second)
    assert replay(entries, is_sealed=True, state_dir=tmp_path / "predictor").difference == ""
    assert replay(entries, is_sealed=True).difference != ""
    elsewhere = replay(entries, is_sealed=True, state_dir=tmp_path / "elsewhere")
    assert elsewhere.difference != ""
    assert name in elsewhere.notes[0]


@pytest.mark.parametrize("position", [0, 10, len(DECISION_ENTRIES) - 1])
def test_one_bit_in_a_forecast_is_found(position: int) -> None:
    decision = WHOLE.decisions[position]
    assert decision.forecast is not None
    planted = math.nextafter(decision.forecast.spread, math.inf)
    result = replay(
        with_decision(position, forecast=replace(decision.forecast, spread=planted)), is_sealed=True
    )
    assert f"decision {decision.decision_id} " in result.difference
    assert repr(planted) in result.difference
    assert len(result.difference.splitlines()) == 2, "the one field that differs, no other"


def test_one_bit_in_a_coefficient_is_named_by_its_place() -> None:
    position = next(n for n, decision in enumerate(WHOLE.decisions) if decision.horizon_steps)
    coefficients = list(WHOLE.decisions[position].coefficients)
    coefficients[0] = -0.0
    assert WHOLE.decisions[position].coefficients[0] == 0.0
    result = replay(with_decision(position, coefficients=tuple(coefficients)), is_sealed=True)
    assert "coefficients[0]: recorded -0.0, replayed 0.0" in result.difference


def test_only_the_first_difference_is_told() -> None:
    both = with_decision(3, reason="planted")
    later = with_decision(7, reason="planted later")
    mixed = [b if a == c else a for a, b, c in zip(later, both, ENTRIES, strict=True)]
    difference = replay(mixed, is_sealed=True).difference
    assert "recorded 'planted'" in difference
    assert "later" not in difference


def test_decision_said_twice_must_be_equal_both_times() -> None:
    again = [replace(entry, id=EntryId(2, n)) for n, entry in enumerate(DECISION_ENTRIES[5:9], start=1)]
    assert replay(ENTRIES + again, is_sealed=True).duplicates == 4
    decision = codec.decode_entry(again[2])
    assert isinstance(decision, PhaseDecision)
    again[2] = replace(again[2], body=codec.encode(replace(decision, reason="other")))
    assert "recorded 'other'" in replay(ENTRIES + again, is_sealed=True).difference


def test_missing_decision_is_a_difference() -> None:
    thinned = [entry for entry in ENTRIES if entry is not DECISION_ENTRIES[4]]
    for is_sealed in (True, False):
        assert "not recorded" in replay(thinned, is_sealed=is_sealed).difference


def test_last_decisions_may_be_missing_only_when_unsealed() -> None:
    thinned = [entry for entry in ENTRIES if entry not in DECISION_ENTRIES[-3:]]
    torn = replay(thinned, is_sealed=False)
    assert (torn.difference, torn.unrecorded) == ("", 3)
    assert "not recorded" in replay(thinned, is_sealed=True).difference
    assert replay(HISTORY_ENTRIES, is_sealed=False).difference == ""


def test_sealed_recording_of_a_run_without_an_end_must_have_its_last_decision() -> None:
    log = Log(Predictor(MemoryStore()).handle)
    ScriptedTrainer(small_settings()).run(log.publish, until_step=200)
    entries = entries_of(log)
    assert replay(entries, is_sealed=True).difference == ""
    assert "not recorded" in replay(entries[:-1], is_sealed=True).difference
    assert replay(entries[:-1], is_sealed=False).difference == ""


def test_last_decisions_of_a_killed_generation_may_be_missing_although_another_follows() -> None:
    log = resumed_run()
    entries = entries_of(log)
    killed = [n for n, decision in enumerate(log.decisions) if decision.base_generation == 1]
    recorded = [entry for entry in entries if entry.stream == DECISIONS]
    thinned = [entry for entry in entries if entry is not recorded[killed[-1]]]
    result = replay(thinned, is_sealed=True)
    assert (result.difference, result.unrecorded) == ("", 1)
    holed = [entry for entry in entries if entry is not recorded[killed[-2]]]
    assert "not recorded" in replay(holed, is_sealed=True).difference


def test_decision_that_is_not_made_again_is_a_difference() -> None:
    stranger = replace(WHOLE.decisions[-1], decision_id="9999.9")
    entries = [*ENTRIES, entry_of(DECISIONS, EntryId(9, 1), stranger)]
    assert "not made again" in replay(entries, is_sealed=True).difference


@pytest.mark.parametrize("lost", [0, 1, 50])
def test_hole_in_the_history_ends_the_replay_and_is_named(lost: int) -> None:
    thinned = [entry for entry in ENTRIES if entry is not HISTORY_ENTRIES[lost]]
    result = replay(thinned, is_sealed=True)
    assert f"1-{lost + 1} is missing" in result.gap
    assert result.difference == ""
    assert len(result.decisions) < len(WHOLE.decisions)


def test_recording_without_history_is_an_error() -> None:
    with pytest.raises(RecordingError, match="no history"):
        replay(DECISION_ENTRIES, is_sealed=True)


def test_entry_that_is_no_message_is_an_error() -> None:
    broken = [replace(entry, body=b"\x00") if entry is HISTORY_ENTRIES[7] else entry for entry in ENTRIES]
    with pytest.raises(RecordingError, match="history 1-8"):
        replay(broken, is_sealed=True)


def test_line_tells_step_phase_horizon_size_forecast_and_reason() -> None:
    proposal = next(decision for decision in WHOLE.decisions if decision.horizon_steps)
    line = line_of(proposal)
    for part in (f"{proposal.base_step}.", "predict", "5", "0.4419", "line fit over 5 steps"):
        assert part in line
    assert "none" in line_of(replace(proposal, forecast=None))
    assert "\n" not in line


def test_a_predictor_that_passed_observations_over_cannot_be_reproduced_and_replay_says_why() -> None:
    text = "4000 observations before step 80 were passed over"
    told = Alert(node=PREDICTOR, severity="warning", kind=PASSED_OVER, text=text, step=80)
    entry = entry_of(notes_of(PREDICTOR), EntryId(1, 10**6), told)
    result = replay([*ENTRIES, entry], is_sealed=True)
    assert text in result.gap
    assert result.difference == ""
