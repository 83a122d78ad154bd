"""Laws of the watch over a lockstep wait: when nobody will answer any more, and when somebody still may."""

from __future__ import annotations

from common.bus import STREAM_START, EntryId
from common.messages import DeadLetter, Heartbeat, Metric
from trainer_node.answer_watch import AnswerWatch

QUESTION = EntryId(2, 40)
GRACE_SECONDS = 2.0


def heartbeat(applied: EntryId) -> Heartbeat:
    counters = (
        Metric(name="applied_generation", value=float(applied.generation), unit="1"),
        Metric(name="applied_sequence", value=float(applied.sequence), unit="1"),
    )
    return Heartbeat(
        node="predictor", generation=1, process_id=1, state="running", step=1, uptime_seconds=1.0,
        counters=counters,
    )  # fmt: skip


def letter(entry_id: EntryId) -> DeadLetter:
    return DeadLetter(
        stream="history", entry_id=str(entry_id), kind="Observation", deliveries=5, error="", body=b""
    )


def watch(question: EntryId = QUESTION) -> AnswerWatch:
    found = AnswerWatch(grace_seconds=GRACE_SECONDS)
    found.ask(question)
    return found


def test_a_predictor_that_is_still_behind_the_question_is_waited_for_without_end() -> None:
    waiting = watch()
    for second in range(1000):
        waiting.note_heartbeat(heartbeat(EntryId(2, 39)), float(second))
        waiting.note_newest(QUESTION, float(second))
    assert not waiting.is_in_vain(1000.0)


def test_a_predictor_past_the_question_has_a_grace_to_answer_and_no_more() -> None:
    waiting = watch()
    waiting.note_heartbeat(heartbeat(QUESTION), 10.0)
    waiting.note_heartbeat(heartbeat(EntryId(2, 41)), 11.0)
    assert not waiting.is_in_vain(11.9)
    assert waiting.is_in_vain(12.0)


def test_a_predictor_that_was_restarted_behind_the_question_begins_the_grace_anew() -> None:
    waiting = watch()
    waiting.note_heartbeat(heartbeat(QUESTION), 10.0)
    waiting.note_heartbeat(heartbeat(EntryId(2, 1)), 11.0)
    waiting.note_heartbeat(heartbeat(QUESTION), 20.0)
    assert not waiting.is_in_vain(21.9)
    assert waiting.is_in_vain(22.0)


def test_a_question_that_the_server_lost_ends_the_wait_after_the_grace() -> None:
    waiting = watch()
    waiting.note_newest(STREAM_START, 10.0)
    waiting.note_newest(STREAM_START, 11.0)
    assert not waiting.is_in_vain(11.9)
    assert waiting.is_in_vain(12.0)


def test_a_question_that_arrives_late_at_the_server_is_waited_for() -> None:
    waiting = watch()
    waiting.note_newest(EntryId(2, 39), 10.0)
    waiting.note_newest(QUESTION, 11.0)
    assert not waiting.is_in_vain(100.0)


def test_only_a_dead_letter_of_the_question_ends_the_wait_at_once() -> None:
    waiting = watch()
    waiting.note_dead_letter(letter(EntryId(2, 12)))
    assert not waiting.is_in_vain(0.0)
    waiting.note_dead_letter(letter(QUESTION))
    assert waiting.is_in_vain(0.0)


def test_a_dead_letter_that_came_before_the_wait_began_counts() -> None:
    waiting = AnswerWatch(grace_seconds=GRACE_SECONDS)
    waiting.note_dead_letter(letter(QUESTION))
    waiting.ask(QUESTION)
    assert waiting.is_in_vain(0.0)


def test_what_was_in_vain_once_is_forgotten_at_the_next_question() -> None:
    waiting = watch()
    waiting.note_dead_letter(letter(QUESTION))
    waiting.note_heartbeat(heartbeat(QUESTION), 0.0)
    waiting.end()
    waiting.ask(EntryId(2, 60))
    assert not waiting.is_in_vain(100.0)
