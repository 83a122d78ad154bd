"""The fold of controls: what was tried and kept, whoever came first, and what restores and resumes undo."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages as m
from monitor_node.control_book import MAX_ASKED, MAX_CHANGES, MAX_EVENTS, MAX_TRIALS, ControlBook
from monitor_node.control_section import trial_words
from monitor_node.run_reader import new_view
from monitor_node.run_view import RunView
from monitor_node.snapshot import as_dict
from tests.monitor import fake_controls as fake
from tests.monitor import fake_run

V = m.Verdict
TWICE = m.Controls(batch_factor=2.0)
LATE_TAIL = m.Controls(decay_start=100, decay_steps=20)


def folded(*messages: m.Message, view: RunView | None = None) -> ControlBook:
    view = view or new_view("run")
    for second, message in enumerate(messages):
        view.fold(message, sent_unix_seconds=float(second), at_seconds=float(second))
    return view.curves.controls


def steps(first: int, last: int, **stand: float) -> list[m.Observation]:
    return [fake.observation(step, **stand) for step in range(first, last + 1)]  # type: ignore[arg-type]


def told(book: ControlBook) -> list[tuple[int, str, V]]:
    return [(trial.outcome.base_step, trial.change, trial.outcome.verdict) for trial in book.trials]


def test_an_accepted_change_stays_in_force_and_a_refused_one_leaves_nothing() -> None:
    view = new_view("run")
    book = folded(
        fake.started(batch=True), *steps(1, 16),
        fake.decision(16, TWICE), *steps(17, 32, batch=2.0), fake.outcome(16, V.ACCEPTED),
        *steps(33, 48, batch=2.0), view=view,
    )  # fmt: skip
    assert book.in_force == TWICE
    four = m.Controls(batch_factor=4.0)
    folded(fake.decision(48, four), *steps(49, 64, batch=4.0), fake.outcome(48, V.REFUSED), view=view)
    assert book.in_force == TWICE
    assert [change[:3] for change in book.changes] == [(1, 1.0, 1.0), (17, 1.0, 2.0)]
    assert told(book) == [(16, "batch ×2", V.ACCEPTED), (48, "batch ×2 (now ×4)", V.REFUSED)]


@pytest.mark.parametrize("verdict", [v for v in V if v is not V.ACCEPTED])
def test_only_an_accepted_change_is_in_force(verdict: V) -> None:
    book = folded(fake.started(), fake.decision(16, LATE_TAIL), fake.outcome(16, verdict))
    assert book.in_force == m.Controls()
    assert book.is_used


def test_what_is_told_again_changes_nothing() -> None:
    refused, kept = (
        [fake.decision(16, TWICE), fake.outcome(16, V.REFUSED)],
        [
            fake.decision(48, LATE_TAIL),
            fake.outcome(48, V.ACCEPTED),
        ],
    )
    book = folded(fake.started(), *refused, *refused, *kept, *kept)
    assert told(book) == [
        (16, "batch ×2", V.REFUSED),
        (48, "decay from step 100 over 20", V.ACCEPTED),
    ]
    assert book.in_force == LATE_TAIL


def test_a_decision_that_comes_after_its_outcome_was_looked_at_is_shown() -> None:
    view = new_view("run")
    assert told(folded(fake.started(), fake.outcome(16, V.ACCEPTED), view=view)) == []
    assert told(folded(fake.decision(16, TWICE), view=view)) == [(16, "batch ×2", V.ACCEPTED)]


def test_a_jump_and_a_rest_are_no_trials() -> None:
    jump = replace(fake_run.decision(32, 10), controls=TWICE)  # as they stand by then
    rest = replace(fake.decision(48, TWICE), phase=m.Phase.FULL)
    book = folded(
        fake.started(), fake_run.decision(1, 5), fake_run.outcome(1, V.ACCEPTED, 5),
        fake.decision(16, TWICE), fake.outcome(16, V.ACCEPTED),
        jump, fake_run.outcome(32, V.ACCEPTED), rest, fake.outcome(48, V.REST),
    )  # fmt: skip
    assert told(book) == [(16, "batch ×2", V.ACCEPTED)]


@pytest.mark.parametrize(
    ("first_step", "stands"), [(40, LATE_TAIL), (32, LATE_TAIL), (31, m.Controls()), (16, m.Controls())]
)
def test_a_resume_has_what_was_kept_by_then(first_step: int, stands: m.Controls) -> None:
    book = folded(
        fake.started(), *steps(1, 16), fake.decision(16, LATE_TAIL), *steps(17, 32),
        fake.outcome(16, V.ACCEPTED), *steps(33, 60), fake.started(first_step=first_step, generation=2),
    )  # fmt: skip
    assert book.in_force == stands
    assert len(book.trials) == 1  # people want every try


def test_a_rollback_takes_the_change_and_its_steps_away() -> None:
    book = folded(
        fake.started(), *steps(1, 16), fake.decision(16, TWICE), *steps(17, 32, batch=2.0),
        fake.outcome(16, V.ACCEPTED), *steps(33, 40, batch=2.0), fake.observation(11, attempt=1),
    )  # fmt: skip
    assert book.in_force == m.Controls()
    assert book.changes == [(1, 1.0, 1.0, 1.0)]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_proposal_that_came_too_late_is_told_as_such(is_late: bool) -> None:
    """The trainer went on without it: the point's outcome says that there was none."""
    said = [fake.decision(16, TWICE, "noise"), fake.outcome(16, V.MISSING)]
    book = folded(fake.started(), *steps(1, 16), *(reversed(said) if is_late else said), *steps(17, 20))
    assert told(book) == [(16, "batch ×2", V.MISSING)]
    assert trial_words(book.trials[0]) == "batch ×2: noise; not taken: it came too late"
    assert book.in_force == m.Controls()
    assert not book.has_moved


