"""A run that its rate has killed: seen at once, lowered from its first weights until it learns."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import pytest

from common.messages import Controls, Phase, PhaseDecision, Verdict
from predictor_node.history import History
from predictor_node.node import Predictor
from predictor_node.state import MemoryStore
from tests.predictor.controlled_run import (
    FIRST,
    FLOOR,
    ControlledTrainer,
    World,
    controlled_settings,
)
from tests.predictor.scripted import Log, Publish, observed, outcome
from tests.predictor.test_control_evidence import falling, said_of
from tests.predictor.test_pilot import BATCH, LIVE, NO_JUMPS, RATE, Flight
from trainer_node.trial import blank_outcome

DEAD = FIRST - FLOOR + 0.001  # stays at chance
BORN = FIRST - FLOOR


@dataclass(frozen=True, kw_only=True)
class Killing(World):
    """Above its best rate the loss explodes in the first step, and is that of chance ever after."""

    def after(self, excess: float, controls: Controls) -> float:
        if excess >= DEAD:
            return DEAD
        return 40.0 if controls.rate_factor > self.best_rate else super().after(excess, controls)


@dataclass
class Returning(ControlledTrainer):
    """As trainer_node/first_weights.py does it, without weights."""

    refuses: bool = False

    def _try(self, publish: Publish, decision: PhaseDecision) -> None:
        wanted = decision.controls
        assert wanted is not None
        if self.excess < 0.9 * BORN or wanted.rate_factor >= self.controls.rate_factor:
            super()._try(publish, decision)
            return
        self.proposals.append(decision)
        before, losses = dataclasses.replace(self), list(self.losses)
        self.step, self.clock, self.excess, self.controls = 0, 0.0, BORN, wanted
        self.losses, self.attempt = [], self.attempt + 1
        steps = self.settings.trainer.controls.trial_steps
        self._leg(publish, steps)
        verdict, lost_steps = Verdict.ACCEPTED, before.step
        if self.refuses:
            self._go_back_to(before, losses)
            verdict, lost_steps = Verdict.REFUSED, steps
        told = outcome(decision, verdict, self.attempt, lost_steps=lost_steps)
        publish(dataclasses.replace(told, probation_steps=steps))


def flown(*overrides: str, best_rate: float, refuses: bool = False) -> Flight:
    store = MemoryStore(keep_all=True)
    predictor = Predictor(store)
    log = Log(predictor.handle)
    settings = controlled_settings(*NO_JUMPS, RATE, *overrides)
    trainer = Returning(settings, Killing(best_rate=best_rate), refuses=refuses)
    trainer.run(log.publish)
    return Flight(trainer, log, predictor, store)


@pytest.mark.parametrize(("best_rate", "returns"), [(0.5, 1), (0.1, 2), (1 / 50, 3)])
def test_a_killed_run_is_lowered_from_its_first_weights_until_it_learns(
    best_rate: float, returns: int
) -> None:
    flight = flown("predictor.control_share=0.0", best_rate=best_rate)
    first = flight.trainer.proposals[:returns]
    assert [decision.arm for decision in first] == ["rate:/4"] * returns
    assert {decision.base_step for decision in first} == {32}  # the first decision point, each time
    assert all("exploded" in decision.reason for decision in first)
    assert flight.trainer.controls.rate_factor == 0.25**returns
    assert flight.trainer.excess < 0.5 * BORN
    (change,) = flight.pilot["in_force"]
    assert (change["base_step"], change["kept_step"], change["clock"]) == (0, 0, 0.0)
    assert change["controls"]["rate_factor"] == 0.25**returns


def test_where_it_is_not_rescued_the_rate_stays_within_its_bound() -> None:
    flight = flown(best_rate=1e-3)
    assert flight.trainer.controls.rate_factor == 1 / 64
    assert len([d for d in flight.trainer.proposals if "exploded" in d.reason]) == 3


def test_a_refused_return_leaves_controls_and_clock_as_they_were() -> None:
    flight = flown(best_rate=0.5, refuses=True)
    assert flight.trainer.proposals
    assert flight.trainer.controls == Controls()
    last = flight.pilot["in_force"][-1]
    assert last["controls"]["rate_factor"] == 1.0
    assert last["clock"] == last["base_step"]


def test_the_clock_of_a_return_counts_the_batch_that_it_has() -> None:
    flight = flown(BATCH, LIVE, best_rate=0.5)
    changes = flight.pilot["in_force"]
    clock = (
        changes[-1]["clock"]
        + (flight.trainer.step - changes[-1]["base_step"]) * changes[-1]["controls"]["batch_factor"]
    )
    assert clock == flight.trainer.clock


# ---- the sign ------------------------------------------------------------------------------------------


def killed(level: float, first: float = 2.3, noise: float = 0.02) -> list[float]:
    draw = random.Random(2)
    return [first, 10.5, *(level + draw.gauss(0.0, noise) for _ in range(30))]


@pytest.mark.parametrize("is_early", [True, False])
def test_a_loss_that_exploded_and_stands_still_at_chance_is_a_sign_whenever_it_is_seen(
    is_early: bool,
) -> None:
    assert "exploded" in said_of(killed(2.3), is_early=is_early)


def test_a_leap_behind_which_the_run_learns_is_none() -> None:
    assert said_of(killed(1.5)) == ""
    back = [2.3, 10.5, *(2.4 - 0.01 * step for step in range(20))]
    assert said_of(back) == ""
    assert said_of([2.3, 3.3, *killed(2.3)[2:]]) == ""  # less than a half of the first loss above it
    assert said_of([*falling(3), 40.0, *falling(40)[3:]]) == ""


# ---- what is remembered --------------------------------------------------------------------------------


def test_a_kept_return_is_what_is_remembered_and_a_refused_one_was_never_there() -> None:
    history, born = History(), blank_outcome("16.1", Verdict.ACCEPTED, step=16, attempt=2)
    for attempt in (1, 2):
        history = through(history, attempt, Phase.CORRECT, 1, 8)
        kept = history.after(dataclasses.replace(born, attempt=attempt, probation_steps=8, lost_steps=16))
        history = through(kept, attempt, Phase.FULL, 9, 16)
    assert [(row.step, row.attempt) for row in history.rows] == [(step, 2) for step in range(1, 17)]
    assert (history.contiguous_steps, history.missing_steps) == (16, 0)
    refused = dataclasses.replace(born, verdict=Verdict.REFUSED, attempt=4, probation_steps=8, lost_steps=8)
    back = through(through(history, 3, Phase.CORRECT, 1, 8).after(refused), 4, Phase.FULL, 17, 17)
    assert [row.loss for row in back.rows[:-1]] == [row.loss for row in history.rows]
    assert (back.contiguous_steps, back.missing_steps) == (17, 0)


def through(history: History, attempt: int, phase: Phase, first: int, last: int) -> History:
    for step in range(first, last + 1):
        history = history.append(dataclasses.replace(observed(step, attempt), phase=phase))
    return history
