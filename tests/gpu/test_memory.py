"""The ladder on a real card: a real allocator runs out, real bytes move to the host, nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common import sealed_folder
from common.messages import Holder, MemoryAction, MemoryReport, OrderDone
from tests.trainer.memory_scene import Scene, gpt_settings, ordered
from trainer_node.checkpoint import Checkpoints
from trainer_node.housekeeping import Housekeeping
from trainer_node.out_of_memory import PICTURE_NAME

pytestmark = pytest.mark.gpu
A = MemoryAction
# Logits of 16 x 256 tokens over 8192 words are 134 MB: activations are nearly all of the memory.
BIG = (
    "trainer.model.layers=4",
    "trainer.model.width=256",
    "trainer.model.heads=4",
    "trainer.model.context_tokens=256",
    "trainer.model.vocabulary_size=8192",
    "trainer.steps=30",
)
OnGpu = partial(Scene, is_counted=False, device=torch.device("cuda"))


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.memory._record_memory_history(enabled=None)


def big(sequences: int, *overrides: str) -> list[str]:
    return [*BIG, f"trainer.batch.sequences={sequences}", *overrides]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_real_shortage_loses_no_step_and_leaves_a_picture(optimizer: str, tmp_path: Path) -> None:
    name = f"trainer.optimizer.name={optimizer}"
    torch.cuda.empty_cache()
    OnGpu(gpt_settings(*big(4, name, "trainer.steps=16"))).run()
    reserved_bytes = torch.cuda.max_memory_reserved()
    twin = OnGpu(gpt_settings(*big(16, name))).run()
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.2 * reserved_bytes / total_bytes)
    short = OnGpu(gpt_settings(*big(16, name)), folder=tmp_path).run()
    assert short.loop.memory.out_of_memory >= 1
    assert short.loop.progress.step == 30
    assert short.loop.ledger.lost_steps == 0
    np.testing.assert_allclose(short.losses, twin.losses, rtol=2e-3)
    assert (tmp_path / PICTURE_NAME).stat().st_size > 0


def on_device(report: MemoryReport, place: str) -> int:
    found: list[Holder] = [h for h in report.holders if h.name == "averages" and h.place == place]
    return sum(h.num_bytes for h in found)


def test_directions_move_to_the_host_and_back_and_training_does_not_notice() -> None:
    at = {16: ordered(A.BASIS_BF16), 18: ordered(A.BASIS_HOST)}
    at |= {22: ordered(A.BASIS_HOST, undo=True), 24: ordered(A.BASIS_BF16, undo=True)}
    scene = OnGpu(gpt_settings(*big(4)), at=at).run()
    assert all(done.done for done in scene.links.of(OrderDone)), scene.links.of(OrderDone)
    weights_bytes = sum(p.numel() * 4 for p in scene.task.model.parameters())
    reports = [r for r in scene.links.of(MemoryReport) if r.occasion == "order"]
    device = [on_device(r, "device") / weights_bytes for r in reports]
    assert device == pytest.approx([1.5, 0.0, 1.5, 2.0])
    allocated = [r.allocated_bytes or 0 for r in reports]
    assert allocated[0] - allocated[1] == pytest.approx(1.5 * weights_bytes, rel=0.1)
    np.testing.assert_allclose(scene.losses, OnGpu(gpt_settings(*big(4))).run().losses, rtol=2e-3)


def test_an_emergency_checkpoint_takes_no_memory_of_the_card(tmp_path: Path) -> None:
    scene = OnGpu(gpt_settings(*big(4, "trainer.steps=16"))).run()
    checkpoints = Checkpoints(tmp_path, keep=1, on_failure=pytest.fail)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    Housekeeping(scene.links.emit, checkpoints).save(scene.loop, emergency=True)
    checkpoints.close()
    assert torch.cuda.max_memory_allocated() == before_bytes
    assert len(sealed_folder.folders(tmp_path)) == 1
