"""What was given up for memory outlives a checkpoint; an emergency checkpoint takes none of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import sealed_folder
from common.messages import Alert, CheckpointRequest, CheckpointWritten, MemoryAction, OrderDone
from tests.trainer.memory_scene import Scene, gpt_settings, ordered
from tests.trainer.simulated_memory import SimulatedMemory, within
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node import checkpoint
from trainer_node.checkpoint import Checkpoints
from trainer_node.fingerprint import fingerprint
from trainer_node.housekeeping import Housekeeping
from trainer_node.memory_orders import carry_out
from trainer_node.node import TrainerJob, run_trainer
from trainer_node.out_of_memory import MemoryExhausted, TornUpdate
from trainer_node.rollback import roll_back, set_back
from trainer_node.run_folder import RunFolder
from trainer_node.snapshot import optimizer_tensors
from trainer_node.spikes import Spike

A = MemoryAction
Uncounted = partial(Scene, is_counted=False)


def scene_with_checkpoints(root: Path, *overrides: str, **options: Any) -> Scene:
    scene = Uncounted(gpt_settings(*overrides), **options)
    scene.housekeeping = Housekeeping(
        scene.links.emit, Checkpoints(root, keep=3, on_failure=lambda text: pytest.fail(text))
    )
    scene.housekeeping._next_checkpoint_step = scene.housekeeping._next_evaluation_step = 1000
    return scene


def save(scene: Scene, *, emergency: bool = False) -> None:
    scene.links.orders.append(CheckpointRequest(request_id="c", emergency=emergency, reason="test"))


GIVEN_UP = [
    (A.HALVE_MICRO_BATCH, A.HALVE_MICRO_BATCH),
    (A.RECOMPUTE,),
    (A.BASIS_BF16,),
    (A.PREDICTION_OFF,),
    (A.BASIS_BF16, A.HALVE_MICRO_BATCH, A.RECOMPUTE),
]


@pytest.mark.parametrize("actions", GIVEN_UP, ids=lambda actions: "+".join(actions))
def test_a_resumed_run_goes_on_bit_for_bit_with_what_was_in_force(
    actions: tuple[MemoryAction, ...], tmp_path: Path
) -> None:
    overrides = ("trainer.model.dropout=0.1", "trainer.steps=28")  # an end of a window on either side
    whole = scene_with_checkpoints(tmp_path, *overrides, at={10: ordered(*actions), 17: save})
    whole.run()
    (folder,) = sealed_folder.folders(tmp_path)
    resumed = Uncounted(gpt_settings(*overrides))
    checkpoint.load(folder, resumed.loop)
    assert resumed.loop.progress.step == 17
    assert resumed.loop.memory.to_json() == json.loads((folder / "state.json").read_text())["memory"]
    resumed.run()
    assert resumed.loop.memory.in_force == whole.loop.memory.in_force
    assert resumed.loop.memory.halvings == whole.loop.memory.halvings
    assert same_bits(weights_of(whole.loop), weights_of(resumed.loop))
    if whole.loop.basis is not None:
        assert resumed.loop.basis is not None
        mine, theirs = whole.loop.basis.tensors(), resumed.loop.basis.tensors()
        assert mine.keys() == theirs.keys()
        assert same_bits(mine.values(), theirs.values())


def test_a_checkpoint_from_before_there_were_orders_can_be_resumed(tmp_path: Path) -> None:
    scene_with_checkpoints(tmp_path, at={17: save}).run()
    (folder,) = sealed_folder.folders(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    del state["memory"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "state.json"
    manifest["files"]["state.json"] = {
        **manifest["files"]["state.json"],
        "bytes": path.stat().st_size,
        "sha256": sealed_folder.sha256_of(path),
    }
    (folder / "manifest.json").write_text(sealed_folder.manifest_text(manifest))
    resumed = Uncounted(gpt_settings())
    checkpoint.load(folder, resumed.loop)
    assert resumed.loop.memory.in_force == set()


@pytest.mark.parametrize("then", [(), (A.BASIS_BF16,), (A.PREDICTION_OFF,)], ids=str)
@pytest.mark.parametrize("now", [(), (A.BASIS_BF16,), (A.PREDICTION_OFF,)], ids=str)
def test_a_rollback_keeps_what_is_in_force_now_whatever_was_then(
    then: tuple[MemoryAction, ...], now: tuple[MemoryAction, ...], tmp_path: Path
) -> None:
    scene = scene_with_checkpoints(tmp_path, "trainer.steps=30")
    scene.at = {9: ordered(*then), 16: save, 18: ordered(*then, undo=True), 21: ordered(*now)}
    at_checkpoint: list[Tensor] = []
    scene.at[17] = lambda s: at_checkpoint.extend(weights_of(s.loop))

    def back(scene: Scene) -> None:
        before = set(scene.loop.memory.in_force)
        scene.housekeeping._checkpoints.wait()
        set_back(sealed_folder.folders(tmp_path)[0], scene.loop)
        assert scene.loop.progress.step == 16
        assert scene.loop.memory.in_force == before == set(now)
        assert (scene.loop.basis is None) == (A.PREDICTION_OFF in now)
        if scene.loop.basis is not None:
            is_bf16 = any(t.dtype is torch.bfloat16 for t in scene.loop.basis.tensors().values())
            assert is_bf16 == (A.BASIS_BF16 in now)
            if A.PREDICTION_OFF in then:  # made anew here: warm one whole window from here on
                phase = scene.loop.progress.phase
                assert scene.loop.memory.proposals_from_window == phase.windows + 2
        scene.at.clear()

    scene.at[27] = back
    scene.run()
    assert scene.loop.progress.step == 30
    assert all(o.done for o in scene.links.of(OrderDone))


@pytest.mark.parametrize(("shortages", "place"), [(1, "put_tensors"), (2, "_check_finite")])
def test_a_way_back_without_memory_costs_the_directions_and_at_worst_ends_the_run_in_words(
    shortages: int, place: str, tmp_path: Path
) -> None:
    scene = scene_with_checkpoints(tmp_path, "trainer.steps=24", at={10: ordered(A.BASIS_BF16), 16: save})
    scene.at[17] = ordered(A.BASIS_BF16, undo=True)
    at_checkpoint: list[Tensor] = []

    def back(scene: Scene) -> None:
        scene.at.clear()
        spike = Spike(first_step=20, loss=9.0, usual_loss=2.0)
        with SimulatedMemory() as memory:
            memory.strike = lambda: memory.raised < shortages and within(place)
            roll_back(scene.loop, scene.housekeeping._checkpoints, spike)
        assert scene.loop.progress.step == 16
        at_checkpoint.extend(weights_of(scene.loop))

    scene.at[21] = back
    if shortages == 2:
        with pytest.raises(TornUpdate, match="the way back to step-00000016"):
            scene.run()
        return
    scene.run()
    assert scene.loop.memory.in_force == {A.PREDICTION_OFF}
    assert [a.kind for a in scene.links.of(Alert)] == ["out_of_memory"]
    saved = load_file(sealed_folder.folders(tmp_path)[0] / "model.safetensors")
    names = [name for name, _ in scene.task.model.named_parameters()]
    assert same_bits(at_checkpoint, [saved[name] for name in names])
    assert scene.loop.progress.step == 24


# ---- the emergency checkpoint --------------------------------------------------------------------


class NoDeviceMemory(TorchDispatchMode):
    """Pretends that `device` are tensors on a device and notes operations that make new ones from them.

    A copy by Tensor.cpu is on the host, and so is what is made from it.
    """

    def __init__(self, device: Iterator[Tensor]) -> None:
        super().__init__()
        self._device = {t.untyped_storage()._cdata for t in device}
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        is_on_device = any(t.untyped_storage()._cdata in self._device for t in inputs)
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in inputs}
        for tensor in tree_leaves(made):
            is_new = isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known
            if is_on_device and is_new and not within("to_the_host"):
                self.made.append(str(func))
        return made


def everything(scene: Scene) -> Iterator[Tensor]:
    yield from scene.task.model.parameters()
    yield from scene.task.model.buffers()
    yield from optimizer_tensors(scene.loop.optimizers)
    averages = scene.loop.basis.averages
    yield from averages._average
    yield from averages._slow


def to_the_host(tensor: Tensor) -> Tensor:
    return tensor.clone()


def test_an_emergency_checkpoint_allocates_nothing_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scene_with_checkpoints(tmp_path, "trainer.steps=16", "trainer.optimizer.name=muon")
    scene.run()
    monkeypatch.setattr(Tensor, "cpu", to_the_host)
    state = optimizer_tensors(scene.loop.optimizers)
    matrix = next(t for t in state if t.dim() == 2)
    matrix.set_(matrix.t().contiguous().t())  # not contiguous: it must be packed on the host
    watch = NoDeviceMemory(everything(scene))
    with watch:
        scene.housekeeping.save(scene.loop, emergency=True)
        made_while_saving = list(watch.made)
        torch.clone(next(iter(scene.task.model.parameters())))
    assert watch.made[len(made_while_saving) :], "the watch sees nothing"
    assert made_while_saving == []
    scene.housekeeping._checkpoints.close()
    (folder,) = sealed_folder.folders(tmp_path)
    assert sealed_folder.is_emergency(folder.name)
    fresh = Uncounted(gpt_settings("trainer.steps=16", "trainer.optimizer.name=muon"))
    checkpoint.load(folder, fresh.loop)
    assert same_bits(weights_of(fresh.loop), weights_of(scene.loop))
    assert same_bits(optimizer_tensors(fresh.loop.optimizers), state)


def test_the_fingerprint_of_a_checkpoint_is_that_of_its_weights(tmp_path: Path) -> None:
    scene = scene_with_checkpoints(tmp_path, "trainer.steps=18", at={16: partial(save, emergency=True)}).run()
    (written,) = scene.links.of(CheckpointWritten)
    scene.housekeeping._checkpoints.close()
    found = load_file(sealed_folder.folders(tmp_path)[0] / "model.safetensors")
    twin = Uncounted(gpt_settings("trainer.steps=18"))
    checkpoint.load(sealed_folder.folders(tmp_path)[0], twin.loop)
    weights = [p for p in twin.task.model.parameters() if p.requires_grad]
    assert fingerprint(weights) == written.fingerprint
    assert len(found) == len(weights)


# ---- the process ---------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_is_saved_before_it_ends_and_can_go_on_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings("predictor.enabled=false", "trainer.decision_mode=live", "trainer.threads=1")
    job = TrainerJob(
        run=RunFolder(tmp_path / "run"), settings=settings, redis_url=f"memory://{tmp_path.name}"
    )
    forward, passes = nn.Conv2d.forward, [0]

    def full_after_25_steps(self: nn.Conv2d, inputs: Tensor) -> Tensor:
        passes[0] += self.training and self.in_channels == 1
        if passes[0] > 25 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, inputs)

    monkeypatch.setattr(nn.Conv2d, "forward", full_after_25_steps)
    with pytest.raises(MemoryExhausted) as error:
        run_trainer(job, threading.Event())
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    newest = sealed_folder.folders(job.run.trainer_checkpoints)[0]
    assert newest.name.startswith("step-00000025")
    assert json.loads(job.run.summary.read_text())["status"] == "stopped"
    monkeypatch.undo()
    resumed = TrainerJob(run=job.run, settings=settings, redis_url=job.redis_url, resume=True)
    assert run_trainer(resumed, threading.Event()) == 0
    twin = tiny_loop(ScriptedLinks(), settings)
    twin.run()
    last = load_file(sealed_folder.folders(job.run.trainer_checkpoints)[0] / "model.safetensors")
    for name, parameter in twin.task.model.named_parameters():
        np.testing.assert_allclose(last[name], parameter.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("fraction", "calls"), [(0.0, []), (0.4, [0.4])])
def test_the_share_of_a_gpu_is_asked_for_when_it_is_set(
    fraction: float, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer_node import assembly

    asked: list[float] = []
    monkeypatch.setattr(assembly, "choose_device", lambda settings: torch.device("cuda"))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share)
    )
    monkeypatch.setattr(assembly, "build_task", lambda settings, device: None)
    assembly.prepare_task(tiny_settings(f"trainer.memory_fraction={fraction}").trainer)
    assert asked == calls


def test_a_shortage_while_orders_are_carried_out_leaves_training_as_it_was() -> None:
    scene, plain = Uncounted(gpt_settings()), Uncounted(gpt_settings())
    memory = SimulatedMemory()
    memory.strike = lambda: within("average_parts.py") or within("compact_averages.py")
    call: Callable[..., Any] = partial(carry_out, scene.loop, A.BASIS_BF16, undo=False)
    with memory:
        assert not call().done
    assert same_bits(weights_of(scene.loop), weights_of(plain.loop))
