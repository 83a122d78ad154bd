"""A tiny real training job, and links that answer in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.clock import SystemClock
from common.config import load_settings
from common.messages import Message, Observation, Order, PhaseDecision
from common.settings import RunSettings
from trainer_node.assembly import build_loop, prepare_task
from trainer_node.loop import Loop

TINY = (
    "trainer.steps=60",
    "trainer.statistics_steps=8",
    "trainer.window_steps=6",
    "trainer.probation_steps=6",
    "trainer.batch.sequences=16",
    "trainer.model.channels=4",
    "trainer.schedule.warmup_steps=4",
    "trainer.evaluate_every_steps=20",
    "trainer.checkpoint.every_steps=10",
    "trainer.basis.sample_size=64",
    "trainer.decision_mode=lockstep",
)


def tiny_settings(*overrides: str) -> RunSettings:
    return load_settings(preset="digits", overrides=[*TINY, *overrides])


@dataclass
class ScriptedLinks:
    """Answers every decision point by `answer(observation)`; collects what the loop says."""

    answer: Callable[[Observation], PhaseDecision | None] = lambda _: None
    reason: str | None = None  # of a veto
    orders: list[Order] = field(default_factory=list)
    said: list[Message] = field(default_factory=list)

    def emit(self, message: Message) -> None:
        self.said.append(message)

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        newest = next(m for m in reversed(self.said) if isinstance(m, Observation))
        assert (newest.step, newest.attempt) == (step, attempt)
        return self.answer(newest)

    def veto(self) -> str | None:
        return self.reason

    def take_orders(self) -> list[Order]:
        taken, self.orders = self.orders, []
        return taken

    def of(self, kind: type) -> list:
        return [m for m in self.said if isinstance(m, kind)]


def tiny_loop(
    links: ScriptedLinks,
    settings: RunSettings,
    *,
    housekeeping: Callable[[Loop], None] = lambda _: None,
    generation: int = 1,
    folder: Path | None = None,
) -> Loop:
    task = prepare_task(settings.trainer)
    return build_loop(
        task,
        settings,
        links=links,
        emit=links.emit,
        housekeeping=housekeeping,
        clock=SystemClock(),
        generation=generation,
        snapshot_folder=folder,
    )


def weights_of(loop: Loop) -> list[torch.Tensor]:
    return [p.detach().clone() for p in loop.task.model.parameters()]


def same_bits(left: Iterable[torch.Tensor], right: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
