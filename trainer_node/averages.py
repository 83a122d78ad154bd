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

ExactAverages may also live in host memory: the device then holds nothing but one tensor at a time, and an
average takes in the weights over the bus. One kind is made from another by `parts`: exactly between exact
ones, else as exactly as bfloat16 allows.

An average need not see every step: with `every_steps` = 8 it takes in every eighth, with the weight of eight
(ExactAverages only; the other would have to hold its copy of the weights meanwhile).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from trainer_node.average_parts import MEMORY, Parts, SupportsParts, TimeConstant, named, num_bytes
from trainer_node.compact_averages import CompactAverages
from trainer_node.fused_apply import Difference, Direction
from trainer_node.snapshot import MemoryStore, TensorStore


class Averages(SupportsParts, Protocol):
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

    @property
    def are_with_weights(self) -> bool:
        """On their device: `terms` and `moved_along` can be had."""

    def terms(self, index: int, weights: Tensor) -> list[Direction]:
        """Drift, slow drift, pull-back, differences not made as wholes. `weights`: the parameter itself."""

    def moved_along(self, index: int) -> list[Tensor]:
        """What `shift` would add the delta to, for one who adds it in the same pass as to the weights."""

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, for checkpoints."""

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`."""

    def bytes_held(self) -> int:
        """Device memory on a GPU, process memory on CPU."""

    def moving_tensors(self) -> list[Tensor]:
        """What a snapshot must hold. The drift need not be there: a window begins after a restore."""

    def places(self) -> list[tuple[str, int]]:
        """Bytes and where they are: "device" (with the weights), "host", "disk"."""


def make_averages(
    parameters: Sequence[Tensor],
    *,
    average_steps: int,
    slow_momentum: float,
    dtype: str,
    average_share: float = 0.0,
    every_steps: int = 1,
    park: TensorStore | None = None,
    on_host: bool = False,
    former: Averages | None = None,
) -> Averages:
    """On the host they are exact whatever the type. `former` averages go on in the new ones and end."""
    if dtype == "bf16" and not on_host:
        return CompactAverages(
            parameters,
            average_steps=average_steps,
            slow_momentum=slow_momentum,
            average_share=average_share,
            former=former,
        )
    return ExactAverages(
        parameters,
        average_steps=average_steps,
        slow_momentum=slow_momentum,
        average_share=average_share,
        every_steps=every_steps,
        park=park,
        device=torch.device("cpu") if on_host else None,
        former=former,
    )


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
        device: torch.device | None = None,
        former: Averages | None = None,
    ) -> None:
        """`park` keeps the average of the window's start, which no step needs; default: process memory.

        The rest lives on `device`; default: with the weights.
        """
        self._parameters = [p.detach() for p in parameters]
        self._device = device or self._parameters[0].device
        self.memory = TimeConstant(average_steps, average_share)
        self._slow_momentum, self._every_steps = slow_momentum, every_steps
        self._park = park or MemoryStore()
        self._average: list[Tensor] = []
        self._slow: list[Tensor] = []
        if former is None:
            self._average = [p.clone().to(self._device) for p in self._parameters]
            self._slow = [torch.zeros_like(p) for p in self._average]
            self._park.save(self._average)
        else:
            self._take_over(former)

    def _take_over(self, former: Averages) -> None:
        starts = []
        for parts in former.parts():
            self._average.append(parts.average.to(self._device))
            self._slow.append(parts.slow.to(self._device))
            starts.append(parts.window_start.cpu())
        self._park.save(starts)
        self.memory.tensor.copy_(former.memory.tensor)

    @torch.no_grad()
    def parts(self) -> Iterator[Parts]:
        self._catch_up()
        nothing = torch.empty(0)
        for index, (average, slow) in enumerate(zip(self._average, self._slow, strict=True)):
            yield Parts(average, self._park.read(index), slow)
            self._average[index] = self._slow[index] = nothing
        self._park.close()

    def before_step(self) -> None:
        pass

    @torch.no_grad()
    def after_step(self) -> None:
        if self.memory.see_step() % self._every_steps == 0:
            self._catch_up()

    def _catch_up(self) -> None:
        weight = self.memory.take_weight()
        if weight > 0.0 and self.are_with_weights:
            torch._foreach_lerp_(self._average, self._parameters, weight)
        elif weight > 0.0:
            for average, parameter in zip(self._average, self._parameters, strict=True):
                average.lerp_(parameter.to(self._device), weight)

    @torch.no_grad()
    def begin_window(self) -> None:
        self._catch_up()
        self._park.save(self._average)

    @torch.no_grad()
    def end_window(self) -> None:
        self._catch_up()
        for index, slow in enumerate(self._slow):
            # The difference first: added to an average, a small drift would lose its last bits.
            slow.mul_(self._slow_momentum).add_(self._drift_at_home(index))

    def _drift_at_home(self, index: int) -> Tensor:
        return self._average[index] - self._park.read(index).to(self._device)

    def drift(self, index: int) -> Tensor:
        return self._drift_at_home(index).to(self._parameters[index].device)

    def slow_drift(self, index: int) -> Tensor:
        return self._slow[index].to(self._parameters[index].device)

    def pull_back(self, index: int) -> Tensor:
        parameter = self._parameters[index]
        return self._average[index].to(parameter.device) - parameter

    def shift(self, index: int, delta: Tensor) -> None:
        self._average[index].add_(delta.to(self._device))

    @property
    def are_with_weights(self) -> bool:
        return self._device == self._parameters[0].device

    def terms(self, index: int, weights: Tensor) -> list[Direction]:
        average, start = self._average[index], self._park.read(index).to(self._device)
        return [Difference(average, start), self._slow[index], Difference(average, weights)]

    def moved_along(self, index: int) -> list[Tensor]:
        return [self._average[index]]

    def tensors(self) -> dict[str, Tensor]:
        start = [self._park.read(index) for index in range(len(self._average))]
        state = named(average=self._average, window_start=start, slow=self._slow)
        return {**state, MEMORY: self.memory.tensor}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in named(average=self._average, slow=self._slow).items():
            tensor.copy_(saved[name])
        self.memory.tensor.copy_(saved[MEMORY])
        self._park.save([saved[f"window_start.{index}"] for index in range(len(self._average))])

    def bytes_held(self) -> int:
        if not self.are_with_weights:
            return 0
        parked_bytes = 0 if self._device.type == "cuda" else self._park.resident_bytes
        return num_bytes(self._average) + num_bytes(self._slow) + parked_bytes

    def places(self) -> list[tuple[str, int]]:
        moving_bytes = num_bytes(self._average) + num_bytes(self._slow)
        return [
            ("device" if self.are_with_weights else "host", moving_bytes),
            (self._park.place, num_bytes(self._average)),
        ]

    def moving_tensors(self) -> list[Tensor]:
        return [*self._average, self.memory.tensor]
