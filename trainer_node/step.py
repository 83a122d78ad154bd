"""One real optimizer step: forward, backward, clip, update. Nothing here knows of prediction.

Shapes: G parameter groups. All results stay on the device: no synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer_node.groups import ParameterGroup
from trainer_node.split import WHOLE, Split, local_of


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step leaves behind, on the device."""

    loss: Tensor  # () mean over micro-batches, nats
    gradient_norms_G: Tensor  # (G,) L2 before clipping
    clip_scale: Tensor  # () in (0, 1]
    small_norm: Tensor | None = None  # () L2 of the gradient of a part of the batch; None: not measured
    small_share: float = math.nan  # how large that part is, in (0, 1); NaN: not measured


class FirstPiece:
    """The gradient norm of the first piece of a step alone, for the noise scale (noise_scale.py).

    Filled by make_gradients, read by update; may serve one step after another. A norm and not its square:
    in float32 that overflows at 1.8e19.
    """

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        self._groups = groups
        self.forget()

    def forget(self) -> None:
        self.norm: Tensor | None = None  # () L2 of its mean loss' gradient, of this rank; None: not measured
        self.share = math.nan  # of the batch of this rank

    def look(self, divisor: float) -> None:
        """The gradients are now those of the first piece's loss over `divisor`, and of nothing else."""
        self.norm = torch.linalg.vector_norm(gradient_norms(self._groups)) * divisor
        self.share = 1.0 / divisor

    def of_whole(self, split: Split) -> tuple[Tensor | None, float]:
        """The norm and the share of the batch of all ranks that it stands for.

        Replicas have not exchanged the first piece: each rank's is its own, a part that much smaller. Shards
        are exchanged in each backward pass: theirs are parts of the gradient of all ranks' first pieces.
        """
        if self.norm is None or not split.is_sharded:
            return self.norm, self.share / split.ranks.size
        # Not in the exchange of the other norms: that could round them, and so the clipping, another way.
        return split.shards.sum_(self.norm.square().view(1)).sqrt()[0], self.share


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def gradient_norms(groups: Sequence[ParameterGroup]) -> Tensor:
    """(G,) L2 norms of what this rank holds; a group without gradients has norm 0."""
    norms = []
    for group in groups:
        gradients = _gradients(group)
        if gradients:
            norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float()))
        else:
            norms.append(torch.zeros((), device=local_of(group.parameters[0]).device))
    return torch.stack(norms)


def _gradients(group: ParameterGroup) -> list[Tensor]:
    return [local_of(p.grad) for p in group.parameters if p.grad is not None]


def train_step(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batches: Sequence[object],
    optimizers: Sequence[torch.optim.Optimizer],
    groups: Sequence[ParameterGroup],
    *,
    clip_norm: float,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    after_backward: Callable[[], None] | None = None,
    first: FirstPiece | None = None,
) -> StepTensors:
    """One update from `batches` (the micro-batches of this step), each weighted equally.

    `after_backward` is called when the gradients are whole and not yet clipped.
    """
    loss = make_gradients(model, loss_of, equally(batches), optimizers, context=context, first=first)
    if after_backward is not None:
        after_backward()
    return update(loss, optimizers, groups, clip_norm=clip_norm, first=first)


def equally(batches: Sequence[object]) -> list[tuple[object, float]]:
    return [(batch, float(len(batches))) for batch in batches]


def make_gradients(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    pieces: Sequence[tuple[object, float]],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    split: Split = WHOLE,
    first: FirstPiece | None = None,
) -> Tensor:
    """Gradients of the loss summed over (piece, divisor of its loss); returns that loss, () nats.

    Writes gradients only (and buffers that the model keeps of its forward passes): may be done again.
    The loss is that of this rank's pieces; its gradients are exchanged in the last backward pass.
    `first` is filled where there are two pieces or more, and reads gradients only.
    """
    assert pieces, "a step needs at least one micro-batch"
    if first is not None:
        first.forget()
    model.train()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = None
    for number, (piece, divisor) in enumerate(pieces, start=1):
        # Around the forward pass as well: DDP decides there whether the backward pass exchanges.
        with nullcontext() if number == len(pieces) else split.without_exchange():
            with context():
                loss = loss_of(piece) / divisor
            loss.backward()
        if first is not None and number == 1 < len(pieces):
            first.look(divisor)
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def update(
    loss: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    groups: Sequence[ParameterGroup],
    *,
    clip_norm: float,
    split: Split = WHOLE,
    first: FirstPiece | None = None,
) -> StepTensors:
    """Clip the gradients and take the step."""
    loss, norms_G = split.whole(loss, gradient_norms(groups))
    small_norm, small_share = first.of_whole(split) if first is not None else (None, math.nan)
    scale = torch.ones((), device=norms_G.device)
    if clip_norm > 0:
        # As torch.nn.utils.clip_grad_norm_, but from the norms at hand and without a host decision.
        scale = (clip_norm / (torch.linalg.vector_norm(norms_G) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g for group in groups for g in _gradients(group)], scale)
    for optimizer in optimizers:
        optimizer.step()
    return StepTensors(loss.float(), norms_G, scale, small_norm, small_share)


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batches: Sequence[object],
    *,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Mean loss of equally weighted batches in evaluation mode, nats. Synchronises."""
    return float(torch.stack(_losses(model, loss_of, batches, context)).mean())


@torch.no_grad()
def mean_loss_of_pieces(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    pieces: Sequence[tuple[object, float]],
    *,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """The same, of (piece, divisor of its loss). Synchronises."""
    losses = _losses(model, loss_of, [piece for piece, _ in pieces], context)
    divisors = torch.tensor([divisor for _, divisor in pieces], device=losses[0].device)
    return float((torch.stack(losses) / divisors).sum())


def _losses(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batches: Sequence[object],
    context: Callable[[], AbstractContextManager[object]],
) -> list[Tensor]:
    was_training = model.training
    model.eval()
    losses = []
    try:
        for batch in batches:
            with context():
                losses.append(loss_of(batch).float())
    finally:
        model.train(was_training)
    return losses
