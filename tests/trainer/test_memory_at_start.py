"""A device without room for the first directions: the run begins as plain training, says so, and recovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import sealed_folder
from common.messages import Alert, MemoryAction, MemoryReport, Outcome
from tests.trainer.memory_scene import Scene, gpt_settings, ordered
from tests.trainer.simulated_memory import SimulatedMemory, within
from tests.trainer.test_memory_survives import save, scene_with_checkpoints
from tests.trainer.tiny import same_bits, weights_of
from trainer_node import checkpoint

OFF = MemoryAction.PREDICTION_OFF


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes a basis while its loop is built finds the memory full."""
    full = SimulatedMemory.__init__

    def begin(self: SimulatedMemory, budget_bytes: float = float("inf")) -> None:
        full(self, budget_bytes)
        self.strike = lambda: within("basis.py", "__init__", "build_loop")

    monkeypatch.setattr(SimulatedMemory, "__init__", begin)


@pytest.mark.usefixtures("no_room")
def test_a_run_without_room_for_directions_begins_as_plain_training_and_says_so() -> None:
    scene = Scene(gpt_settings())
    assert scene.memory.raised == 1
    assert scene.loop.prediction.basis is None
    (alert,) = scene.links.of(Alert)
    assert (alert.kind, "plain training" in alert.text) == ("out_of_memory", True)
    assert OFF in scene.links.of(MemoryReport)[-1].in_force
    scene.run()
    assert scene.loop.progress.step == 40
    assert scene.links.of(Outcome) == []


@pytest.mark.usefixtures("no_room")
def test_it_trains_to_the_same_bits_as_plain_training() -> None:
    plain = Scene(gpt_settings("predictor.enabled=false"), is_counted=False).run()
    assert same_bits(weights_of(Scene(gpt_settings()).run().loop), weights_of(plain.loop))


@pytest.mark.usefixtures("no_room")
def test_prediction_comes_back_when_it_is_ordered_and_there_is_room() -> None:
    scene = Scene(gpt_settings(), at={4: ordered(OFF, undo=True)})
    scene.run()
    assert scene.loop.prediction.basis is not None
    assert scene.loop.memory.in_force == set()


def test_a_checkpoint_with_directions_resumes_where_there_is_no_room_for_them(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    scene_with_checkpoints(tmp_path, at={17: save}).run()
    (folder,) = sealed_folder.folders(tmp_path)
    request.getfixturevalue("no_room")
    resumed = Scene(gpt_settings())
    checkpoint.load(folder, resumed.loop)
    assert resumed.loop.prediction.basis is None
    assert OFF in resumed.loop.memory.in_force
    resumed.run()
    assert resumed.loop.progress.step == 40
