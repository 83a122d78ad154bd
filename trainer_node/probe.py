"""Watches the optimizer and turns each step into an Observation, without stopping the device.

A context manager: on entry it hooks the optimizers (before the first, after the last), on exit
they are as before. The hooks keep the basis' averages up to date. Per step, one small tensor (loss,
clip scale, G gradient norms, that of the first piece where it was measured) is copied to the host; on a
GPU the copy is awaited one step later, so an ordinary step never synchronises. Reads weights and
gradients, never writes them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from common.messages import DecisionPoint, Observation
from trainer_node.averages import Averages
from trainer_node.featurize import FeatureState, StepFacts, featurize
from trainer_node.out_of_memory import OutOfMemory, attempt
from trainer_node.step import StepTensors


@dataclass(frozen=True, slots=True)
class Pending:
    """A step whose numbers are on their way to the host."""

    facts: Callable[[], StepFacts]
    attempt: int
    numbers: Tensor | list[float]  # as _packed has them; a tensor is on its way to the host
    arrived: torch.cuda.Event | None
    small_share: float = math.nan  # of the batch, that was measured apart; NaN: none was


class Probe:
    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], averages: Averages | None) -> None:
        self._optimizers = list(optimizers)
        self._averages = averages
        self.keeps_averages = True  # False while no decision is to come: then they cost nothing
        self._is_open = False
        self.shortage: OutOfMemory | None = None  # the averages are torn: nothing keeps them any more
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._pending: deque[Pending] = deque()

    def __enter__(self) -> Probe:
        self._is_open = True
        self._hook()
        return self

    def watch(self, averages: Averages | None) -> None:
        """Keep these up to date from the next step on, and no others."""
        self._averages, self.shortage = averages, None
        self._unhook()
        if self._is_open:
            self._hook()

    def _hook(self) -> None:
        averages = self._averages
        if averages is not None:
            first, last = self._optimizers[0], self._optimizers[-1]
            self._handles = [
                first.register_step_pre_hook(lambda *_: self._keep(averages.before_step)),
                last.register_step_post_hook(lambda *_: self._keep(averages.after_step)),
            ]

    def _keep(self, work: Callable[[], None]) -> None:
        """An error in here would tear the optimizers' step: the averages are given up instead."""
        if self.keeps_averages and self.shortage is None:
            shortage = attempt(work)
            self.shortage = shortage if isinstance(shortage, OutOfMemory) else None

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._unhook()

    def record(self, tensors: StepTensors, facts: Callable[[], StepFacts], attempt: int) -> None:
        """Start moving a step's numbers to the host. `facts` are asked for when it is told."""
        numbers: Tensor | list[float]
        arrived = None
        if tensors.loss.is_cuda:
            packed = _packed(tensors)
            numbers = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            numbers.copy_(packed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            # Small tensors that are kept lie between those of the next steps and make these slower (lab log).
            # Behind a step these calls take 15 us, to pack first 39 us.
            numbers = _read(tensors)
        self._pending.append(Pending(facts, attempt, numbers, arrived, tensors.small_share))

    def collect(
        self, state: FeatureState, *, wait: bool, decision_point: DecisionPoint | None = None
    ) -> list[Observation]:
        """Observations of the steps whose numbers have arrived, oldest first.

        With `wait` all of them; `decision_point` then goes with the newest one.
        """
        observations: list[Observation] = []
        while self._pending:
            pending = self._pending[0]
            if pending.arrived is not None:
                if not wait and not pending.arrived.query():
                    break
                pending.arrived.synchronize()
            self._pending.popleft()
            point = decision_point if wait and not self._pending else None
            observations.append(_observation(pending, state, point))
        return observations

    def forget(self) -> None:
        """Drop what is on its way: the steps were undone."""
        self._pending.clear()


def _packed(tensors: StepTensors) -> Tensor:
    """(2 + G,): loss, clip scale, gradient norms; (3 + G,) where a part of the batch was measured."""
    numbers = [tensors.loss.view(1), tensors.clip_scale.view(1), tensors.gradient_norms_G]
    if tensors.small_norm is not None:
        numbers.append(tensors.small_norm.view(1))
    return torch.cat(numbers)


def _read(tensors: StepTensors) -> list[float]:
    """The same numbers in the same order. Waits for the device, if there is one."""
    numbers = [tensors.loss.item(), tensors.clip_scale.item(), *tensors.gradient_norms_G.tolist()]
    return numbers if tensors.small_norm is None else [*numbers, tensors.small_norm.item()]


def _observation(pending: Pending, state: FeatureState, point: DecisionPoint | None) -> Observation:
    numbers = pending.numbers
    loss, clip_scale, *norms = numbers if isinstance(numbers, list) else numbers.tolist()
    small_share = pending.small_share
    small_norm = norms.pop() if small_share == small_share else math.nan
    total_norm = sum(norm * norm for norm in norms) ** 0.5
    facts = pending.facts()
    features = featurize(
        state,
        facts,
        loss=loss,
        gradient_norm=total_norm,
        clip_scale=clip_scale,
        small_norm=small_norm,
        small_share=small_share,
    )
    return Observation(
        step=facts.step,
        attempt=pending.attempt,
        phase=facts.phase,
        features=features,
        gradient_norms=tuple(norms),
        decision_point=point,
    )
