"""On a real card: an ordinary step never waits for it, and one pass moves what many operations move.

torch itself raises at whatever would wait (`set_sync_debug_mode("error")`; waiting for an event is not among
what it knows). The same law on a CPU stand-in: tests/trainer/test_no_device_reads.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.trainer.memory_scene import Scene, gpt_settings
from tests.trainer.own import batches, in_process, job, loss_of
from tests.trainer.test_fused_apply import COEFFICIENTS, scene
from trainer_node import compiled_pass
from trainer_node.fused_apply import Difference, Direction, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]
LONG_WINDOW = ("trainer.statistics_steps=4", "trainer.window_steps=40", "trainer.steps=60")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield
    torch.cuda.set_sync_debug_mode("default")


def watch(is_on: bool) -> None:
    torch.cuda.set_sync_debug_mode("error" if is_on else "default")


def test_torch_notices_a_wait() -> None:
    watch(True)
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device=CUDA).item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_ordinary_step_of_the_trainer_waits_for_nothing(
    optimizer: str, precision: str, dtype: str
) -> None:
    settings = gpt_settings(
        *LONG_WINDOW,
        "trainer.decision_mode=live",
        f"trainer.optimizer.name={optimizer}",
        f"trainer.precision={precision}",
        f"trainer.basis.dtype={dtype}",
    )
    running = Scene(settings, is_counted=False, device=CUDA)

    def between(loop: object) -> None:
        watch(8 <= running.loop.progress.step < 38)  # a window is from 4 to 44

    running.loop._housekeeping = between
    try:
        running.loop.run()
    finally:
        watch(False)
    assert running.loop.progress.step == 60


def test_measuring_the_first_of_several_micro_batches_waits_for_nothing() -> None:
    more = ("trainer.decision_mode=live", "trainer.controls.batch=true", "trainer.batch.accumulation=2")
    running = Scene(gpt_settings(*LONG_WINDOW, *more), is_counted=False, device=CUDA)
    running.loop._housekeeping = lambda _: watch(8 <= running.loop.progress.step < 38)
    try:
        running.loop.run()
    finally:
        watch(False)
    assert running.loop.progress.features.noise.steps > 0


@pytest.mark.parametrize("own", [False, True], ids=["step", "probe"])
def test_an_ordinary_step_of_a_loop_of_ones_own_waits_for_nothing(own: bool, tmp_path: Path) -> None:
    model, _ = job()
    model.to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    lines = ("trainer.statistics_steps=4", "trainer.window_steps=64", "trainer.decision_mode=live")
    data = [(inputs.to(CUDA), targets.to(CUDA)) for inputs, targets in batches(40)]
    with in_process(model, optimizer, tmp_path, *lines) as hybrid:
        for number, batch in enumerate(data):
            watch(8 <= number < 38)
            if own:
                with hybrid.probe():
                    loss = loss_of(model, batch)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    hybrid.after_step(loss)
            else:
                hybrid.step(partial(loss_of, model, batch), clip_norm=1.0)
            watch(False)


@pytest.mark.parametrize("length", [5_000, 1 << 20, (1 << 22) + 3])
def test_the_compiled_pass_moves_the_weights_of_the_reference_and_waits_for_nothing(length: int) -> None:
    ours, theirs = scene((length,)), scene((length,))
    for made in (ours, theirs):
        made.average = made.average.to(CUDA)
        made.weights = made.weights.to(CUDA)
        momentum, drift, slow, _ = made.directions
        assert isinstance(drift, Difference)
        directions: list[Direction] = [momentum.to(CUDA), Difference(made.average, drift.subtrahend.to(CUDA))]  # type: ignore[union-attr]
        made.directions = [*directions, slow.to(CUDA), Difference(made.average, made.weights)]  # type: ignore[union-attr]
    compiled_pass.prepare(ours.weights, ours.directions, along=[ours.average])  # its compiling may wait
    watch(True)
    square = compiled_pass.move_along(ours.weights, ours.directions, COEFFICIENTS, along=[ours.average])
    watch(False)
    expected = reference(theirs.weights, theirs.directions, COEFFICIENTS, along=[theirs.average])
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.average, theirs.average, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(square, expected, rtol=1e-5, atol=0.0)
