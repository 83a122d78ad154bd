"""The predictor inside the trainer's process sees what it would see on the bus, and is timed."""

from __future__ import annotations

import pytest

from common.bus import EntryId
from common.clock import FakeClock
from common.errors import EnvironmentFault
from common.messages import Alert, Evaluation, Message, Observation, PhaseDecision
from predictor_node.node import Predictor, in_memory_predictor
from tests.predictor.scripted import Log, ScriptedTrainer, small_settings
from trainer_node.race import in_process
from trainer_node.race.in_process import InProcessPredictor, installed_predictor


class Echo:
    """Answers nothing and writes down the ids; every entry takes a second."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.ids = clock, []

    def handle(self, message: Message, entry_id: EntryId) -> list[Message]:
        self.clock.advance(1.0)
        self.ids.append(entry_id)
        return [Alert(node="predictor", severity="warning", kind="k", text="t", step=0)]


def history_of(generation: int) -> list[Message]:
    log = Log(in_memory_predictor().handle)
    ScriptedTrainer(small_settings(), generation=generation).run(log.publish, until_step=60)
    return [message for _, message in log.entries]


def test_decisions_are_those_that_the_same_history_brings_over_the_bus() -> None:
    log = Log(in_memory_predictor().handle)
    ScriptedTrainer(small_settings()).run(log.publish)
    links = InProcessPredictor(in_memory_predictor(), FakeClock())
    answers = []

    def publish(message: Message) -> PhaseDecision | None:
        links.emit(message)
        if not isinstance(message, Observation) or message.decision_point is None:
            return None
        answers.append(links.wait_decision(step=message.step, attempt=message.attempt, seconds=None))
        return answers[-1]

    ScriptedTrainer(small_settings()).run(publish)
    assert len(log.decisions) > 5
    assert links.decisions == log.decisions
    assert answers == log.decisions


def test_entries_are_numbered_without_a_hole_and_afresh_in_each_generation() -> None:
    clock = FakeClock()
    echo = Echo(clock)
    links = InProcessPredictor(echo, clock)
    lengths = []
    for generation in (1, 2):
        messages = history_of(generation)
        lengths.append(len(messages))
        for message in messages:
            links.emit(message)
            links.emit(Evaluation(step=1, virtual_steps=0, loss=1.0, accuracy=None, train_seconds=1.0))
    assert echo.ids == [EntryId(g, n) for g in (1, 2) for n in range(1, lengths[g - 1] + 1)]
    assert links.seconds == float(sum(lengths))
    assert len(links.alerts) == sum(lengths)


def test_a_decision_for_another_point_is_none() -> None:
    links = InProcessPredictor(in_memory_predictor(), FakeClock())
    assert links.wait_decision(step=1, attempt=0, seconds=None) is None
    for message in history_of(1):
        links.emit(message)
    newest = links.decisions[-1]
    here = {"step": newest.base_step, "attempt": newest.base_attempt}
    assert links.wait_decision(**here, seconds=None) == newest
    assert links.wait_decision(**{**here, "step": here["step"] + 1}, seconds=None) is None
    assert links.wait_decision(**{**here, "attempt": 9}, seconds=None) is None
    assert links.veto() is None
    assert links.take_orders() == []


def test_the_installed_predictor_is_ours_and_fresh_each_time() -> None:
    first, second = installed_predictor(), installed_predictor()
    assert isinstance(first, Predictor)
    assert first is not second


def test_without_a_predictor_the_fault_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "NAME", "absent")
    with pytest.raises(EnvironmentFault, match="pip install"):
        installed_predictor()
