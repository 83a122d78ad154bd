"""Takes one real step after another, smaller ones where memory runs out. Knows no phases and no jumps.

Out of memory in a forward or backward pass: gradients are dropped, the random state is that from before the
step, and the same batch is done again in micro-batches of half the size, which then stay so. The optimizers
have not moved yet, so no step is lost, and without dropout the step is the one that would have been taken, up
to rounding (a model that drew nothing in its first step is taken for one that never does); dropout draws
other masks for other micro-batches, and a model that keeps statistics of its forward passes (BatchNorm) has
seen a part of the batch twice. Once the update has begun there is no way to do
it again: that raises TornUpdate, and only a snapshot or a checkpoint helps.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from common.control_rules import any_on
from common.settings import TrainerSettings
from trainer_node import ledger as purposes
from trainer_node.controls import MicroBatches, StepPlan, halved, pieces_of
from trainer_node.data import Batch, in_pieces
from trainer_node.groups import ParameterGroup
from trainer_node.ledger import TRAIN_PASSES, Ledger
from trainer_node.memory_state import MemoryState
from trainer_node.noise_scale import is_measured
from trainer_node.optim.build import set_rates
from trainer_node.optim.moments import follow_batch
from trainer_node.out_of_memory import (
    MemoryExhausted,
    OutOfMemory,
    Picture,
    TornUpdate,
    attempt,
    release,
)
from trainer_node.snapshot import random_state, set_random_state
from trainer_node.step import (
    FirstPiece,
    StepTensors,
    autocast,
    equally,
    make_gradients,
    mean_loss,
    mean_loss_of_pieces,
    update,
)
from trainer_node.step_taken import StepTaken
from trainer_node.tasks import Task

_T = TypeVar("_T")


class RealSteps:
    def __init__(
        self,
        task: Task,
        optimizers: Sequence[torch.optim.Optimizer],
        groups: Sequence[ParameterGroup],
        settings: TrainerSettings,
        *,
        ledger: Ledger,
        memory: MemoryState,
        picture: Picture,
        make_room: Callable[[], bool],
        tell: Callable[[OutOfMemory, str], None],
    ) -> None:
        """`make_room` is asked when the micro-batch cannot be halved: False = nothing is left to give up.

        `tell` hears of every time that something is done again, and how.
        """
        self._task, self._optimizers, self._groups = task, optimizers, groups
        self._settings, self._ledger, self._memory = settings, ledger, memory
        self._picture, self._make_room, self._tell = picture, make_room, tell
        self._data_seconds = 0.0  # of the step under way, for messages
        self._wall_seconds: deque[float] = deque(maxlen=16)
        self._context = partial(autocast, task.device, settings.precision)
        self._micro_batches = MicroBatches(lambda position: task.train.batch(position))
        self._first_piece = FirstPiece(groups) if any_on(settings.controls) else None
        # Whether passes draw random numbers (dropout); None before the first step has shown it. Where they do
        # not, the random state need not be copied: 12 to 40 us a step.
        self._draws: bool | None = None

    @property
    def typical_wall_seconds(self) -> float:
        """Of the last steps; 0 before there is one."""
        return statistics.median(self._wall_seconds or [0.0])

    def take(self, plan: StepPlan, after_backward: Callable[[], None] | None = None) -> StepTaken:
        """Raises MemoryExhausted with everything as it was before, TornUpdate with torn weights."""
        set_rates(self._optimizers, plan.rate_factor)
        if self._settings.controls.batch_betas:
            follow_batch(self._optimizers, plan.betas, steps=plan.moment_steps)
        each = TRAIN_PASSES + (1.0 if self._memory.is_recomputing else 0.0)
        passes = each * self._settings.batch.accumulation * plan.nominal_steps
        with self._ledger.span(purposes.STEPS, passes=passes) as span:
            self._data_seconds = 0.0
            loss = self._gradients(plan)
            tensors = attempt(partial(self._update, loss, after_backward), at_once=self._picture.take)
            if isinstance(tensors, OutOfMemory):
                raise TornUpdate(f"the update of step {plan.number}", tensors)
        self._wall_seconds.append(span.wall_seconds)
        return StepTaken(
            tensors=tensors,
            rate_factor=plan.rate_factor,
            passes=passes,
            seconds=span.seconds,
            wall_seconds=span.wall_seconds,
            data_seconds=self._data_seconds,
            nominal_steps=plan.nominal_steps,
        )

    def mean_loss(self, loss_of: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> float:
        """In evaluation mode, in the micro-batches of training; synchronises. Raises MemoryExhausted.

        Drops the gradients where memory runs out.
        """

        def measure() -> float:
            size = self._piece_size()
            if size is None:
                return mean_loss(self._task.model, loss_of, batches, context=self._context)
            pieces = in_pieces(batches, size)
            return mean_loss_of_pieces(self._task.model, loss_of, pieces, context=self._context)

        mine = self._again_smaller(measure, put_back=lambda: None, make_room=lambda: False)
        return self._task.split.mean_loss(mine)

    def _piece_size(self) -> int | None:
        size = self._memory.piece_size(self._settings.batch)
        return None if size is None else self._task.split.piece_size(size)

    def _gradients(self, plan: StepPlan) -> Tensor:
        device = self._task.device
        random = {} if self._draws is False else random_state(device)

        def work() -> Tensor:
            with self._ledger.span(purposes.DATA) as span:
                batches = self._micro_batches.of(plan)
            self._data_seconds += span.seconds
            size = self._piece_size()
            if size is None and plan.is_as_configured:
                pieces = equally(batches)
            else:
                size = size or plan.micro_batch_items
                pieces = pieces_of(batches, size=size, context_tokens=plan.context_tokens)
            if self._first_piece is not None and is_measured(plan.number):
                pieces = halved(pieces)
            return make_gradients(
                self._task.model,
                self._task.loss,
                pieces,
                self._optimizers,
                context=self._context,
                split=self._task.split,
                first=self._first_piece,
            )

        def put_back() -> None:
            if random:
                set_random_state(random, device)

        loss = self._again_smaller(work, put_back=put_back, make_room=self._make_room)
        if self._draws is None:
            after = random_state(device)
            self._draws = any(not torch.equal(state, after[kind]) for kind, state in random.items())
        return loss

    def _update(self, loss: Tensor, after_backward: Callable[[], None] | None) -> StepTensors:
        if after_backward is not None:
            after_backward()
        clip_norm = self._settings.optimizer.clip_norm
        return update(
            loss,
            self._optimizers,
            self._groups,
            clip_norm=clip_norm,
            split=self._task.split,
            first=self._first_piece,
        )

    def _again_smaller(
        self, work: Callable[[], _T], *, put_back: Callable[[], None], make_room: Callable[[], bool]
    ) -> _T:
        batch = self._settings.batch
        while True:
            result = attempt(work, at_once=self._picture.take)
            if not isinstance(result, OutOfMemory):
                return result
            release(p for group in self._groups for p in group.parameters)
            put_back()
            if self._memory.micro_batch(batch) > 1:
                self._memory.halvings += 1
            elif not make_room():
                raise MemoryExhausted(result)
            sizes = f"{self._memory.accumulation(batch)} x {self._memory.micro_batch(batch)}"
            self._tell(result, f"the same batch was done again as {sizes}, no step is lost")
