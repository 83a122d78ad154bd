"""Laws of the plain Hybrid in a loop that Accelerate prepared: no adapter is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="pip install 'hybrid-predict-trainer[accelerate]'")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from tests.integrations import tiny_models as tiny
from tests.trainer import own
from trainer_node.hybrid import Hybrid

BATCHES, KEPT_AFTER = 96, 34


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """Accelerate keeps one state a process, which other frameworks' tests may have set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)


def train(
    folder: Path,
    settings: tuple[str, ...] | None,
    *,
    skip: int = 0,
    stop: int = BATCHES,
    resume: bool = False,
) -> list[Tensor]:
    """Two micro-batches a step. Saves after KEPT_AFTER micro-batches. None: a loop without Hybrid."""
    accelerate = accelerator()
    data = DataLoader(list(own.batches(BATCHES)), batch_size=None, generator=torch.Generator())
    model, optimizer, loader = accelerate.prepare(*own.job(), data)
    schedule = accelerate.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5))
    redis = {"redis": None} if settings is None else tiny.options(folder, settings, run_id="mine")
    checkpoint = folder / "checkpoint"
    with Hybrid(model, optimizer, **{"steps": BATCHES // 2, **redis}) as hybrid:  # type: ignore[arg-type]
        if resume:
            accelerate.load_state(checkpoint)
            hybrid.load_state_dict(torch.load(checkpoint / "hybrid.pt", weights_only=True))
        for count, batch in numbered(loader, skip=skip, stop=stop):
            with (
                hybrid.probe(hold=lambda batch=batch: own.loss_of(model, batch)),
                accelerate.accumulate(model),
            ):
                loss = own.loss_of(model, batch)
                accelerate.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                hybrid.after_step(loss)
            if count == KEPT_AFTER:
                hybrid.rest()
                accelerate.save_state(checkpoint)
                torch.save(hybrid.state_dict(), checkpoint / "hybrid.pt")
    assert tiny.hooks_of_optimizer(optimizer.optimizer) == 0
    return own.state_of(model, optimizer)


def numbered(loader: DataLoader, *, skip: int, stop: int) -> Iterator[tuple[int, own.Batch]]:
    for count, batch in enumerate(loader, start=1):
        if skip < count <= stop:
            yield count, batch


def test_a_hybrid_that_tries_no_jump_is_the_prepared_loop_bit_for_bit(tmp_path: Path) -> None:
    plain = train(tmp_path, None)
    watched = train(tmp_path, tiny.QUICK)
    assert own.same(watched, plain)
    assert tiny.said(tmp_path, "RunEnded")[0]["step"] == BATCHES // 2


def test_jumps_are_accepted_and_weights_differ(tmp_path: Path) -> None:
    plain = train(tmp_path, None)
    jumped = train(tmp_path, tiny.FIXED)
    assert "accepted" in tiny.verdicts(tmp_path)
    assert not own.same(jumped, plain)


def test_a_resumed_loop_is_the_unbroken_one_but_for_what_is_held(tmp_path: Path) -> None:
    """Prediction goes on where it was; a closure cannot be saved, so another batch judges later jumps."""
    whole = train(tmp_path / "a", tiny.QUICK)
    train(tmp_path / "b", tiny.QUICK, stop=KEPT_AFTER)
    resumed = train(tmp_path / "b", tiny.QUICK, skip=KEPT_AFTER, resume=True)
    assert own.same(resumed, whole)
    assert tiny.said(tmp_path / "b", "RunEnded")[-1]["step"] == BATCHES // 2
