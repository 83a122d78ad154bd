"""The referee of a run: reads the held-out loss, stops the watch while it does, notes where time went.

Its own time counts for nobody. Reads what an arm hands out through a context manager that lends those
weights; the time that the lending takes (a choice by guard batches) is the arm's, once: a run that ended
here would pay it once. Takes no steps and decides nothing, but for one thing: a loss that is not finite is
infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from common.clock import Clock
from common.settings import TrainerSettings
from trainer_node.race.batch_size import SAME, Scale
from trainer_node.race.run_result import CurvePoint
from trainer_node.step import autocast, mean_loss
from trainer_node.tasks import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What a run has cost so far, in micro-batches of its own."""

    passes: float  # forward-equivalents
    backward_passes: float
    predictor_seconds: float = 0.0


class Referee:
    def __init__(
        self,
        task: Task,
        settings: TrainerSettings,
        clock: Clock,
        *,
        every_steps: float,
        scale: Scale = SAME,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """`every_steps` is the grid of readings; the start and the end are always read.

        All steps told to a referee are those of the run's configured batch, whatever its batch is by then.
        `scale` is their worth in the task's: the curve is in those, so that all arms have one axis.

        `after_step` is called after each step (of ours: none on probation), e.g. to let another run go on.
        """
        self.curve: list[CurvePoint] = []
        self._task, self._clock, self._after_step = task, clock, after_step
        self._every_steps, self._steps, self._scale = every_steps, settings.steps, scale
        self.read_at = -1.0  # step of the newest reading
        self._context = partial(autocast, task.device, settings.precision)
        self._batches = list(task.validation)
        self._reading_seconds = 0.0
        self._started_seconds = clock.monotonic()

    def start(self) -> None:
        """The run begins now."""
        self._settle_device()
        self._reading_seconds, self._started_seconds = 0.0, self._clock.monotonic()

    def is_due(self, step: float) -> bool:
        """Whether a grid point has been reached since the last reading. The end is read by `read`."""
        self._after_step()
        return step < self._steps and step // self._every_steps > self.read_at // self._every_steps

    def read(
        self,
        step: float,
        spent: Spent,
        read_out: Callable[[], AbstractContextManager[object]] | None,
        *,
        real_steps: int | None = None,
    ) -> CurvePoint:
        """Add a point. `read_out` lends the weights that would be handed out; None = the raw ones.

        `real_steps` where they are not `step` of them: the batch has changed while the run went on.
        """
        self._settle_device()
        began = self._clock.monotonic()
        loss = read_loss = self._held_out_loss()
        lending_seconds = 0.0
        if read_out is not None:
            asked = self._clock.monotonic()
            with read_out():
                self._settle_device()
                lending_seconds = self._clock.monotonic() - asked
                read_loss = self._held_out_loss()
        running = began - self._started_seconds - self._reading_seconds
        point = CurvePoint(
            steps=round(step * self._scale.steps),
            passes=spent.passes * self._scale.passes,
            backward_passes=spent.backward_passes * self._scale.passes,
            trainer_seconds=running - spent.predictor_seconds + lending_seconds,
            predictor_seconds=spent.predictor_seconds,
            loss=loss,
            read_loss=read_loss,
            real_steps=real_steps if real_steps is not None or self._scale == SAME else round(step),
        )
        self.curve.append(point)
        self.read_at = step
        self._settle_device()
        self._reading_seconds += self._clock.monotonic() - began
        return point

    def _held_out_loss(self) -> float:
        loss = mean_loss(self._task.model, self._task.loss, self._batches, context=self._context)
        return loss if math.isfinite(loss) else math.inf

    def _settle_device(self) -> None:
        """A GPU works behind the program's back: wait, so that the watch shows work that is done."""
        if self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)
