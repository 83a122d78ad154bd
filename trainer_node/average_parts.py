"""What both kinds of averages are made of: how long they remember, and what passes from one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

MEMORY = "memory"  # name of the steps seen and the waiting weight among the tensors


class Parts(NamedTuple):
    """All that is known of one parameter, typed like it; anywhere."""

    average: Tensor
    window_start: Tensor
    slow: Tensor


class SupportsParts(Protocol):
    memory: TimeConstant

    def parts(self) -> Iterator[Parts]:
        """Of each parameter, given away: these averages are at their end. Frees them one by one."""


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


def named(**lists: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{index}": t for name, items in lists.items() for index, t in enumerate(items)}


def num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