def test_points_without_any_answer_are_no_trials_and_drive_none_out() -> None:
    book = folded(fake.started(), fake.decision(16, TWICE, "noise"), fake.outcome(16, V.ACCEPTED))
    for step in range(32, 32 + 2 * MAX_EVENTS):
        book.settled(fake.outcome(step, V.MISSING))
    assert told(book) == [(16, "batch ×2", V.ACCEPTED)]


def jump_at(step: int, controls: m.Controls | None) -> m.PhaseDecision:
    return replace(fake_run.decision(step, 10), controls=controls)


@pytest.mark.parametrize("as_they_stand", [None, TWICE], ids=["not said", "said"])
@pytest.mark.parametrize("verdict", [V.REFUSED, V.ACCEPTED, V.RUINED, V.STALE, V.MISSING])
@pytest.mark.parametrize("is_late", [False, True], ids=["asked first", "judged first"])
def test_no_jumps_in_a_row_drive_out_a_trial(
    is_late: bool, verdict: V, as_they_stand: m.Controls | None
) -> None:
    book = folded(fake.started(), fake.decision(16, TWICE, "noise"), fake.outcome(16, V.ACCEPTED))
    for step in range(32, 32 + 32 * (MAX_EVENTS + 99), 32):
        decision, outcome = jump_at(step, as_they_stand), fake_run.outcome(step, verdict)
        if not is_late:
            book.decided(decision)
        if outcome.lost_steps:
            book.cut_above(step)
        book.settled(outcome)
        if is_late:
            book.decided(decision)
    assert told(book) == [(16, "batch ×2", V.ACCEPTED)]
    assert book.in_force == TWICE
    assert len(book._events) <= MAX_EVENTS


@pytest.mark.parametrize("is_late", [False, True], ids=["asked first", "judged first"])
def test_undone_stretches_in_a_row_are_kept_as_one(is_late: bool) -> None:
    """And go back as far as the furthest of them: the change kept at step 48 is gone, not that of 16."""
    late = m.Controls(batch_factor=2.0, rate_factor=2.0)
    book = folded(
        fake.started(), fake.decision(16, TWICE), fake.outcome(16, V.ACCEPTED),
        fake.decision(48, late), fake.outcome(48, V.ACCEPTED),
    )  # fmt: skip
    for step in (96, 50, 64):
        messages = [jump_at(step, None), fake_run.outcome(step, V.REFUSED)]
        book.cut_above(step)
        for message in reversed(messages) if is_late else messages:
            book.settled(message) if isinstance(message, m.Outcome) else book.decided(message)
    assert len(book._events) == 3
    assert book.in_force == TWICE


def test_decisions_that_come_hundreds_of_outcomes_behind_still_name_every_trial() -> None:
    """To a monitor that starts late, where old history was trimmed away and old decisions were not."""
    book, steps_of = ControlBook(), range(32, 32 * 400, 32)
    book.started(1)
    book.settled(fake.outcome(16, V.ACCEPTED))
    for step in steps_of:
        book.cut_above(step)
        book.settled(fake_run.outcome(step, V.REFUSED))
    assert len(book._events) > 500
    for step in steps_of:
        book.decided(jump_at(step, None))
    book.decided(fake.decision(16, TWICE, "noise"))
    assert told(book) == [(16, "batch ×2", V.ACCEPTED)]
    assert book.in_force == TWICE
    assert len(book._events) == 2


