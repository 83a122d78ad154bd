"""The predictor as a function of its history: deterministic, idempotent, resumable anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import codec
from common.bus import EntryId
from common.errors import EnvironmentFault, SettingsError
from common.messages import Alert, CheckpointWritten, Phase, PhaseDecision, Verdict
from predictor_node.node import Predictor
from predictor_node.state import MemoryStore, SavedState, files_of
from tests.predictor.scripted import Log, ScriptedTrainer, observed, outcome, point, small_settings, started


def play(predictor: Predictor, *, seed: int = 0) -> Log:
    log = Log(predictor.handle)
    ScriptedTrainer(small_settings(), seed=seed).run(log.publish)
    return log


def bytes_of(decisions: list[PhaseDecision]) -> list[bytes]:
    return [codec.encode(decision) for decision in decisions]


def replayed(predictor: Predictor, entries: list) -> list[PhaseDecision]:
    answers = [answer for entry_id, message in entries for answer in predictor.handle(message, entry_id)]
    return [answer for answer in answers if isinstance(answer, PhaseDecision)]


def state_bytes(predictor: Predictor) -> dict[str, bytes]:
    facts = predictor._facts
    assert facts is not None
    return files_of(SavedState(name="x", applied=predictor.applied, facts=facts, learned=predictor.learned))


def test_one_decision_per_decision_point_and_it_echoes_its_base() -> None:
    log = play(Predictor(MemoryStore()))
    points = [
        message
        for _, message in log.entries
        if getattr(message, "decision_point", None) is not None and message.phase is Phase.FULL
    ]
    assert len(points) == len(log.decisions) > 20
    for observation, decision in zip(points, log.decisions, strict=True):
        assert decision.decision_id == f"{observation.step}.{observation.attempt}"
        assert (decision.base_step, decision.base_attempt) == (observation.step, observation.attempt)
        assert decision.base_fingerprint == observation.decision_point.fingerprint
        assert decision.base_generation == 1
        assert decision.valid_until_step == observation.step


def test_a_run_has_proposals_rests_and_set_backs() -> None:
    predictor = Predictor(MemoryStore())
    log = play(predictor)
    proposals = [decision for decision in log.decisions if decision.horizon_steps]
    assert [decision.horizon_steps for decision in proposals[:4]] == [5, 10, 15, 5]
    assert predictor.counters["proposals"] == len(proposals)
    assert predictor.counters["rests"] == len(log.decisions) - len(proposals)
    assert predictor.counters["refused"] > 0
    assert predictor.counters["ruined"] > 0
    assert predictor.counters["missing_steps"] == 0
    assert not [answer for answer in log.answers if isinstance(answer, Alert)]
    assert predictor.ended == log.entries[-1][0]


def test_same_entries_give_identical_bytes() -> None:
    first, second = Predictor(MemoryStore()), Predictor(MemoryStore())
    log = play(first)
    assert bytes_of(replayed(second, log.entries)) == bytes_of(log.decisions)
    assert state_bytes(first) == state_bytes(second)


LOG = play(Predictor(MemoryStore(keep_all=True)))


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, len(LOG.entries)), overlap=st.integers(0, 30))
def test_restore_at_any_point_equals_uninterrupted(cut: int, overlap: int) -> None:
    """Redelivery of entries that the saved state has already seen included."""
    before, after, unbroken = (Predictor(MemoryStore()) for _ in range(3))
    early = replayed(before, LOG.entries[:cut])
    facts = before._facts
    assert facts is not None
    after.restore(SavedState(name="x", applied=before.applied, facts=facts, learned=before.learned))
    late = replayed(after, LOG.entries[max(0, cut - overlap) :])
    replayed(unbroken, LOG.entries)
    assert bytes_of(early + late) == bytes_of(LOG.decisions)
    assert state_bytes(after) == state_bytes(unbroken)


def test_killed_and_resumed_run_decides_and_learns_as_an_unbroken_one() -> None:
    store = MemoryStore(keep_all=True)
    log = Log(Predictor(store).handle)
    trainer = ScriptedTrainer(small_settings())
    trainer.run(log.publish, until_step=200)
    name = next(name for name, saved in trainer.checkpoints.items() if saved.step >= 100)
    base_step = trainer.checkpoints[name].step
    assert log.decisions[-1].base_step > base_step, "the cut must abandon decisions"

    resumed = Predictor(store)
    resumed_log = Log(resumed.handle)
    trainer.resumed(name, generation=2).run(resumed_log.publish)
    unbroken = Predictor(MemoryStore())
    whole = play(unbroken)

    assert not [answer for answer in resumed_log.answers if isinstance(answer, Alert)]
    expected = [replace(decision, base_generation=2) for decision in whole.decisions]
    assert bytes_of(resumed_log.decisions) == bytes_of(expected[-len(resumed_log.decisions) :])
    left, right = state_bytes(resumed), state_bytes(unbroken)
    del left["position.json"], right["position.json"]  # holds the generation
    assert left == right


def test_resume_takes_over_within_one_predictor_process() -> None:
    """The trainer alone is killed: the predictor goes back to its own state of that checkpoint."""
    predictor = Predictor(MemoryStore(keep_all=True))
    log = Log(predictor.handle)
    trainer = ScriptedTrainer(small_settings())
    trainer.run(log.publish, until_step=200)
    name = list(trainer.checkpoints)[1]
    trainer.resumed(name, generation=2).run(log.publish)
    whole = play(Predictor(MemoryStore()))
    mine = [
        replace(decision, base_generation=1) for decision in log.decisions if decision.base_generation == 2
    ]
    assert bytes_of(mine) == bytes_of(whole.decisions[-len(mine) :])


def test_state_saved_late_goes_back_to_the_step_of_its_checkpoint() -> None:
    """A CheckpointWritten may come behind observations of later steps, even of a later attempt."""
    store = MemoryStore()
    log = Log(Predictor(store).handle)
    log.publish(started(small_settings()))
    for step in range(1, 21):
        log.publish(observed(step, 0 if step < 18 else 1))
    log.publish(CheckpointWritten(name="late", step=15, attempt=0, emergency=False, fingerprint=""))
    log.publish(started(small_settings(), generation=2, resumed_from="late", first_step=15))
    log.publish(observed(16))
    assert log.answers == []
    log.publish(CheckpointWritten(name="now", step=16, attempt=0, emergency=False, fingerprint=""))
    history = store.load("now").learned.history
    assert [(row.step, row.attempt) for row in history.rows] == [(step, 0) for step in range(1, 17)]
    assert history.contiguous_steps == 16


def test_decision_point_outside_a_full_window_is_not_answered() -> None:
    log = Log(Predictor(MemoryStore()).handle)
    log.publish(started(small_settings()))
    assert log.publish(observed(1, phase=Phase.WARMUP, decision_point=point(1))) is None


def test_lost_state_starts_afresh_rests_a_window_and_says_so() -> None:
    predictor = Predictor(MemoryStore())
    log = Log(predictor.handle)
    log.publish(started(small_settings(), generation=2, resumed_from="step-00000100.gen-1", first_step=100))
    (alert,) = log.answers
    assert isinstance(alert, Alert)
    assert alert.kind == "predictor_state_lost"
    for step in range(101, 107):
        log.publish(observed(step))
    early = log.publish(observed(107, decision_point=point(12)))
    assert early is not None
    assert early.horizon_steps == 0
    late = log.publish(observed(108, decision_point=point(13)))
    assert late is not None
    assert late.horizon_steps == 5


def test_state_of_another_run_is_not_taken() -> None:
    store = MemoryStore()
    log = Log(Predictor(store).handle)
    log.publish(started(small_settings()))
    log.publish(observed(1))
    log.publish(CheckpointWritten(name="c", step=1, attempt=0, emergency=False, fingerprint=""))
    other = replace(started(small_settings(), generation=2, resumed_from="c"), run_id="other")
    (alert,) = Predictor(store).handle(other, EntryId(2, 1))
    assert isinstance(alert, Alert)
    assert alert.kind == "predictor_state_lost"


def test_repeated_entry_is_ignored() -> None:
    predictor = Predictor(MemoryStore())
    log = play(predictor)
    before = state_bytes(predictor)
    assert replayed(predictor, log.entries) == []
    assert state_bytes(predictor) == before


def test_repeated_step_and_outcome_under_new_ids_change_nothing_but_the_count() -> None:
    predictor = Predictor(MemoryStore())
    log = Log(predictor.handle)
    log.publish(started(small_settings()))
    for step in range(1, 9):
        log.publish(observed(step))
    decision = log.publish(observed(9, decision_point=point(1)))
    assert decision is not None
    assert log.publish(observed(9, decision_point=point(1))) is None
    for _ in range(2):
        log.publish(outcome(decision, Verdict.REST, 0))
    assert predictor.counters["repeats"] == 1
    assert predictor.counters["rest"] == 1
    assert predictor.counters["rests"] == 1


def test_run_started_said_twice_keeps_what_was_learned() -> None:
    predictor = Predictor(MemoryStore())
    log = Log(predictor.handle)
    log.publish(started(small_settings()))
    log.publish(observed(1))
    predictor.handle(started(small_settings()), EntryId(1, 3))
    assert predictor.last_step == 1


def test_missing_step_is_reported_and_rests_until_a_whole_window() -> None:
    predictor = Predictor(MemoryStore())
    log = Log(predictor.handle)
    log.publish(started(small_settings()))
    for step in [*range(1, 60), *range(62, 70)]:
        log.publish(observed(step))
    (alert,) = log.answers
    assert isinstance(alert, Alert)
    assert (alert.kind, alert.step) == ("history_gap", 62)
    assert predictor.counters["missing_steps"] == 2
    decision = log.publish(observed(70, decision_point=point(9)))
    assert decision is not None
    assert decision.horizon_steps == 5, "9 contiguous steps are a whole window of 8"


def test_hole_in_entry_ids_is_counted() -> None:
    predictor = Predictor(MemoryStore())
    predictor.handle(started(small_settings()), EntryId(1, 1))
    predictor.handle(observed(1), EntryId(1, 5))
    predictor.handle(observed(2), EntryId(1, 6))
    assert predictor.counters["lost_entries"] == 3


def test_predictor_that_missed_the_start_rests() -> None:
    decision, told = Predictor(MemoryStore()).handle(observed(64, decision_point=point(4)), EntryId(3, 70))
    assert isinstance(decision, PhaseDecision)
    assert (decision.horizon_steps, decision.base_generation) == (0, 3)
    assert isinstance(told, Alert)
    assert (told.kind, told.text[:10]) == ("history_gap", "69 entries")


def test_another_feature_version_rests_and_says_so() -> None:
    log = Log(Predictor(MemoryStore()).handle)
    log.publish(replace(started(small_settings()), feature_version=99))
    assert [answer.kind for answer in log.answers if isinstance(answer, Alert)] == ["feature_version"]
    for step in range(1, 60):
        log.publish(observed(step))
    decision = log.publish(replace(observed(60, decision_point=point(6)), features=(1.0, 2.0)))
    assert decision is not None
    assert decision.horizon_steps == 0


def test_observation_of_another_length_is_answered_with_a_rest_and_not_learned_from() -> None:
    """In lockstep a decision point without an answer would hold the trainer."""
    predictor = Predictor(MemoryStore())
    log = Log(predictor.handle)
    log.publish(started(small_settings()))
    for step in range(1, 60):
        log.publish(observed(step))
    decision = log.publish(replace(observed(60, decision_point=point(6)), features=(1.0, 2.0)))
    assert decision is not None
    assert (decision.horizon_steps, decision.reason) == (0, "features of another version")
    assert predictor.last_step == 59


def test_failing_message_changes_nothing() -> None:
    predictor = Predictor(MemoryStore())
    log = Log(predictor.handle)
    log.publish(started(small_settings()))
    log.publish(observed(1))
    before, applied = state_bytes(predictor), predictor.applied
    newer = replace(started(small_settings(), generation=2), settings_toml="[trainer]\nunheard_of = 1")
    with pytest.raises(SettingsError, match="unheard_of"):
        predictor.handle(newer, EntryId(2, 1))
    assert (state_bytes(predictor), predictor.applied) == (before, applied)


def test_state_that_cannot_be_saved_is_an_alert_and_the_run_goes_on() -> None:
    class FullDisk(MemoryStore):
        def save(self, state: SavedState, *, keep: int) -> None:
            raise EnvironmentFault("no space left on device")

    log = Log(Predictor(FullDisk()).handle)
    ScriptedTrainer(small_settings()).run(log.publish)
    kinds = {answer.kind for answer in log.answers if isinstance(answer, Alert)}
    assert kinds == {"predictor_save_failed"}
    assert bytes_of(log.decisions) == bytes_of(LOG.decisions)
