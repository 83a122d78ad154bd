"""Averages in half the memory: their distance to the weights, in bfloat16 (see averages.py).

Needs one copy of the weights during optimizer.step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trainer_node.average_parts import MEMORY, Parts, SupportsParts, TimeConstant, named, num_bytes
from trainer_node.fused_apply import Direction


class CompactAverages:
    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        average_steps: int,
        slow_momentum: float,
        average_share: float = 0.0,
        former: SupportsParts | None = None,
    ) -> None:
        self._parameters = [p.detach() for p in parameters]
        self.memory = TimeConstant(average_steps, average_share)
        self._slow_momentum = slow_momentum
        self._offset, self._drift, self._slow = (
            [torch.zeros_like(p, dtype=torch.bfloat16) for p in self._parameters if former is None]
            for _ in range(3)
        )
        self._before: list[Tensor] = []
        if former is not None:
            self._take_over(former)

    def _take_over(self, former: SupportsParts) -> None:
        for parameter, parts in zip(self._parameters, former.parts(), strict=True):
            average = parts.average.to(parameter.device)
            self._offset.append((average - parameter).bfloat16())
            self._drift.append((average - parts.window_start.to(parameter.device)).bfloat16())
            self._slow.append(parts.slow.to(parameter.device).bfloat16())
        self.memory.tensor.copy_(former.memory.tensor)

    @torch.no_grad()
    def parts(self) -> Iterator[Parts]:
        nothing = torch.empty(0)
        for index, parameter in enumerate(self._parameters):
            average = parameter + self._offset[index]
            yield Parts(average, average - self._drift[index], self._slow[index].to(parameter.dtype))
            self._offset[index] = self._drift[index] = self._slow[index] = nothing

    @torch.no_grad()
    def before_step(self) -> None:
        self._before = [p.clone() for p in self._parameters]

    @torch.no_grad()
    def after_step(self) -> None:
        # average' - average = (theta' - average) / n, with theta' - average = update - offset.
        # offset' = average' - theta' = -(1 - 1/n) (theta' - average).
        self.memory.see_step()
        weight = self.memory.take_weight()
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

    @property
    def are_with_weights(self) -> bool:
        return True

    def terms(self, index: int, weights: Tensor) -> list[Direction]:
        return [self._drift[index], self._slow[index], self._offset[index]]

    def moved_along(self, index: int) -> list[Tensor]:
        return []

    def tensors(self) -> dict[str, Tensor]:
        state = named(offset=self._offset, drift=self._drift, slow=self._slow)
        return {**state, MEMORY: self.memory.tensor}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])

    def bytes_held(self) -> int:
        return num_bytes(self._offset) + num_bytes(self._drift) + num_bytes(self._slow)

    def places(self) -> list[tuple[str, int]]:
        return [("device", self.bytes_held())]

    def moving_tensors(self) -> list[Tensor]:
        return [*self._offset, self.memory.tensor]
