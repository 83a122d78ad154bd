"""Activation checkpointing of a model's blocks, on and off between two steps.

A block then keeps its input alone and computes the rest again in the backward pass (torch.utils.checkpoint;
Chen et al. 2016), with the random numbers of the first time: gradients are the same, one more forward pass is
the price. Touches no weight and no name of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def why_not(model: nn.Module) -> str:
    """Why this model's activations cannot be computed again; "" if they can."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        return "a compiled model decides itself what it computes again (trainer.compile)"
    if not len(blocks_of(model)):
        return f"{type(model).__name__} has no blocks"
    return ""


def blocks_of(model: nn.Module) -> nn.ModuleList:
    blocks = getattr(model, "blocks", None)
    return blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList()


def set_recompute(model: nn.Module, on: bool) -> None:
    for block in blocks_of(model):
        block.__dict__.pop("forward", None)  # the method of its class again
        if on:
            block.forward = partial(_forward_again, block.forward)


def _forward_again(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=True, **options)