def test_a_monitor_that_starts_late_in_a_long_run_has_every_trial_and_what_is_in_force() -> None:
    """It reads all decisions, most of them rests, long before the outcomes."""
    book, count = ControlBook(), 3 * MAX_ASKED
    book.started(1)
    early, late = fake.decision(16, TWICE, "early"), fake.decision(16 * count, LATE_TAIL, "late")
    rests = [replace(fake_run.decision(16 * number, 0), phase=m.Phase.FULL) for number in range(2, count)]
    for decision in (early, *rests, late):
        book.decided(decision)
    for decision in (early, *rests, late):
        book.settled(fake.outcome(decision.base_step, V.ACCEPTED if decision in (early, late) else V.STALE))
    assert [trial.asked.reason for trial in book.trials] == ["early", "late"]
    assert book.in_force == LATE_TAIL


def test_a_decision_of_an_earlier_start_is_not_that_of_a_later_one() -> None:
    """Ids are of step and attempt: a resumed run says them again."""
    book = folded(
        fake.started(), fake.decision(16, TWICE), fake.started(first_step=10, generation=2),
        fake.outcome(16, V.ACCEPTED),
    )  # fmt: skip
    assert told(book) == []
    folded(fake.decision(16, LATE_TAIL, generation=2), view=(view := new_view("run")))
    folded(fake.started(first_step=10, generation=2), fake.outcome(16, V.ACCEPTED), view=view)
    assert view.curves.controls.in_force == LATE_TAIL


def test_a_resumed_run_whose_decisions_are_gone_has_the_trainers_word() -> None:
    book = folded(
        fake.started(first_step=500, generation=2), *steps(501, 510, rate=0.5, batch=4.0, context_share=0.25)
    )
    assert book.in_force == m.Controls(rate_factor=0.5, batch_factor=4.0)
    assert book.context_share == 0.25
    assert book.is_used


# The history of a run with restores and a resume, and its decisions: two streams, each in its own order.
HISTORY: list[m.Message] = [
    fake.started(), *steps(1, 16), *steps(17, 32, batch=2.0), fake.outcome(16, V.ACCEPTED),
    *steps(33, 64, batch=2.0), *steps(65, 80, rate=4.0, batch=2.0), fake.outcome(64, V.REFUSED),
    *steps(65, 96, batch=2.0), fake_run.outcome(96, V.ACCEPTED), fake.outcome(112, V.ACCEPTED),
    fake.started(first_step=100, generation=2), *steps(101, 112, batch=2.0),
    *steps(113, 128, batch=1.0), fake.outcome(112, V.ACCEPTED), fake.outcome(144, V.VETOED),
]  # fmt: skip
DECISIONS: list[m.Message] = [
    fake.decision(16, TWICE, "first"),
    fake.decision(64, m.Controls(rate_factor=4.0, batch_factor=2.0), "second"),
    replace(fake_run.decision(96, 10), controls=TWICE),  # as they stand
    fake.decision(112, m.Controls(batch_factor=2.0, read_out="average"), "undone by the resume"),
    fake.decision(112, m.Controls(), "back", generation=2),
    fake.decision(144, TWICE, "vetoed", generation=2),
]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(HISTORY)), min_size=len(DECISIONS), max_size=len(DECISIONS)))
def test_it_does_not_matter_which_stream_is_read_first(places: list[int]) -> None:
    """A monitor that starts late reads 500 entries of one stream, then 500 of the next."""
    book = ControlBook()
    view = new_view("run")
    view.curves.controls = book
    decisions = iter(zip(sorted(places), DECISIONS, strict=True))
    pending = next(decisions, None)
    for number, message in enumerate([*HISTORY, None]):
        while pending is not None and pending[0] <= number:
            view.fold(pending[1], sent_unix_seconds=0.0, at_seconds=0.0)
            pending = next(decisions, None)
        if message is not None:
            view.fold(message, sent_unix_seconds=0.0, at_seconds=0.0)
    assert [(*row, trial.asked.reason) for row, trial in zip(told(book), book.trials, strict=True)] == [
        (16, "batch ×2", V.ACCEPTED, "first"),
        (64, "rate ×4", V.REFUSED, "second"),
        (112, "read-out average", V.ACCEPTED, "undone by the resume"),
        (112, "batch ÷2 (now ×1)", V.ACCEPTED, "back"),
        (144, "batch ×2", V.VETOED, "vetoed"),
    ]
    assert book.in_force == m.Controls()
    assert [change[:3] for change in book.changes] == [(1, 1.0, 1.0), (17, 1.0, 2.0), (113, 1.0, 1.0)]


