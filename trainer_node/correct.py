"""The residual corrector: how far along its delta a jump should have gone, and the move there.

Along the delta, t = 0 is before the jump and t = 1 after it. Two guard losses and the slope at t = 1
fix a parabola f(t) = a + b t + c t^2 (Nocedal & Wright, Numerical Optimization, section 3.5):

    D = f(1) - f(0),  s = f'(1)   ->   c = s - D,   b = 2 D - s,   t* - 1 = -s / (2 c)

The slope is the gradient of the first CORRECT step times the delta. That gradient is free; the delta
is the weights minus the stored weights from before the jump, so nothing more is held on the device.
Moves weights together with their averages, like delta.py; knows no phases and no verdicts.
Without the guard nothing is stored and nothing measured, so there is no correction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from trainer_node import ledger as purposes
from trainer_node.basis import Basis
from trainer_node.snapshot import TensorStore
from trainer_node.trial import Jump, JumpTools

# Times the delta: all of it may be taken back, half of it may be added. Beyond that a parabola
# through noisy losses is trusted further than it was measured.
LOW, HIGH = -1.0, 0.5


def correct_jump(tools: JumpTools, jump: Jump) -> None:
    """Between backward and update of the first step of probation: move to where the delta should end.

    The update that follows uses the gradient from before this move, as if the move came after it.
    """
    with tools.ledger.span(purposes.CORRECTIONS) as correcting:
        slope = slope_along(tools.basis, tools.store)
        times = correction_of(
            loss_before=jump.outcome.loss_before,
            loss_after=jump.outcome.loss_after,
            slope_after=slope,
            share=jump.decision.correction_share,
        )
        if times != 0.0:
            move_along(tools.basis, tools.store, times)
            # The cosine is of what the steps do: the correction is no displacement of theirs.
            jump.delta.weights_Gm.add_(jump.delta.sample_Gm, alpha=times)
    jump.outcome = replace(
        jump.outcome,
        slope_after=slope,
        correction=times,
        jump_seconds=jump.outcome.jump_seconds + correcting.seconds,
    )


def correction_of(*, loss_before: float, loss_after: float, slope_after: float, share: float) -> float:
    """share * (t* - 1), clipped to [LOW, HIGH]; 0 where the parabola has no minimum or is unknown.

    Losses in nats, the slope in nats per delta.
    """
    curvature = slope_after - (loss_after - loss_before)
    if not math.isfinite(curvature) or curvature <= 0.0:
        return 0.0
    return min(HIGH, max(LOW, share * (-slope_after / (2.0 * curvature))))


@torch.no_grad()
def slope_along(basis: Basis, before: TensorStore) -> float:
    """Sum over all weights of gradient x (weights - weights in `before`): nats per delta.

    `before` holds the weights as its first tensors, in the order of `basis.parameters`. Gradients are as
    backward left them, before clipping. Synchronises.
    """
    total = torch.zeros((), dtype=torch.float32, device=basis.parameters[0].device)
    for index, delta in _deltas(basis, before):
        gradient = basis.gradient(index)
        if gradient is not None:
            total += torch.dot(gradient.reshape(-1).float(), delta.reshape(-1).float())
    return float(basis.split.shards.sum_(total))


@torch.no_grad()
def move_along(basis: Basis, before: TensorStore, times: float) -> None:
    """Add `times` x (weights - weights in `before`); the averages move along."""
    for index, delta in _deltas(basis, before):
        delta.mul_(times)
        basis.parameters[index].add_(delta)
        basis.averages.shift(index, delta)


def _deltas(basis: Basis, before: TensorStore) -> Iterator[tuple[int, Tensor]]:
    for index, parameter in enumerate(basis.parameters):
        yield index, parameter.detach() - before.read(index).to(parameter.device)
