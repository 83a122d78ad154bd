"""Averaged weights and their drift, in full or in half the memory.

Owns, per parameter theta: the exponential average a (time constant n steps, constant or growing with
the run: TimeConstant), the drift of a since the window began, and the slow drift b <- mu b + drift,
taken once per window (AdEMAMix-like memory; with n = 0 it is the outer momentum of SNOO). Reads
weights, never writes them.

ExactAverages keeps a, a at the window's start, and b in the dtype of the weights: 3 x weights, of which
the middle one is parked in a store (host memory of a GPU, a file on CPU): no step needs it.
CompactAverages keeps a - theta, the drift and b in bfloat16: 1.5 x weights. An average itself
cannot live in bfloat16 (one step moves it by less than half a unit in the last place), but its
distance to the weights can; the price is one copy of the weights during optimizer.step, when
activations are gone, and more memory traffic.

An average need not see every step: with `every_steps` = 8 it takes in every eighth, with the weight of eight
(ExactAverages only; the other would have to hold its copy of the weights meanwhile).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer_node.snapshot import MemoryStore, TensorStore

MEMORY = "memory"  # name of the steps seen and the waiting weight among the tensors


class Averages(Protocol):
    def before_step(self) -> None: ...

    def after_step(self) -> None: ...

    def begin_window(self) -> None:
        """The drift starts again from zero."""

    def end_window(self) -> None:
        """Takes the window's drift into the slow drift."""

    def drift(self, index: int) -> Tensor: ...

    def slow_drift(self, index: int) -> Tensor: ...

    def pull_back(self, index: int) -> Tensor:
        """Average minus weights."""

    def shift(self, index: int, delta: Tensor) -> None:
        """The weights were moved by `delta`: the average moves along."""

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, for checkpoints."""

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`."""

    def bytes_held(self) -> int:
        """Device memory on a GPU, process memory on CPU."""

    def moving_tensors(self) -> list[Tensor]:
        """What a snapshot must hold. The drift need not be there: a window begins after a restore."""


def make_averages(
    parameters: Sequence[Tensor],
    *,
    average_steps: int,
    slow_momentum: float,
    dtype: str,
    average_share: float = 0.0,
    every_steps: int = 1,
    park: TensorStore | None = None,
) -> Averages:
    if dtype == "bf16":
        return CompactAverages(
            parameters,
            average_steps=average_steps,
            slow_momentum=slow_momentum,
            average_share=average_share,
        )
    return ExactAverages(
        parameters,
        average_steps=average_steps,
        slow_momentum=slow_momentum,
        average_share=average_share,
        every_steps=every_steps,
        park=park,
    )


class TimeConstant:
    """How long an average remembers: n = max(average_steps, average_share * t) after t steps.

    A new value has the weight 1/n. With a share the average is one over the tail of the run, whose length
    grows along: polynomial-decay averaging (Shamir & Zhang 2013, section 4, with eta = 1/share - 1;
    Karras et al. 2024, section 3.1). Share 1 is the mean of all iterates (Polyak & Juditsky 1992).
    """

    def __init__(self, average_steps: int, average_share: float) -> None:
        self._average_steps, self._average_share = average_steps, average_share
        # Steps seen; weight of those that are not taken in yet. An array, since a step must cost next to
        # nothing, seen as a tensor by those who keep and restore state.
        self._numbers = np.zeros(2)
        self.tensor = torch.from_numpy(self._numbers)

    def see_step(self) -> int:
        """Counts one more step: its number. What waits weighs as much as if each step had been taken in."""
        steps, waiting_weight = self._numbers.tolist()
        steps += 1.0
        weight = 1.0 / max(1.0, self._average_steps, self._average_share * steps)
        self._numbers[:] = steps, waiting_weight * (1.0 - weight) + weight
        return int(steps)

    def take_weight(self) -> float:
        """Of the value that is taken in now for all steps that wait; 0 if none does."""
        weight = float(self._numbers[1])
        self._numbers[1] = 0.0
        return weight


