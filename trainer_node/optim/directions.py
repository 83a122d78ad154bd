"""The direction of an optimizer's momentum: the step from momentum alone, for any optimizer.

The momentum direction of a parameter is the step its optimizer would take, decay left out, if the
next gradient left the momentum as it is. Asking changes no state. With m and v the stored moments:

    Adam, AdamW   -rate * m_hat / (sqrt(v_hat) + eps): the last step again
    8-bit Adam    the step for the gradient m, with both moments dequantised. Not the last step again: a small
                  v is stored as zero, and m / eps is no step; the gradient m brings (1 - beta2) m^2 with it
    Lion          -rate * sign(m): for the gradient m its interpolation is m too (Chen et al. 2023)
    Muon          -rate * shape factor * NewtonSchulz(m). Its Nesterov form is g + mu (m - g), and
                  g = m leaves m as it is and makes the form equal to m.
    SGD           -rate * m, with and without Nesterov: the last step again. Its decay is in m (L2)

Wrappers are looked through (Accelerate's, Lookahead's: an optimizer in `.optimizer`). An optimizer of another
kind has a zero direction: a jump still goes along drift, slow drift and pull-back, which come from the
weights alone. `knows_momentum` tells which; `add_direction_rule` teaches a new kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = Mapping[str, Any]
DirectionRule = Callable[[Tensor, State, State], Tensor | None]

BLOCK_WEIGHTS = 256  # of bitsandbytes' 8-bit moments: weights that share one scale


@torch.no_grad()
def momentum_directions(
    optimizers: Sequence[torch.optim.Optimizer],
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, its momentum direction) for every parameter, in the order of the groups.

    One tensor at a time; a zero tensor where there is no momentum yet, or none that is known.
    """
    for outer in optimizers:
        optimizer, direction_of = _look_through(outer)
        # Some libraries keep `maximize` on the optimizer and not in its groups.
        common = {"maximize": getattr(optimizer, "maximize", False)}
        for group in optimizer.param_groups:
            options = {**common, **group}
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                direction = direction_of(parameter, state, options) if state and direction_of else None
                yield parameter, torch.zeros_like(parameter) if direction is None else direction


def knows_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """False: its momentum direction is zero, whatever its state."""
    return _look_through(optimizer)[1] is not None


def add_direction_rule(kind: type[torch.optim.Optimizer], rule: DirectionRule) -> None:
    """Teach the momentum direction of `kind` and its subclasses; the newest rule of a kind counts.

    `rule(parameter, state, group)` gets what the optimizer holds of a parameter and its group's options. It
    returns a new tensor of the parameter's shape and dtype, or None while there is no momentum.
    """
    _RULES[kind] = rule


def _look_through(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, DirectionRule | None]:
    """The optimizer that holds the momentum, and its rule; None for an unknown kind."""
    inner: Any = optimizer
    while isinstance(inner, torch.optim.Optimizer):
        if (rule := _rule_of(type(inner))) is not None:
            return inner, rule
        inner = getattr(inner, "optimizer", None)
    return optimizer, None


def _rule_of(kind: type) -> DirectionRule | None:
    for ancestor in kind.__mro__:
        rule = _RULES.get(ancestor) or _RULES_OF_MODULES.get(ancestor.__module__)
        if rule is not None:
            return rule
    return None


def _adam(parameter: Tensor, state: State, group: State) -> Tensor:
    beta1, beta2 = group["betas"]
    steps = float(state["step"])
    first_correction, second_correction = 1.0 - beta1**steps, 1.0 - beta2**steps
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    denominator = second.sqrt().div_(math.sqrt(second_correction)).add_(group["eps"])
    return (state["exp_avg"] / denominator).mul_(_signed_rate(group) / first_correction)


def _adam_8bit(parameter: Tensor, state: State, group: State) -> Tensor:
    beta1, beta2 = group["betas"][:2]
    steps = state["step"] + 1  # the step for the gradient m is the next one
    first = _dequantised(state, "1")
    second = _dequantised(state, "2").mul_(beta2).addcmul_(first, first, value=1.0 - beta2)
    denominator = second.sqrt_().div_(math.sqrt(1.0 - beta2**steps)).add_(group["eps"])
    return first.div_(denominator).mul_(_signed_rate(group) / (1.0 - beta1**steps)).to(parameter.dtype)


def _dequantised(state: State, moment: str) -> Tensor:
    """A new float32 tensor. A small parameter's moment (under 4096 weights) is stored as float32."""
    values = state[f"state{moment}"]
    if values.dtype != torch.uint8:
        return values.clone()
    from bitsandbytes.functional import (
        dequantize_blockwise as dequantize,  # takes 2.4 s: only where it is used
    )

    absmax, code = state[f"absmax{moment}"], state[f"qmap{moment}"]
    return dequantize(values, absmax=absmax, code=code, blocksize=BLOCK_WEIGHTS)


def _lion(parameter: Tensor, state: State, group: State) -> Tensor:
    return state["exp_avg"].sign().mul_(_signed_rate(group))


def _muon(parameter: Tensor, state: State, group: State) -> Tensor:
    # What Muon itself does to a zero matrix: exact by construction, and no private function of torch.
    zero = nn.Parameter(torch.zeros_like(parameter))
    zero.grad = state["momentum_buffer"]
    options = {key: group[key] for key in ("lr", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")}
    torch.optim.Muon([zero], momentum=0.0, weight_decay=0.0, **options).step()
    return zero.detach()


def _sgd(parameter: Tensor, state: State, group: State) -> Tensor | None:
    momentum = state.get("momentum_buffer")
    return None if momentum is None else momentum * _signed_rate(group)


def _signed_rate(group: State) -> float:
    rate = float(group["lr"])
    return rate if group["maximize"] else -rate


_RULES: dict[type, DirectionRule] = {
    torch.optim.Adam: _adam,  # AdamW is a kind of Adam in torch
    torch.optim.Muon: _muon,
    torch.optim.SGD: _sgd,
}
# Of libraries that are optional: by module, so that none is imported to ask.
_RULES_OF_MODULES: Mapping[str, DirectionRule] = {
    "bitsandbytes.optim.adam": _adam_8bit,
    "bitsandbytes.optim.adamw": _adam_8bit,
    "lion_pytorch.lion_pytorch": _lion,
    "pytorch_optimizer.optimizer.lion": _lion,
}
