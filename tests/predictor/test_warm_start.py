"""What becomes of a run whose `predictor.state` cannot be used: one alert, and it learns from nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from safetensors.torch import load
from safetensors.torch import save as tensors_to_bytes
from torch import frombuffer, uint8

from common import features
from common.bus import EntryId
from common.messages import DIRECTIONS, Alert
from predictor_node.learned import LearnedPolicy
from predictor_node.node import Predictor
from predictor_node.policy import PolicyState
from predictor_node.state import MemoryStore, facts_of
from predictor_node.warm_start import SCHEMA, write_warm_start
from predictor_node.world_model import WorldModel
from tests.predictor.scripted import Log, ScriptedTrainer, small_settings, started

LEARNED, BOLD = 'predictor.policy="learned"', 'predictor.temper="aggressive"'


def run_of(*overrides: str) -> tuple[Log, MemoryStore, ScriptedTrainer]:
    store = MemoryStore()
    log = Log(Predictor(store).handle)
    trainer = ScriptedTrainer(small_settings(LEARNED, BOLD, *overrides))
    trainer.run(log.publish, until_step=150)
    return log, store, trainer


def fresh_state() -> PolicyState:
    settings = small_settings(LEARNED)
    return LearnedPolicy(settings, facts_of(started(settings))).state()


def of_former_features() -> PolicyState:
    """As a release before the features of the controls would have written it."""
    former = WorldModel(len(DIRECTIONS), 0, num_features=len(features.NAMES) - len(features.CONTROLS))
    state = fresh_state()
    world = frombuffer(bytearray(former.to_bytes()), dtype=uint8)
    return dataclasses.replace(state, tensors=tensors_to_bytes({**load(state.tensors), "world": world}))


def rewritten(path: Path, old: bytes, new: bytes) -> None:
    """Changed in one place, and sealed again."""
    head, body = path.read_bytes()[:8], path.read_bytes()[40:]
    assert body.count(old) == 1
    body = body.replace(old, new)
    path.write_bytes(head + hashlib.sha256(body).digest() + body)


def damage(path: Path, kind: str) -> None:
    if kind == "missing":
        return
    states = {"of former features": of_former_features, "of another policy": PolicyState}
    write_warm_start(path, states.get(kind, fresh_state)())
    if kind == "of the former schema":
        rewritten(path, b'"schema": %d' % SCHEMA, b'"schema": %d' % (SCHEMA - 1))
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    if kind == "no state":
        path.write_text("a text\n")


@pytest.mark.parametrize(
    "kind",
    ["missing", "cut", "no state", "of the former schema", "of former features", "of another policy"],
)
def test_a_state_that_cannot_be_used_is_one_alert_with_file_and_cure_and_the_run_goes_on_without(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "job.hps"
    damage(path, kind)
    log, _, _ = run_of(f'predictor.state="{path}"')
    (alert,) = [answer for answer in log.answers if isinstance(answer, Alert)]
    assert (alert.kind, alert.severity) == ("warm_start_unused", "error")
    assert str(path) in alert.text
    assert "predictor-node fit" in alert.text
    assert "\n" not in alert.text
    assert len(alert.text) < 400
    plain, _, _ = run_of()
    assert log.decisions == plain.decisions
    assert any(decision.horizon_steps for decision in log.decisions)


def test_a_run_that_goes_on_needs_the_file_no_more_that_it_started_from(tmp_path: Path) -> None:
    path = tmp_path / "job.hps"
    write_warm_start(path, fresh_state())
    log, store, trainer = run_of(f'predictor.state="{path}"')
    assert not [answer for answer in log.answers if isinstance(answer, Alert)]
    newest = store.newest("scripted")
    assert newest is not None
    path.unlink()
    step = newest.learned.history.rows[-1].step
    resumed = started(trainer.settings, generation=2, resumed_from=newest.name, first_step=step)
    again = Predictor(store)
    assert again.handle(resumed, EntryId(2, 1)) == []
    assert repr(again.learned.policy) == repr(newest.learned.policy)