class ExactAverages:
    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        average_steps: int,
        slow_momentum: float,
        average_share: float = 0.0,
        every_steps: int = 1,
        park: TensorStore | None = None,
    ) -> None:
        """`park` keeps the average of the window's start, which no step needs; default: process memory."""
        self._parameters = [p.detach() for p in parameters]
        self._memory = TimeConstant(average_steps, average_share)
        self._slow_momentum, self._every_steps = slow_momentum, every_steps
        self._average = [p.clone() for p in self._parameters]
        self._park = park or MemoryStore()
        self._park.save(self._average)
        self._slow = [torch.zeros_like(p) for p in self._parameters]

    def before_step(self) -> None:
        pass

    @torch.no_grad()
    def after_step(self) -> None:
        if self._memory.see_step() % self._every_steps == 0:
            self._catch_up()

    def _catch_up(self) -> None:
        weight = self._memory.take_weight()
        if weight > 0.0:
            torch._foreach_lerp_(self._average, self._parameters, weight)

    @torch.no_grad()
    def begin_window(self) -> None:
        self._catch_up()
        self._park.save(self._average)

    @torch.no_grad()
    def end_window(self) -> None:
        self._catch_up()
        for index, slow in enumerate(self._slow):
            # The difference first: added to an average, a small drift would lose its last bits.
            slow.mul_(self._slow_momentum).add_(self.drift(index))

    def drift(self, index: int) -> Tensor:
        average = self._average[index]
        return average - self._park.read(index).to(average.device)

    def slow_drift(self, index: int) -> Tensor:
        return self._slow[index]

    def pull_back(self, index: int) -> Tensor:
        return self._average[index] - self._parameters[index]

    def shift(self, index: int, delta: Tensor) -> None:
        self._average[index].add_(delta)

    def tensors(self) -> dict[str, Tensor]:
        start = [self._park.read(index) for index in range(len(self._average))]
        named = _named(average=self._average, window_start=start, slow=self._slow)
        return {**named, MEMORY: self._memory.tensor}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in _named(average=self._average, slow=self._slow).items():
            tensor.copy_(saved[name])
        self._memory.tensor.copy_(saved[MEMORY])
        self._park.save([saved[f"window_start.{index}"] for index in range(len(self._average))])

    def bytes_held(self) -> int:
        parked_bytes = 0 if self._average[0].is_cuda else self._park.resident_bytes
        return _num_bytes(self._average) + _num_bytes(self._slow) + parked_bytes

    def moving_tensors(self) -> list[Tensor]:
        return [*self._average, self._memory.tensor]


class CompactAverages:
    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        average_steps: int,
        slow_momentum: float,
        average_share: float = 0.0,
    ) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._memory = TimeConstant(average_steps, average_share)
        self._slow_momentum = slow_momentum
        self._offset, self._drift, self._slow = (
            [torch.zeros_like(p, dtype=torch.bfloat16) for p in self._parameters] for _ in range(3)
        )
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before_step(self) -> None:
        self._before = [p.clone() for p in self._parameters]

    @torch.no_grad()
    def after_step(self) -> None:
        # average' - average = (theta' - average) / n, with theta' - average = update - offset.
        # offset' = average' - theta' = -(1 - 1/n) (theta' - average).
        self._memory.see_step()
        weight = self._memory.take_weight()
        for parameter, before, offset, drift in zip(
            self._parameters, self._before, self._offset, self._drift, strict=True
        ):
            gap = before.neg_().add_(parameter).sub_(offset)
            drift.copy_(drift + weight * gap)
            offset.copy_(gap.mul_(weight - 1.0))
        self._before = []

    @torch.no_grad()
    def begin_window(self) -> None:
        torch._foreach_zero_(self._drift)

    @torch.no_grad()
    def end_window(self) -> None:
        for slow, drift in zip(self._slow, self._drift, strict=True):
            slow.mul_(self._slow_momentum).add_(drift)

    def drift(self, index: int) -> Tensor:
        return self._drift[index].to(self._parameters[index].dtype)

    def slow_drift(self, index: int) -> Tensor:
        return self._slow[index].to(self._parameters[index].dtype)

    def pull_back(self, index: int) -> Tensor:
        return self._offset[index].to(self._parameters[index].dtype)

    def shift(self, index: int, delta: Tensor) -> None:
        """The offset to the weights is unchanged: nothing to do."""

    def tensors(self) -> dict[str, Tensor]:
        named = _named(offset=self._offset, drift=self._drift, slow=self._slow)
        return {**named, MEMORY: self._memory.tensor}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])

    def bytes_held(self) -> int:
        return _num_bytes(self._offset) + _num_bytes(self._drift) + _num_bytes(self._slow)

    def moving_tensors(self) -> list[Tensor]:
        return [*self._offset, self._memory.tensor]


def _named(**lists: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{index}": t for name, items in lists.items() for index, t in enumerate(items)}


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
