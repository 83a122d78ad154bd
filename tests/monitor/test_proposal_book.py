"""Jumps with their reasons: whoever came first, however far ahead, and though the monitor starts late."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common import messages as m
from monitor_node.proposal_book import MAX_DECISIONS, MAX_OUTCOMES, ProposalBook, why
from tests.monitor import fake_run as fake

V = m.Verdict
EVERY_STEPS = 16


def told(book: ProposalBook) -> list[tuple[int, str]]:
    return [(mark[0], mark[5].partition("proposed as ")[2]) for mark in book.marks]


def run_of(count: int) -> tuple[list[m.PhaseDecision], list[m.Outcome]]:
    steps = [EVERY_STEPS * number for number in range(1, count + 1)]
    return (
        [fake.decision(step, 5, reason=f"why {step}") for step in steps],
        [fake.outcome(step, V.STALE, 5) for step in steps],
    )


@pytest.mark.parametrize("ahead", [0, 1, 65, 300, -1, -300])
def test_a_monitor_that_starts_again_knows_why_every_jump_was_proposed(ahead: int) -> None:
    """It reads two streams in turns: decisions may come far before their outcomes, or far behind."""
    count = 350
    decisions, outcomes = run_of(count)
    said = [(place - ahead, 0, decision) for place, decision in enumerate(decisions)]
    became = [(place, 1, outcome) for place, outcome in enumerate(outcomes)]
    book = ProposalBook()
    book.started(1)
    for _, _, message in sorted([*said, *became], key=lambda entry: entry[:2]):
        if isinstance(message, m.PhaseDecision):
            book.decided(message)
        else:
            book.settled(message, 1.0)
    assert told(book) == [(step.base_step, step.reason) for step in decisions]
    assert [row.said.reason if row.said else "" for row in book.rows] == [
        decision.reason for decision in decisions[-12:]
    ]


def test_what_was_looked_at_before_its_decision_came_is_told_afterwards() -> None:
    book = ProposalBook()
    (decision,), (outcome,) = run_of(1)
    book.started(1)
    book.settled(outcome, 1.0)
    assert told(book) == [(16, "")]
    assert book.rows[0].said is None
    book.decided(decision)
    assert told(book) == [(16, "why 16")]


def test_without_the_guard_a_refused_jump_is_not_said_to_be_undone() -> None:
    made = fake.outcome(16, V.REFUSED, 5)
    assert why(made, None).startswith("undone: worse than without the jump")
    assert why(replace(made, lost_steps=0), None).startswith("kept: its loss was not finite")


def test_a_decision_of_an_earlier_start_does_not_explain_a_jump_of_a_later_one() -> None:
    """Ids are of step and attempt: a resumed run says them again."""
    book = ProposalBook()
    (decision,), (outcome,) = run_of(1)
    book.started(1)
    book.decided(decision)
    book.started(2)
    book.settled(outcome, 1.0)
    assert told(book) == [(16, "")]


def test_a_long_run_stays_within_bounds_and_knows_the_newest() -> None:
    book = ProposalBook()
    book.started(1)
    decisions, outcomes = run_of(MAX_DECISIONS + MAX_OUTCOMES)
    for decision in decisions:
        book.decided(decision)
    assert len(book._said) == MAX_DECISIONS
    for outcome in outcomes:
        book.settled(outcome, 1.0)
    assert MAX_OUTCOMES // 2 <= len(book.marks) <= MAX_OUTCOMES
    assert len(book._said) == len(book.marks), "what nobody will ask for again is not kept"
    assert all(reason == f"why {step}" for step, reason in told(book))