def test_what_was_seen_is_against_the_run_without_it() -> None:
    """Half again the fall of its twin, in as much time."""
    book = folded(
        fake.started(), *steps(1, 16), fake.decision(16, TWICE, "noise scale 3.1× batch"),
        *steps(17, 32, batch=2.0),
        fake.outcome(16, V.ACCEPTED, before=2.2, end=2.05, forecast=2.1, spread=0.01),
    )  # fmt: skip
    (trial,) = book.trials
    assert trial.seen == (pytest.approx(0.5), pytest.approx(0.15))
    assert trial_words(trial) == "batch ×2: noise scale 3.1× batch, +50 ± 15 % seen; kept"


def test_without_the_guard_a_refused_change_is_kept_and_said_to_be() -> None:
    """Its loss was not finite, and there was no copy to go back to (trainer_node/jump.py)."""
    stays = replace(fake.outcome(16, V.REFUSED), lost_steps=0, attempt=0)
    view = new_view("run")
    book = folded(
        fake.started(batch=True), *steps(1, 16), fake.decision(16, TWICE),
        *steps(17, 32, batch=2.0), stays, *steps(33, 34, batch=2.0), view=view,
    )  # fmt: skip
    assert book.in_force == TWICE
    assert [change[:3] for change in book.changes] == [(1, 1.0, 1.0), (17, 1.0, 2.0)]
    page = as_dict(view, now_seconds=0.0)
    assert "1 of 1 trials kept" in page["controls"]["words"]
    (row,) = page["controls"]["trials"]
    assert row["is_kept"] is page["series"]["control_trials"][0][4] is True
    assert row["became"].startswith("kept: its loss was not finite")


@pytest.mark.parametrize(
    "losses", [{"forecast": 2.2}, {"forecast": 2.3}, {"end": float("nan")}, {"forecast": float("inf")}]
)
def test_nothing_is_said_to_be_seen_where_the_losses_do_not_say(losses: dict[str, float]) -> None:
    book = folded(
        fake.started(), *steps(1, 16), fake.decision(16, TWICE), *steps(17, 32, batch=2.0),
        fake.outcome(16, V.ACCEPTED, before=2.2, **losses),
    )  # fmt: skip
    (trial,) = book.trials
    assert trial.seen is None
    assert "% seen" not in trial_words(trial)


def test_a_reason_that_says_the_change_itself_is_not_said_twice() -> None:
    book = folded(
        fake.started(), fake.decision(16, TWICE, "batch ×2: noise scale 3×"), fake.outcome(16, V.VETOED)
    )
    assert trial_words(book.trials[0]) == "batch ×2: noise scale 3×; not taken: the monitor vetoes"


def test_controls_that_are_no_numbers_are_told_and_never_in_force() -> None:
    for wrong in (
        m.Controls(rate_factor=float("nan")),
        m.Controls(batch_factor=0.0),
        m.Controls(rate_factor=1e300),
        m.Controls(decay_start=-5, decay_steps=5),
    ):
        book = folded(fake.started(), fake.decision(16, wrong), fake.outcome(16, V.ACCEPTED))
        assert told(book) == [(16, "controls that are no numbers", V.ACCEPTED)]
        assert book.in_force == m.Controls()


def test_a_book_of_a_long_run_is_bounded_and_still_knows_what_is_in_force() -> None:
    book = ControlBook()
    book.started(1)
    for number in range(3 * MAX_EVENTS):
        step = 32 * number
        book.observed(step, fake.observation(step, rate=(1.0, 2.0)[number % 2]).features)
        book.decided(fake.decision(step, m.Controls(read_out="average", decay_steps=number)))
        book.settled(fake.outcome(step, V.REFUSED if number else V.ACCEPTED))
    assert len(book._asked) <= MAX_EVENTS
    assert len(book.trials) == MAX_TRIALS
    assert book.trials[-1].outcome.base_step == 32 * (3 * MAX_EVENTS - 1)
    assert len(book.changes) <= MAX_CHANGES
    assert book.in_force.read_out == "average"


@pytest.mark.parametrize("is_late", [False, True])
def test_nothing_is_kept_of_rests_and_plain_jumps_that_are_settled(is_late: bool) -> None:
    """Nearly all points of a run are such: a stream of them would be megabytes."""
    book = ControlBook()
    book.started(1)
    for number in range(99):
        decision = fake.decision(16 * number, None)
        outcome = fake.outcome(16 * number, (V.REST, V.ACCEPTED)[number % 2])
        for message in (outcome, decision) if is_late else (decision, outcome):
            book.settled(message) if isinstance(message, m.Outcome) else book.decided(message)
    assert not book._others
    assert not book._missed
    assert not book.trials
    assert not book.is_used
