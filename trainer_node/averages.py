"""Averaged weights and their drift, in full or in half the memory.

Owns, per parameter theta: the exponential average a (time constant n steps), the drift of a since
the window began, and the slow drift b <- mu b + drift, taken once per window (AdEMAMix-like
memory; with n = 0 it is the outer momentum of SNOO). Reads weights, never writes them.

ExactAverages keeps a, a at the window's start, and b in the dtype of the weights: 3 x weights.
CompactAverages keeps a - theta, the drift and b in bfloat16: 1.5 x weights. An average itself
cannot live in bfloat16 (one step moves it by less than half a unit in the last place), but its
distance to the weights can; the price is one copy of the weights during optimizer.step, when
activations are gone, and more memory traffic.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


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

    def moving_tensors(self) -> list[Tensor]:
        """What a snapshot must hold. The drift need not be there: a window begins after a restore."""


def make_averages(
    parameters: Sequence[Tensor], *, average_steps: int, slow_momentum: float, dtype: str
) -> Averages:
    kind = CompactAverages if dtype == "bf16" else ExactAverages
    return kind(parameters, average_steps=average_steps, slow_momentum=slow_momentum)


class ExactAverages:
    def __init__(self, parameters: Sequence[Tensor], *, average_steps: int, slow_momentum: float) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._weight = 1.0 / max(1, average_steps)
        self._slow_momentum = slow_momentum
        self._average = [p.clone() for p in self._parameters]
        self._window_start = [p.clone() for p in self._parameters]
        self._slow = [torch.zeros_like(p) for p in self._parameters]

    def before_step(self) -> None:
        pass

    @torch.no_grad()
    def after_step(self) -> None:
        torch._foreach_lerp_(self._average, self._parameters, self._weight)

    @torch.no_grad()
    def begin_window(self) -> None:
        torch._foreach_copy_(self._window_start, self._average)

    @torch.no_grad()
    def end_window(self) -> None:
        for slow, average, start in zip(self._slow, self._average, self._window_start, strict=True):
            # The difference first: added to an average, a small drift would lose its last bits.
            slow.mul_(self._slow_momentum).add_(average - start)

    def drift(self, index: int) -> Tensor:
        return self._average[index] - self._window_start[index]

    def slow_drift(self, index: int) -> Tensor:
        return self._slow[index]

    def pull_back(self, index: int) -> Tensor:
        return self._average[index] - self._parameters[index]

    def shift(self, index: int, delta: Tensor) -> None:
        self._average[index].add_(delta)

    def tensors(self) -> dict[str, Tensor]:
        return _named(average=self._average, window_start=self._window_start, slow=self._slow)

    def moving_tensors(self) -> list[Tensor]:
        return list(self._average)


class CompactAverages:
    def __init__(self, parameters: Sequence[Tensor], *, average_steps: int, slow_momentum: float) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._weight = 1.0 / max(1, average_steps)
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
        for parameter, before, offset, drift in zip(
            self._parameters, self._before, self._offset, self._drift, strict=True
        ):
            gap = before.neg_().add_(parameter).sub_(offset)
            drift.copy_(drift + self._weight * gap)
            offset.copy_(gap.mul_(self._weight - 1.0))
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
        return _named(offset=self._offset, drift=self._drift, slow=self._slow)

    def moving_tensors(self) -> list[Tensor]:
        return list(self._offset)


def _named(**lists: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{index}": t for name, items in lists.items() for index, t in enumerate(items)}
