"""A small GPT in training with an allocator that has a budget, and orders that arrive after given steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch

from common.clock import FakeClock
from common.messages import MemoryAction, MemoryOrder, Observation
from common.settings import RunSettings
from tests.trainer.simulated_memory import SimulatedMemory
from tests.trainer.tiny import ScriptedLinks, tiny_settings
from trainer_node.assembly import build_loop
from trainer_node.data import HeldOutText, TextBatches
from trainer_node.fingerprint import fingerprint
from trainer_node.housekeeping import Housekeeping
from trainer_node.loop import Loop
from trainer_node.memory_report import MemoryReports
from trainer_node.model.gpt import GPT
from trainer_node.tasks import Task

CPU = torch.device("cpu")
SMALL_GPT = (
    "trainer.model.layers=2",
    "trainer.model.width=16",
    "trainer.model.heads=2",
    "trainer.model.context_tokens=16",
    "trainer.model.vocabulary_size=257",
    "trainer.batch.sequences=8",
    "trainer.steps=40",
    "trainer.checkpoint.every_steps=0",
    "trainer.evaluate_every_steps=1000",
)


@cache  # once, when the first scene begins: by then everything has been imported
def freeze_what_is_there() -> None:
    """Every order collects garbage: torch and the tests themselves need not be looked at each time."""
    gc.collect()
    gc.freeze()


def gpt_settings(*overrides: str) -> RunSettings:
    return tiny_settings(*SMALL_GPT, *overrides)


def gpt_task(settings: RunSettings, device: torch.device = CPU) -> Task:
    """Fixed random tokens with a pattern in them; nothing is read from disk."""
    trainer = settings.trainer
    torch.manual_seed(trainer.seed)
    model = GPT(trainer.model).to(device)
    context, sequences = trainer.model.context_tokens, trainer.batch.sequences
    length = max(4000, 4 * sequences * context)
    tokens = (np.random.default_rng(3).integers(0, 9, length).cumsum() % 200).astype(np.uint16)
    return Task(
        name="language",
        description="",
        device=device,
        model=model,
        loss=lambda batch: model(batch.inputs, batch.targets),
        accuracy=None,
        train=TextBatches(
            tokens,
            sequences=sequences,
            context_tokens=context,
            seed=trainer.seed,
            guard_batches=trainer.verify.guard_batches,
            device=device,
        ),
        validation=HeldOutText(tokens, sequences=sequences, context_tokens=context, batches=2, device=device),
        unit="tokens",
        units_per_step=sequences * context,
        tokenizer_path=None,
    )


@dataclass
class Scene:
    """`at` are calls after that many steps, when the loop is calm; `budget` is looked at when it runs."""

    settings: RunSettings
    links: ScriptedLinks = field(default_factory=ScriptedLinks)
    budget_bytes: float = float("inf")
    folder: Path | None = None
    device: torch.device = CPU
    is_counted: bool = True  # False: no allocator, several times as fast
    at: dict[int, Callable[[Scene], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        freeze_what_is_there()
        self.memory = SimulatedMemory(self.budget_bytes)
        self.housekeeping = Housekeeping(self.links.emit, None)
        self.used_bytes: dict[int, int] = {}  # between two steps, after so many of them
        self.peak_bytes: dict[int, int] = {}  # of what came last, the step above all
        with self._allocator():
            fingerprint([torch.zeros(1)])  # its table of 2 MiB stays for the life of the process
            self.task = gpt_task(self.settings, self.device)
            self.loop = build_loop(
                self.task,
                self.settings,
                links=self.links,
                emit=self.links.emit,
                housekeeping=self._between,
                clock=FakeClock(),
                generation=1,
                snapshot_folder=self.folder,
                report=MemoryReports(self.links.emit, now_seconds=lambda: 0.0),
            )

    def _between(self, loop: Loop) -> None:
        step = loop.progress.step
        self.used_bytes[step], self.peak_bytes[step] = self.memory.used_bytes, self.memory.peak_bytes
        if step in self.at:
            self.at[step](self)
        self.housekeeping(loop)
        self.memory.peak_bytes = self.memory.used_bytes

    def run(self) -> Scene:
        with self._allocator():
            self.loop.run()
        return self

    def _allocator(self) -> AbstractContextManager[object]:
        return self.memory if self.is_counted else nullcontext()

    def order(self, action: MemoryAction, *, undo: bool = False) -> None:
        name = f"{action}{'.undo' if undo else ''}"
        self.links.orders.append(MemoryOrder(order_id=name, action=action, reason="test", undo=undo))

    @property
    def losses(self) -> list[float]:
        """Of the kept steps, as they were told."""
        kept = {o.step: o.features[0] for o in self.links.of(Observation)}
        return [kept[step] for step in sorted(kept)]


def ordered(*actions: MemoryAction, undo: bool = False) -> Callable[[Scene], None]:
    def give(scene: Scene) -> None:
        for action in actions:
            scene.order(action, undo=undo)

    return give
