"""One weight used at every tick of a sequence: the same gradients as autograd's, for a third of the work.

Owns no weight and knows nothing of the model that uses it (rssm.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LateWeight(torch.autograd.Function):
    """`added`, unchanged; on the way back one product gives the gradient of `weight` for all ticks.

    In `added[t] + x[t] @ weight` the sum's gradient is that of `added[t]`, so the weight's is
    sum_t x[t].T @ grad_added[t]. Autograd would build a matrix of the weight's size for every tick and add
    them up: most of the time of an update.
    """

    @staticmethod
    def forward(ctx: Any, added: Tensor, weight: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.seen = seen
        return added.view_as(added)

    @staticmethod
    def backward(ctx: Any, grad_added: Tensor) -> tuple[Tensor, Tensor, None]:
        seen = torch.cat(ctx.seen)
        return grad_added, seen.t() @ grad_added.reshape(len(seen), -1), None


class SharedProduct:
    """t -> added[t] + x @ weight, for ticks in order."""

    def __init__(self, added: Tensor, weight: Tensor) -> None:
        """`added` (T, B, outputs), `weight` (inputs, outputs)."""
        self._seen: list[Tensor] = []
        self._learns = torch.is_grad_enabled()
        if self._learns:
            added = _LateWeight.apply(added, weight, self._seen)
        self._weight = weight.detach()
        self._added = added.unbind(0)

    def __call__(self, tick: int, x: Tensor) -> Tensor:
        if self._learns:
            self._seen.append(x.detach())
        return torch.addmm(self._added[tick], x, self._weight)
