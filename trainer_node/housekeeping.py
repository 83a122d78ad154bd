"""What is done between real steps when no jump is on probation: evaluate, save, obey the monitor.

Runs on held-out data and on disk, never on weights. Its own state (when is what due, which
checkpoint is best) travels in the checkpoint.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from common.messages import (
    Alert,
    CheckpointRequest,
    Evaluation,
    MemoryAction,
    MemoryOrder,
    Message,
    OrderDone,
)
from common.streams import TRAINER
from trainer_node import ledger as purposes
from trainer_node.checkpoint import Checkpoints
from trainer_node.loop import Loop
from trainer_node.read_out import copy_of_parameters, put_parameters, weights_that_count
from trainer_node.step import autocast, mean_loss

LOST_STEPS = 8  # successive non-finite losses; a single one may pass


class Housekeeping:
    def __init__(self, emit: Callable[[Message], None], checkpoints: Checkpoints | None) -> None:
        self._emit, self._checkpoints = emit, checkpoints
        self._told_lost = False
        self._next_evaluation_step = 0
        self._next_checkpoint_step = 0
        self.first_loss = math.nan
        self.last_loss = math.nan
        self.best_loss = math.inf

    def begin(self, loop: Loop) -> None:
        """Before the first step of a fresh run: the first held-out loss."""
        settings = loop.settings
        self._next_evaluation_step = settings.evaluate_every_steps
        self._next_checkpoint_step = settings.checkpoint.every_steps or settings.steps
        self.evaluate(loop)

    def __call__(self, loop: Loop) -> None:
        settings, step = loop.settings, loop.progress.step
        if step >= self._next_evaluation_step and step < settings.steps:
            self._next_evaluation_step = step + settings.evaluate_every_steps
            self.evaluate(loop)
        if step >= self._next_checkpoint_step and step < settings.steps:
            self._next_checkpoint_step = step + (settings.checkpoint.every_steps or settings.steps)
            self.save(loop)
        self._watch_for_divergence(loop)
        for order in loop.links.take_orders():
            self._obey(loop, order)

    def end(self, loop: Loop, *, emergency: bool) -> None:
        """The last held-out loss (unless in a hurry) and the last checkpoint; the model keeps what counts."""
        averaged = None
        if not emergency:
            with weights_that_count(loop) as is_average:
                self._evaluate_in_place(loop)
                averaged = copy_of_parameters(loop.task.model) if is_average else None
        self.save(loop, emergency=emergency, read_out=averaged)
        if averaged is not None:
            put_parameters(loop.task.model, averaged)
        if self._checkpoints is not None:
            self._checkpoints.close()

    def evaluate(self, loop: Loop) -> None:
        """The held-out loss of the weights that count."""
        with weights_that_count(loop):
            self._evaluate_in_place(loop)

    def _evaluate_in_place(self, loop: Loop) -> None:
        task = loop.task
        with loop.ledger.span(purposes.EVALUATION):
            batches = list(task.validation)
            context = partial(autocast, task.device, loop.settings.precision)
            loss = mean_loss(task.model, task.loss, batches, context=context)
            accuracy = None
            if task.accuracy is not None:
                accuracy = mean_loss(task.model, task.accuracy, batches, context=context)
        self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
        self.last_loss = loss
        self._emit(
            Evaluation(
                step=loop.progress.step,
                virtual_steps=loop.ledger.virtual_steps,
                loss=loss,
                accuracy=accuracy,
                train_seconds=loop.ledger.total_seconds,
            )
        )

    def save(
        self, loop: Loop, *, emergency: bool = False, read_out: Mapping[str, Tensor] | None = None
    ) -> None:
        if self._checkpoints is None:
            return
        with loop.ledger.span(purposes.CHECKPOINTS):
            loop.settle_observations()
            is_best = self.last_loss < self.best_loss
            self.best_loss = min(self.best_loss, self.last_loss)
            written = self._checkpoints.save(loop, self.to_json(), emergency=emergency, read_out=read_out)
            if written is not None:
                self._checkpoints.best_name = written.name if is_best else self._checkpoints.best_name
                self._emit(written)

    def _watch_for_divergence(self, loop: Loop) -> None:
        """Say once that the run is lost. The best checkpoint is kept, whatever comes after it."""
        newest = list(loop.progress.recent_losses)[-LOST_STEPS:]
        if self._told_lost or len(newest) < LOST_STEPS or any(map(math.isfinite, newest)):
            return
        self._told_lost = True
        best = self._checkpoints.best_name if self._checkpoints else ""
        kept = f"; {best} is the best checkpoint" if best else ""
        text = f"the loss has not been finite for {LOST_STEPS} steps: stop, lower the learning rate{kept}"
        self._emit(Alert(node=TRAINER, severity="error", kind="diverged", text=text, step=loop.progress.step))

    def _obey(self, loop: Loop, order: CheckpointRequest | MemoryOrder) -> None:
        before, done = held_bytes(loop.task.device), True
        if isinstance(order, CheckpointRequest):
            self.save(loop, emergency=order.emergency)
            detail = f"checkpoint at step {loop.progress.step}: {order.reason}"
            order_id = order.request_id
        elif order.action is not MemoryAction.CLEANUP:
            done, detail, order_id = False, f"{order.action} is not known here", order.order_id
        else:
            gc.collect()
            if loop.task.device.type == "cuda":
                torch.cuda.empty_cache()
            detail, order_id = f"{order.action}: {order.reason}", order.order_id
        self._emit(
            OrderDone(
                order_id=order_id,
                done=done,
                bytes_before=before,
                bytes_after=held_bytes(loop.task.device),
                detail=detail,
            )
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "next_evaluation_step": self._next_evaluation_step,
            "next_checkpoint_step": self._next_checkpoint_step,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "best_loss": self.best_loss,
            "best_name": self._checkpoints.best_name if self._checkpoints else "",
        }

    def load(self, values: dict[str, Any]) -> None:
        self._next_evaluation_step = int(values["next_evaluation_step"])
        self._next_checkpoint_step = int(values["next_checkpoint_step"])
        self.first_loss, self.last_loss = float(values["first_loss"]), float(values["last_loss"])
        self.best_loss = float(values["best_loss"])
        if self._checkpoints is not None:
            self._checkpoints.best_name = str(values["best_name"])


def held_bytes(device: torch.device) -> int:
    """Memory this process holds: reserved on the GPU, resident set on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)
