"""A model and optimizers of other people's, as the cycle wants to see them. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from trainer_node.groups import ParameterGroup, parameter_groups
from trainer_node.ranks import are_several
from trainer_node.tasks import Task


class NoBatches:
    """TrainBatches of a loop that has its own."""

    def batch(self, position: int) -> Any:
        raise NotImplementedError("the loop has its own batches")

    def epoch(self, position: int) -> float:
        return 0.0

    def guard(self, index: int) -> Any:
        raise NotImplementedError("the loop has its own batches")


def own_task(model: nn.Module, *, units_per_step: int) -> Task:
    device = next(model.parameters()).device
    return Task(
        name="own-loop",
        description="a model and a loop of yours",
        device=device,
        model=model,
        loss=NoBatches().batch,
        accuracy=None,
        train=NoBatches(),
        validation=(),
        unit="units",
        units_per_step=units_per_step,
        tokenizer_path=None,
    )


def trained_groups(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[ParameterGroup]:
    """The parameter groups of the model, without what no optimizer trains."""
    trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    groups = []
    for group in parameter_groups(model):
        pairs = zip(group.parameter_names, group.parameters, strict=True)
        kept = [(name, parameter) for name, parameter in pairs if parameter in trained]
        if kept:
            names, parameters = zip(*kept, strict=True)
            groups.append(ParameterGroup(group.name, names, parameters))
    return groups


def statistics_of_layers(model: nn.Module) -> list[Tensor]:
    """Buffers: a refused jump sets them back, an accepted one keeps them as they have moved on."""
    return [buffer for buffer in model.buffers() if buffer.numel() > 0]


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose hooks are called, without wrappers that keep nothing of their own (Accelerate's).

    One with a state of its own (Lookahead) stays: a refused jump must set that back too.
    """
    inner = getattr(optimizer, "optimizer", None)
    is_wrapper = isinstance(inner, torch.optim.Optimizer) and inner is not optimizer
    keeps_nothing = is_wrapper and inner.state is optimizer.state
    return unwrapped(inner) if keeps_nothing and inner.param_groups is optimizer.param_groups else optimizer


def check_own(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int) -> None:
    """Raises UserError."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is a {type(model).__name__}: give a torch.nn.Module")
    if not optimizers:
        raise UserError("no optimizer was given: give the one that trains the model")
    if are_several():
        raise UserError(
            "several ranks train this model: a jump must be one for all, which Hybrid does not see to;"
            " use `torchrun -m trainer_node train`, or Hybrid(..., redis=None)"
        )
    if steps < 1:
        raise UserError(f"steps = {steps}: give the number of optimizer steps that are planned")
    if not trained_groups(model, optimizers):
        raise UserError("the optimizer trains no parameter of this model: make it of model.parameters()")
