"""The mean of the weights over the second half of a few steps: what two rates can be compared by.

The loss of the last weights says how much noise a rate keeps up, and so favours the lower one whatever it
costs later (the short-horizon bias: Wu et al. 2018, arXiv 1803.02021). Averaged weights are without that
noise (Polyak & Juditsky 1992). Measured 2026-11-22 (docs/lab-log.md): of rates from 1/30 to 8 times the best,
16 steps from the same weights, the last weights preferred 1/8 to 1/2 of the best, their mean the best one or
twice that.

Holds one copy of the weights, on their device, from the middle of the leg on. Buffers (BatchNorm) stay as
they are. Takes no step and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class LegMean:
    def __init__(self, parameters: Sequence[Tensor], leg_steps: int) -> None:
        """Of the weights after each of the last ceil(leg_steps / 2) steps of a leg."""
        self._parameters = [p.detach() for p in parameters]
        self._first_step = leg_steps // 2 + 1
        self._steps = 0
        self._mean: list[Tensor] = []

    @torch.no_grad()
    def after_step(self) -> None:
        self._steps += 1
        seen = self._steps - self._first_step + 1
        if seen == 1:
            self._mean = [p.clone() for p in self._parameters]
        elif seen > 1:
            torch._foreach_lerp_(self._mean, self._parameters, 1.0 / seen)

    @property
    def is_half_way(self) -> bool:
        """Whether the next step is the first of the mean."""
        return self._steps == self._first_step - 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the place of the weights, which come back to the last bit. Before the middle nothing is done."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, mean in zip(self._parameters, self._mean, strict=bool(self._mean)):
            weights = parameter.clone()  # one tensor at a time: no second copy of the whole
            parameter.copy_(mean)
            mean.copy_(weights)
