"""Optimizers from settings, and the direction of their momentum.

Routing: with `muon`, every hidden matrix (2-D, in no embedding and no head group) goes to
torch.optim.Muon; all the rest goes to AdamW, convolutions included, since Muon in torch takes matrices only.
Weight decay is decoupled and acts on tensors of two and more dimensions. Every group carries
`peak_rate`; `set_rates` multiplies it with the schedule's factor.

The momentum direction of a parameter is the step its optimizer would take, decay left out, if the
next gradient left the momentum as it is. It changes no state. Per optimizer, with m the stored momentum:

    Adam, AdamW   -rate * m_hat / (sqrt(v_hat) + eps): the last step again
    Muon          -rate * shape factor * NewtonSchulz(m). Its Nesterov form is g + mu (m - g), and
                  g = m leaves m as it is and makes the form equal to m.
    SGD           -rate * m, with and without Nesterov: the last step again
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.settings import OptimizerSettings
from trainer_node.groups import parameter_groups

# Keller Jordan's scaling: rate * sqrt(max(1, rows / columns)); the settings' muon_rate is meant for it.
MUON_SCALING = "original"
_NOT_HIDDEN = ("embedding", "head")


def build_optimizers(
    model: nn.Module, settings: OptimizerSettings, device: torch.device
) -> list[torch.optim.Optimizer]:
    """One or two optimizers; each trainable parameter is in exactly one group of one of them."""
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for group in parameter_groups(model):
        is_hidden = group.name.split(".")[0] not in _NOT_HIDDEN
        for parameter in group.parameters:
            if settings.name == "muon" and is_hidden and parameter.ndim == 2:
                hidden.append(parameter)
            else:
                (decayed if parameter.ndim >= 2 else plain).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(_muon(hidden, settings))
    if decayed or plain:
        optimizers.append(_adamw(decayed, plain, settings, device))
    return optimizers


def set_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Learning rate = peak rate x factor, in every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_rate"] * factor


@torch.no_grad()
def momentum_directions(
    optimizers: Sequence[torch.optim.Optimizer],
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, its momentum direction) for every parameter, in the order of the groups.

    One tensor at a time; a zero tensor where there is no momentum yet. Raises TypeError for an
    optimizer whose momentum is not known here.
    """
    for optimizer in optimizers:
        direction_of = _direction_rule(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                direction = direction_of(parameter, state, group) if state else None
                yield parameter, torch.zeros_like(parameter) if direction is None else direction


def _muon(hidden: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Muon:
    optimizer = torch.optim.Muon(
        hidden,
        lr=settings.muon_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
        nesterov=True,
        adjust_lr_fn=MUON_SCALING,
    )
    for group in optimizer.param_groups:
        group["peak_rate"] = settings.muon_rate
    return optimizer


def _adamw(
    decayed: list[nn.Parameter], plain: list[nn.Parameter], settings: OptimizerSettings, device: torch.device
) -> torch.optim.AdamW:
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay, "peak_rate": settings.rate},
        {"params": plain, "weight_decay": 0.0, "peak_rate": settings.rate},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.rate,
        betas=(settings.beta1, settings.beta2),
        fused=device.type in ("cpu", "cuda"),
    )


DirectionRule = Callable[[Tensor, dict[str, Any], dict[str, Any]], Tensor | None]


def _direction_rule(optimizer: torch.optim.Optimizer) -> DirectionRule:
    # AdamW is a kind of Adam in torch.
    if isinstance(optimizer, torch.optim.Adam):
        return _adam_direction
    if isinstance(optimizer, torch.optim.Muon):
        return _muon_direction
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd_direction
    raise TypeError(f"the momentum of {type(optimizer).__name__} is not known; use AdamW, Adam, Muon or SGD")


def _adam_direction(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    beta1, beta2 = group["betas"]
    steps = float(state["step"])
    first_correction, second_correction = 1.0 - beta1**steps, 1.0 - beta2**steps
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    denominator = second.sqrt().div_(math.sqrt(second_correction)).add_(group["eps"])
    return (state["exp_avg"] / denominator).mul_(_signed_rate(group) / first_correction)


def _muon_direction(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    # What Muon itself does to a zero matrix: exact by construction, and no private function of torch.
    zero = nn.Parameter(torch.zeros_like(parameter))
    zero.grad = state["momentum_buffer"]
    options = {key: group[key] for key in ("lr", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")}
    torch.optim.Muon([zero], momentum=0.0, weight_decay=0.0, **options).step()
    return zero.detach()


def _sgd_direction(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
    momentum = state.get("momentum_buffer")
    return None if momentum is None else momentum * _signed_rate(group)


def _signed_rate(group: dict[str, Any]) -> float:
    rate = float(group["lr"])
    return rate if group["maximize"] else -rate
