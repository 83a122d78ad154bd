"""Measures the steps of other people's loops, from their optimizers' hooks. Takes none and changes none."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from common.settings import TrainerSettings
from trainer_node import ledger as purposes
from trainer_node.groups import ParameterGroup
from trainer_node.ledger import TRAIN_PASSES, Ledger, Span
from trainer_node.step import StepTensors, gradient_norms
from trainer_node.step_taken import StepTaken
from trainer_node.tasks import Task


class OwnSteps:
    """Measures the steps of a loop, and says what the observation of one needs."""

    passes = TRAIN_PASSES

    def __init__(
        self,
        task: Task,
        optimizers: Sequence[torch.optim.Optimizer],
        groups: Sequence[ParameterGroup],
        settings: TrainerSettings,
        ledger: Ledger,
    ) -> None:
        self._task, self._optimizers, self._groups = task, optimizers, groups
        self._settings, self._ledger = settings, ledger
        self._wall_seconds: deque[float] = deque(maxlen=16)
        self._open = ExitStack()
        self._span: Span | None = None
        self._norms_G: Tensor | None = None
        self._has_updated = False
        self._ended_seconds = time.monotonic()
        self._data_seconds = 0.0
        self._looks = True
        self._handles = [o.register_step_post_hook(lambda *_: self._note_update()) for o in optimizers]
        self._handles += [
            optimizers[0].register_step_pre_hook(self._before_update),
            optimizers[0].register_step_post_hook(lambda *_: self._look_at_gradients()),
        ]

    @property
    def typical_wall_seconds(self) -> float:
        return statistics.median(self._wall_seconds or [0.0])

    def close(self) -> None:
        """The optimizers are as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, *, looks: bool) -> None:
        """A step begins; what was done since the last one ended was waiting for data.

        With `looks` the gradients are looked at as the first optimizer moves, else `end` is told of them.
        """
        self.abandon()
        self._looks = looks
        self._data_seconds = time.monotonic() - self._ended_seconds
        self._has_updated, self._norms_G = False, None
        self._span = self._open.enter_context(self._ledger.span(purposes.STEPS, passes=self.passes))

    def abandon(self) -> None:
        """The step that was begun will not be ended: it raised, or it was one of accumulation."""
        self._open.close()

    def end(self, loss: Tensor, tensors: StepTensors | None = None) -> StepTaken | None:
        """None if no optimizer moved: a skipped update, or a micro-batch of several."""
        if self._span is None or not self._has_updated:
            return None
        self._open.close()
        span, self._span = self._span, None
        self._ended_seconds = time.monotonic()
        self._wall_seconds.append(span.wall_seconds)
        counted = self._settings.decision_mode == "lockstep"
        return StepTaken(
            tensors=tensors or self._seen(loss),
            rate_factor=self._rate() / max(self._settings.optimizer.rate, 1e-30),
            passes=self.passes,
            seconds=span.seconds,
            wall_seconds=span.wall_seconds,
            data_seconds=0.0 if counted else self._data_seconds,
        )

    def _seen(self, loss: Tensor) -> StepTensors:
        norms_G = self._norms_G if self._norms_G is not None else gradient_norms(self._groups)
        return StepTensors(
            loss=loss.detach()
            .float()
            .mean()
            .to(norms_G.device),  # the mean is a copy: the loop may change its own
            gradient_norms_G=norms_G,
            clip_scale=torch.ones((), device=norms_G.device),
        )

    def _before_update(self, optimizer: object, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """With a closure (Lightning) the backward pass is inside the step: its gradients come later."""
        if not any(callable(value) for value in (*given, *named.values())):
            self._look_at_gradients()

    def _look_at_gradients(self) -> None:
        if self._looks and self._span is not None and self._norms_G is None:
            self._norms_G = gradient_norms(self._groups)

    def _note_update(self) -> None:
        self._has_updated = True

    def _rate(self) -> float:
        rate = self._optimizers[0].param_groups[0]["lr"]
        if isinstance(rate, Tensor) and rate.is_cuda:
            return self._settings.optimizer.rate  # reading it would wait for the device: taken as constant
        return float(rate)
