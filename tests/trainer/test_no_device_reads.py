"""An ordinary step never waits for a device: on a stand-in; tests/gpu/test_no_sync.py asks a real GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.clock import SystemClock
from tests import device_reads
from tests.device_reads import DEVICE, OnDevice, Reads, device_in_use, put_on_device
from tests.trainer.memory_scene import gpt_settings, gpt_task
from tests.trainer.own import RESTING, batches, in_process, job, loss_of
from tests.trainer.tiny import ScriptedLinks
from trainer_node.assembly import build_loop
from trainer_node.data import Batch
from trainer_node.loop import Loop

LONG_WINDOW = ("trainer.statistics_steps=4", "trainer.window_steps=40", "trainer.steps=200")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    monkeypatch.setattr(torch.cuda, "Event", device_reads.CopyEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: device_reads._reads.note("synchronize"))
    with device_in_use() as found:
        yield found


READINGS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t.item(),
    "float": float,
    "int": int,
    "bool": lambda t: bool(t > 0),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.detach().numpy(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "to host": lambda t: t.to(device=torch.device("cpu")),
    "copy": lambda t: torch.empty(()).copy_(t),
    "nonzero": lambda t: t.nonzero(),
    "what is computed": lambda t: (2 * t + torch.ones((), device=DEVICE)).exp().item(),
    "what is made there": lambda _: torch.ones((), device=DEVICE).item(),
    "an event": lambda _: torch.cuda.Event().synchronize(),
    "everything": lambda _: torch.cuda.synchronize(),
}
NO_READINGS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda t: torch.stack([t, t]).sum() * 2.0,
    "a copy that nobody waits for": lambda t: torch.empty((), pin_memory=True).copy_(t, non_blocking=True),
    "to where it is": lambda t: t.to(t.device),
    "another type": lambda t: t.to(torch.float64),
    "its shape": lambda t: (t.shape, t.numel(), t.dtype, len(t.view(1))),
    "of the host": lambda _: torch.ones(()).item(),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_the_stand_in_notes_every_way_to_read_a_device(read: Callable, reads: Reads) -> None:
    tensor = torch.tensor(3.0).as_subclass(OnDevice)
    reads.is_watching = True
    read(tensor)
    assert len(reads.seen) >= 1
    assert __file__ in reads.seen[0]


@pytest.mark.parametrize("work", NO_READINGS.values(), ids=NO_READINGS)
def test_the_stand_in_notes_nothing_else(work: Callable, reads: Reads) -> None:
    tensor = torch.tensor(3.0).as_subclass(OnDevice)
    reads.is_watching = True
    work(tensor)
    assert reads.seen == []


def loop_on_device(*overrides: str, loss: Callable[[Tensor], Tensor] = lambda t: t) -> Loop:
    """A GPT in training with the averages of prediction, its batches and weights on the stand-in."""
    settings = gpt_settings(*LONG_WINDOW, *overrides)
    task = gpt_task(settings)
    put_on_device(task.model)
    model, whole = task.model, task.train.batch

    def there(position: int) -> Batch:
        batch = whole(position)
        return Batch(batch.inputs.as_subclass(OnDevice), batch.targets.as_subclass(OnDevice))

    task.train.batch = there  # type: ignore[method-assign]
    object.__setattr__(task, "loss", lambda batch: loss(model(batch.inputs, batch.targets)))
    links = ScriptedLinks()
    return build_loop(
        task,
        settings,
        links=links,
        emit=links.emit,
        housekeeping=lambda _: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )


def ordinary_steps(loop: Loop, reads: Reads, *, first: int = 6, last: int = 36) -> list[str]:
    """What is read in the steps of a window, its ends left out."""

    def watch(loop: Loop) -> None:
        reads.is_watching = first <= loop.progress.step < last
        loop.stop_requested = loop.progress.step >= last

    loop._housekeeping = watch
    loop.run()
    assert loop.progress.step == last
    return reads.seen


@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw", "fp32"), ("muon", "bf16"), ("sgd", "fp32")])
def test_an_ordinary_step_of_the_trainer_reads_nothing_of_the_device(
    optimizer: str, dtype: str, reads: Reads
) -> None:
    live = ("trainer.decision_mode=live", f"trainer.basis.dtype={dtype}")
    loop = loop_on_device(*live, f"trainer.optimizer.name={optimizer}")
    assert ordinary_steps(loop, reads) == []
    assert isinstance(loop.groups[0].parameters[0].grad, OnDevice)  # it was the stand-in that trained
    assert loop.progress.features.first_loss > 0.0  # and its losses have arrived


def test_measuring_the_first_of_several_micro_batches_reads_nothing_of_the_device(reads: Reads) -> None:
    live = ("trainer.decision_mode=live", "trainer.controls.batch=true", "trainer.batch.accumulation=2")
    loop = loop_on_device(*live)
    assert ordinary_steps(loop, reads) == []
    assert loop.progress.features.noise.steps > 0  # it was measured, and it has arrived


def test_a_loss_that_is_looked_at_is_found(reads: Reads) -> None:
    """The same run with one `.item()` in it: so the law above can fail."""
    loop = loop_on_device("trainer.decision_mode=live", loss=lambda t: t * (1.0 if t.item() > 0 else 0.0))
    found = ordinary_steps(loop, reads)
    assert len(found) == 30
    assert all("item" in line and __file__ in line for line in found)


def hybrid_steps(reads: Reads, folder: Path, *, own: bool, spoil: Callable[[Tensor], None]) -> list[str]:
    model, optimizer = job(fused=True)
    put_on_device(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    lines = (*RESTING, "trainer.statistics_steps=4", "trainer.window_steps=64", "trainer.decision_mode=live")
    with in_process(model, optimizer, folder, *lines) as hybrid:
        for number, plain in enumerate(batches(40)):
            batch = tuple(t.as_subclass(OnDevice) for t in plain)
            reads.is_watching = 8 <= number < 38
            if own:
                with hybrid.probe():
                    loss = loss_of(model, batch)  # type: ignore[arg-type]
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    hybrid.after_step(loss)
            else:
                loss = hybrid.step(lambda batch=batch: loss_of(model, batch), clip_norm=1.0)
            spoil(loss)
            reads.is_watching = False
    return reads.seen


@pytest.mark.parametrize("own", [False, True], ids=["step", "probe"])
def test_an_ordinary_step_of_a_loop_of_ones_own_reads_nothing_of_the_device(
    own: bool, reads: Reads, tmp_path: Path
) -> None:
    assert hybrid_steps(reads, tmp_path, own=own, spoil=lambda _: None) == []


def test_what_a_loop_of_ones_own_reads_itself_is_found(reads: Reads, tmp_path: Path) -> None:
    assert len(hybrid_steps(reads, tmp_path, own=False, spoil=lambda loss: float(loss) and None)) == 30
