"""The arms of bare_loop.py: one model, its batches and its optimizer in a plain loop and in ours.

Each arm builds everything anew from the settings, takes all steps, keeps an account of its seconds and passes
the baton on after every step. Text is made up: what a step costs does not depend on it. Compares nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.clock import SystemClock
from common.schedule import rate_factor
from common.settings import RunSettings, TrainerSettings
from trainer_node.assembly import build_loop, choose_device
from trainer_node.data import HeldOutText, TextBatches
from trainer_node.hybrid import Hybrid
from trainer_node.links import NoDecisions
from trainer_node.optim.build import build_optimizers
from trainer_node.race.together import TURN_STEPS
from trainer_node.step import autocast
from trainer_node.tasks import Task, _compiled, build_model

TURNS_PER_ROUND, WARM_TURNS = 4, 2
AfterStep = Callable[[], None]


@dataclass
class Account:
    """Seconds of one arm's steps, per round; the first turns are not counted."""

    device: torch.device
    wall: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)
    steps: int = 0
    _started: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        wait_for(self.device)
        self._started = time.perf_counter(), time.thread_time()

    def after_step(self, pass_on: AfterStep) -> None:
        self.steps += 1
        if self.steps % TURN_STEPS:
            pass_on()  # which counts steps too
            return
        wait_for(self.device)
        wall, thread = time.perf_counter() - self._started[0], time.thread_time() - self._started[1]
        turn = self.steps // TURN_STEPS - 1 - WARM_TURNS
        if turn >= 0:
            if turn % TURNS_PER_ROUND == 0:
                self.wall.append(0.0)
                self.thread.append(0.0)
            self.wall[-1] += wall
            self.thread[-1] += thread
        pass_on()
        self.begin()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def made_up_task(trainer: TrainerSettings) -> Task:
    """The language task of these settings on random tokens: no file, no tokenizer."""
    torch.manual_seed(trainer.seed)
    device = choose_device(trainer)
    model = _compiled(build_model(trainer, device), trainer, device)
    context, sequences, vocabulary = (
        trainer.model.context_tokens, trainer.batch.sequences, trainer.model.vocabulary_size
    )  # fmt: skip
    length = max(2_000_000, 8 * sequences * context)
    tokens = np.random.default_rng(0).integers(0, vocabulary, length).astype(np.uint16)
    shapes: dict[str, Any] = {"sequences": sequences, "context_tokens": context, "device": device}
    guard = trainer.verify.guard_batches
    return Task(
        name="language",
        description="random tokens",
        device=device,
        model=model,
        loss=lambda batch: model(batch.inputs, batch.targets),
        accuracy=None,
        train=TextBatches(tokens, seed=trainer.seed, guard_batches=guard, **shapes),
        validation=HeldOutText(tokens, batches=1, **shapes),
        unit="tokens",
        units_per_step=sequences * context * trainer.batch.accumulation,
        tokenizer_path=None,
    )


# ---- arms ------------------------------------------------------------------------------------


def bare(settings: RunSettings, account: Account, pass_on: AfterStep) -> float:
    """A plain loop, as people write it. Returns the last loss."""
    trainer = settings.trainer
    task = made_up_task(trainer)
    model, micro_batches = task.model, trainer.batch.accumulation
    optimizers = build_optimizers(model, trainer.optimizer, task.device)
    model.train()
    account.begin()
    for step in range(trainer.steps):
        factor = rate_factor(step, trainer.steps, trainer.schedule)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_rate"] * factor
        for micro_batch in range(micro_batches):
            batch = task.train.batch(step * micro_batches + micro_batch)
            with autocast(task.device, trainer.precision):
                loss = model(batch.inputs, batch.targets) / micro_batches
            loss.backward()
        if trainer.optimizer.clip_norm > 0.0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.optimizer.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        account.after_step(pass_on)
    return loss.item() * micro_batches


def ours(settings: RunSettings, account: Account, pass_on: AfterStep, *, predicts: bool) -> float:
    settings = replace(settings, predictor=replace(settings.predictor, enabled=predicts))
    loop = build_loop(
        made_up_task(settings.trainer),
        settings,
        links=NoDecisions(),
        emit=lambda _: None,
        housekeeping=lambda _: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    step_of_loop = loop._real_step

    def counted_step() -> None:  # housekeeping is not called at decision points
        step_of_loop()
        account.after_step(pass_on)

    loop._real_step = counted_step  # type: ignore[method-assign]
    account.begin()
    loop.run()
    return loop.progress.recent_losses[-1]


def hybrid(
    settings: RunSettings, account: Account, pass_on: AfterStep, *, redis: str | None, folder: Path
) -> float:
    """The plain loop with `Hybrid.step`, or `probe` where a step is several micro-batches."""
    trainer = settings.trainer
    task = made_up_task(trainer)
    model, micro_batches = task.model, trainer.batch.accumulation
    optimizers = build_optimizers(model, trainer.optimizer, task.device)
    clip_norm = trainer.optimizer.clip_norm
    model.train()

    def loss_of(batch: Any) -> torch.Tensor:
        with autocast(task.device, trainer.precision):
            return model(batch.inputs, batch.targets) / micro_batches

    with Hybrid(
        model,
        optimizers,
        redis=redis,
        steps=trainer.steps,
        units_per_step=task.units_per_step,
        runs_dir=folder,
        settings=("predictor.rest_windows=1000000",),
    ) as watched:
        account.begin()
        for step in range(trainer.steps):
            factor = rate_factor(step, trainer.steps, trainer.schedule)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_rate"] * factor
            if micro_batches == 1:
                loss = watched.step(loss_of, task.train.batch(step), clip_norm=clip_norm)
            else:
                batches = (task.train.batch(step * micro_batches + m) for m in range(micro_batches))
                with watched.probe():
                    for batch in batches:
                        loss = loss_of(batch)
                        loss.backward()
                    if clip_norm > 0.0:
                        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    watched.after_step(loss.detach() * micro_batches)
            account.after_step(pass_on)
    return loss.item() * micro_batches


def arms(settings: RunSettings, folder: Path) -> dict[str, Callable[[Account, AfterStep], float]]:
    return {
        "bare loop": partial(bare, settings),
        "trainer, prediction off": partial(ours, settings, predicts=False),
        "trainer, prediction rests": partial(ours, settings, predicts=True),
        "Hybrid, redis=None": partial(hybrid, settings, redis=None, folder=folder),
        "Hybrid, memory://": partial(hybrid, settings, redis="memory://", folder=folder / "memory"),
        "Hybrid, embedded://": partial(hybrid, settings, redis="embedded://", folder=folder / "embedded"),
    }
