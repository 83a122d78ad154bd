"""Repeats, holes and set-backs, against a slow twin that remembers everything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.messages import Phase
from predictor_node.history import LIMIT_STEPS, History
from predictor_node.history_file import history_from_bytes, history_to_bytes
from tests.predictor.scripted import observed


def history_of(*steps: int, attempt: int = 0) -> History:
    history = History()
    for step in steps:
        history = history.append(observed(step, attempt))
    return history


def steps_of(history: History) -> list[int]:
    return [row.step for row in history.rows]


class HistoryMachine(RuleBasedStateMachine):
    """The twin: a plain dict of the steps that are in force, and the step of the last hole."""

    def __init__(self) -> None:
        super().__init__()
        self.history = History()
        self.in_force: dict[int, int] = {}  # step -> attempt
        self.starts: list[int] = []  # steps with a hole right before them, or at the very beginning
        self.step = 0
        self.attempt = 0
        self.missing = 0
        self.repeats = 0

    def _see(self, step: int) -> None:
        self.history = self.history.append(observed(step, self.attempt))
        self.step = step
        self.in_force[step] = self.attempt

    @rule(count=st.integers(1, 40))
    def train(self, count: int) -> None:
        if not self.in_force:
            self.starts.append(self.step + 1)
        for _ in range(count):
            self._see(self.step + 1)

    @precondition(lambda self: self.in_force)
    @rule(lost=st.integers(1, 5))
    def lose(self, lost: int) -> None:
        self.missing += lost
        self.starts.append(self.step + lost + 1)
        self._see(self.step + lost + 1)

    @precondition(lambda self: self.in_force)
    @rule(back=st.integers(0, 20))
    def repeat(self, back: int) -> None:
        self.repeats += 1
        self.history = self.history.append(observed(max(1, self.step - back), self.attempt))

    @precondition(lambda self: self.attempt > 0 and self.in_force.get(self.step) == self.attempt)
    @rule(ahead=st.integers(1, 5))
    def old_attempt_arrives_late(self, ahead: int) -> None:
        self.repeats += 1
        self.history = self.history.append(observed(self.step + ahead, self.attempt - 1))

    @precondition(lambda self: self.in_force)
    @rule(lost=st.integers(0, 20))
    def set_back(self, lost: int) -> None:
        """To a step that was seen, as a trainer restores; its next step follows at once."""
        candidates = [step for step in self.in_force if step <= self.step - lost]
        restored = max(candidates, default=min(self.in_force))
        self.in_force = {step: a for step, a in self.in_force.items() if step <= restored}
        self.starts = [start for start in self.starts if start <= restored]
        self.attempt += 1
        self._see(restored + 1)

    @invariant()
    def same_steps_in_force(self) -> None:
        expected = [(step, self.in_force[step]) for step in sorted(self.in_force)]
        kept = [(row.step, row.attempt) for row in self.history.rows]
        assert len(kept) <= LIMIT_STEPS
        assert kept == expected[-len(kept) :] if kept else not expected
        assert self.history.missing_steps == self.missing
        assert self.history.repeats == self.repeats

    @invariant()
    def contiguous_since_the_last_hole(self) -> None:
        if self.in_force:
            start = max(self.starts)
            assert self.history.contiguous_steps == self.step - start + 1
            fitted = self.history.fitted_rows(24)
            assert [row.step for row in fitted] == list(range(max(start, self.step - 23), self.step + 1))


HistoryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestHistoryMachine = HistoryMachine.TestCase


def test_history_is_bounded_and_counts_beyond_its_bound() -> None:
    history = history_of(*range(1, LIMIT_STEPS + 51))
    assert steps_of(history) == list(range(51, LIMIT_STEPS + 51))
    assert history.contiguous_steps == LIMIT_STEPS + 50


def test_set_back_beyond_the_bound_leaves_only_the_new_steps() -> None:
    history = history_of(*range(1, LIMIT_STEPS + 51)).append(observed(10, 1))
    assert steps_of(history) == [10]
    assert history.missing_steps == 0


def test_append_leaves_the_old_history_alone() -> None:
    old = history_of(1, 2, 3)
    old.append(observed(4))
    assert steps_of(old) == [1, 2, 3]


def test_unseen_attempt_restarts_the_count_of_contiguous_steps() -> None:
    """Rows of attempt 0 beyond the unseen restore of attempt 1 may have been undone."""
    history = history_of(*range(1, 21)).append(observed(21, 2))
    assert history.contiguous_steps == 1
    assert history_of(*range(1, 21)).append(observed(21, 1)).contiguous_steps == 21


def test_resume_forgets_what_lies_beyond_and_takes_any_attempt() -> None:
    history = history_of(*range(1, 21), attempt=5).resume_at(15).append(observed(16, 3))
    assert steps_of(history) == list(range(1, 17))
    assert (history.contiguous_steps, history.missing_steps, history.repeats) == (16, 0, 0)
    assert history.append(observed(16, 3)).repeats == 1


def test_resume_behind_a_hole_counts_it() -> None:
    history = history_of(*range(1, 11)).resume_at(15).append(observed(16))
    assert (history.contiguous_steps, history.missing_steps) == (1, 5)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20),
    st.booleans(),
    st.sampled_from(Phase),
)
def test_bytes_keep_every_history_exactly(losses: list[float], is_resuming: bool, phase: Phase) -> None:
    history = History()
    for step, loss in enumerate(losses, start=1):
        history = history.append(observed(step, phase=phase, loss=loss))
    if is_resuming:
        history = history.resume_at(len(losses) // 2)
    content = history_to_bytes(history)
    again = history_from_bytes(content)
    assert history_to_bytes(again) == content
    assert (steps_of(again), again.resuming) == (steps_of(history), is_resuming)
    for mine, theirs in zip(history.rows, again.rows, strict=True):
        assert mine.loss == theirs.loss or (math.isnan(mine.loss) and math.isnan(theirs.loss))
        assert (mine.phase, mine.attempt, mine.contiguous_steps) == (
            theirs.phase,
            theirs.attempt,
            theirs.contiguous_steps,
        )


@pytest.mark.parametrize("content", [b"", b"junk" * 9, history_to_bytes(history_of(1, 2))[:-8]])
def test_damaged_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        history_from_bytes(content)
