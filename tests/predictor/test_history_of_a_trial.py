"""A trial beside its twin: whichever is kept, its rows are what is remembered, without a hole."""

from __future__ import annotations

import dataclasses

import pytest

from common.messages import Outcome, Phase, Verdict
from predictor_node.history import History
from predictor_node.node import Predictor
from predictor_node.state import MemoryStore
from tests.predictor.controlled_run import ControlledTrainer, World, controlled_settings
from tests.predictor.scripted import Log, observed
from trainer_node.trial import blank_outcome

BASE, TRIAL = 20, 8


def _leg(history: History, attempt: int, steps: int, loss: float) -> History:
    for step in range(BASE + 1, BASE + steps + 1):
        row = dataclasses.replace(observed(step, attempt), phase=Phase.CORRECT)
        history = history.append(dataclasses.replace(row, features=(loss, *row.features[1:])))
    return history


def _tried(twin_steps: int) -> History:
    history = History()
    for step in range(1, BASE + 1):
        history = history.append(observed(step, 0))
    return _leg(_leg(history, 0, TRIAL, 1.0), 1, twin_steps, 2.0) if twin_steps else history


def _outcome(verdict: Verdict, attempt: int, lost_steps: int) -> Outcome:
    blank = blank_outcome("20.0", verdict, step=BASE, attempt=attempt)
    return dataclasses.replace(blank, probation_steps=TRIAL, lost_steps=lost_steps)


@pytest.mark.parametrize("twin_steps", [TRIAL // 2, TRIAL, 2 * TRIAL])
def test_behind_a_kept_trial_its_own_steps_are_remembered_and_none_is_missing(twin_steps: int) -> None:
    history = _tried(twin_steps).after(_outcome(Verdict.ACCEPTED, 2, twin_steps))
    history = history.append(observed(BASE + TRIAL + 1, 2))
    assert [row.step for row in history.rows] == list(range(1, BASE + TRIAL + 2))
    assert {row.loss for row in history.rows if BASE < row.step <= BASE + TRIAL} == {1.0}
    assert (history.contiguous_steps, history.missing_steps) == (BASE + TRIAL + 1, 0)


@pytest.mark.parametrize("twin_steps", [TRIAL // 2, TRIAL, 2 * TRIAL])
def test_behind_a_refused_trial_those_of_its_twin_are(twin_steps: int) -> None:
    history = _tried(twin_steps).after(_outcome(Verdict.REFUSED, 1, TRIAL))
    history = history.append(observed(BASE + twin_steps + 1, 1))
    assert {row.loss for row in history.rows if BASE < row.step <= BASE + twin_steps} == {2.0}
    assert (history.contiguous_steps, history.missing_steps) == (BASE + twin_steps + 1, 0)
    assert not history.aside


@pytest.mark.parametrize("verdict", [Verdict.ABORTED, Verdict.FAILED])
def test_behind_a_twin_that_came_to_no_end_neither_is(verdict: Verdict) -> None:
    history = _tried(TRIAL).after(_outcome(verdict, 2, 2 * TRIAL)).append(observed(BASE + 1, 2))
    assert [(row.step, row.attempt) for row in history.rows[-2:]] == [(BASE, 0), (BASE + 1, 2)]
    assert (history.contiguous_steps, history.missing_steps, history.repeats) == (BASE + 1, 0, 0)


def test_a_return_to_an_earlier_step_that_was_refused_is_forgotten() -> None:
    """All steps were set back for others on trial, from the first one on, and are in force again."""
    history = _tried(0)
    for step in range(1, TRIAL + 1):
        history = history.append(dataclasses.replace(observed(step, 1), phase=Phase.CORRECT))
    history = history.after(_outcome(Verdict.REFUSED, 2, TRIAL)).append(observed(BASE + 1, 2))
    assert [row.step for row in history.rows] == list(range(1, BASE + 2))
    assert (history.contiguous_steps, history.missing_steps) == (BASE + 1, 0)


def test_a_jump_that_is_undone_puts_nothing_aside() -> None:
    history = _leg(History().append(observed(BASE, 0)), 0, TRIAL, 1.0).append(observed(BASE + 1, 1))
    assert not history.aside


def test_a_smaller_batch_that_is_kept_leaves_no_hole_in_a_whole_run() -> None:
    """In as much time its twin takes half as many steps: the others are none that never arrived."""
    settings = controlled_settings("trainer.controls.batch=true", 'predictor.policy="fixed"')
    predictor = Predictor(MemoryStore(keep_all=True))
    world = World(noise_scale=0.1, loss_noise=0.002)
    trainer = ControlledTrainer(settings, world, verdict=lambda _: Verdict.ACCEPTED)
    trainer.run(Log(predictor.handle).publish)
    assert "batch:/2" in [decision.arm for decision in trainer.proposals]
    assert predictor.counters["missing_steps"] == 0
