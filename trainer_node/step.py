"""One real optimizer step: forward, backward, clip, update. Nothing here knows of prediction.

Shapes: G parameter groups. All results stay on the device: no synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer_node.groups import ParameterGroup


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step leaves behind, on the device."""

    loss: Tensor  # () mean over micro-batches, nats
    gradient_norms_G: Tensor  # (G,) L2 before clipping
    clip_scale: Tensor  # () in (0, 1]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def gradient_norms(groups: Sequence[ParameterGroup]) -> Tensor:
    """(G,) L2 norms; a group without gradients has norm 0."""
    norms = []
    for group in groups:
        gradients = [p.grad for p in group.parameters if p.grad is not None]
        if gradients:
            norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float()))
        else:
            norms.append(torch.zeros((), device=group.parameters[0].device))
    return torch.stack(norms)


def train_step(
    model: nn.Module,
    loss_of: Callable[[object], Tensor],
    batches: Sequence[object],
    optimizers: Sequence[torch.optim.Optimizer],
    groups: Sequence[ParameterGroup],
    *,
    clip_norm: float,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    after_backward: Callable[[], None] | None = None,
) -> StepTensors:
    """One update from `batches` (the micro-batches of this step), each weighted equally.

    `after_backward` is called when the gradients are whole and not yet clipped.
    """
    model.train()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = None
    for batch in batches:
        with context():
            loss = loss_of(batch) / len(batches)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None, "a step needs at least one micro-batch"
    if after_backward is not None:
        after_backward()
    norms_G = gradient_norms(groups)
    scale = torch.ones((), device=norms_G.device)
    if clip_norm > 0:
        # As torch.nn.utils.clip_grad_norm_, but from the norms at hand and without a host decision.
        scale = (clip_norm / (torch.linalg.vector_norm(norms_G) + 1e-6)).clamp(max=1.0)
        gradients = [p.grad for group in groups for p in group.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, scale)
    for optimizer in optimizers:
        optimizer.step()
    return StepTensors(loss=total.float(), gradient_norms_G=norms_G, clip_scale=scale)


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loss_of: Callable[[object], Tensor],
    batches: Sequence[object],
    *,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Mean loss in evaluation mode, nats. Synchronises."""
    was_training = model.training
    model.eval()
    losses = []
    for batch in batches:
        with context():
            losses.append(loss_of(batch).float())
    model.train(was_training)
    return float(torch.stack(losses).mean())
