"""A small job in a loop of one's own: data, model, and the plain loop that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common.messages import Message, Phase, PhaseDecision
from trainer_node.hybrid import Hybrid

Batch = tuple[Tensor, Tensor]
# The fixed policy keeps directions in a run of any length, and here it rests: all works, nothing jumps.
RESTING = ("predictor.policy=fixed", "predictor.rest_windows=1000")
QUICK = ("trainer.statistics_steps=16", "trainer.window_steps=8", "trainer.probation_steps=8")
FIXED = (*QUICK, "predictor.policy=fixed", "predictor.rest_windows=0", "predictor.horizon_steps=[8]")


def job(
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **options: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Batch norm, so that statistics of layers are there; dropout, so that the random state counts."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1)
    model = nn.Sequential(*layers)
    return model, optimizer(model.parameters(), **{"lr": 1e-2, **options})


def batches(count: int, *, skip: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(8, 1, generator=generator)
    for position in range(count):
        inputs = torch.randn(32, 8, generator=generator)
        if position >= skip:
            yield inputs, torch.sin(inputs @ teacher)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def train_plain(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Batch]) -> list[float]:
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def in_process(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *lines: str, **options: object
) -> Hybrid:
    return Hybrid(
        model,
        optimizer,
        **{"redis": "memory://", "runs_dir": folder, "steps": 500, "settings": lines, **options},  # type: ignore[arg-type]
    )


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that training moves, copied."""
    moments = [t for entries in optimizer.state_dict()["state"].values() for t in entries.values()]
    return [t.detach().clone() for t in (*model.state_dict().values(), *moments) if isinstance(t, Tensor)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Tampering:
    """The run's decisions, with the coefficients of every proposal changed on the way."""

    def __init__(self, hybrid: Hybrid, factor: float) -> None:
        assert hybrid.loop is not None
        self._links, self._factor = hybrid.loop.links, factor
        hybrid.loop.links = self

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        import dataclasses

        decision = self._links.wait_decision(step=step, attempt=attempt, seconds=seconds)
        if decision is None or decision.phase is not Phase.PREDICT:
            return decision
        scaled = tuple(self._factor * value for value in decision.coefficients)
        return dataclasses.replace(decision, coefficients=scaled)

    def veto(self) -> str | None:
        return self._links.veto()

    def take_orders(self) -> list:
        return self._links.take_orders()


def heard(hybrid: Hybrid) -> list[Message]:
    """All messages that the loop sends from now on."""
    assert hybrid.loop is not None
    messages: list[Message] = []
    emit = hybrid.loop.emit

    def tell(message: Message) -> None:
        messages.append(message)
        emit(message)

    hybrid.loop.emit = tell
    return messages
