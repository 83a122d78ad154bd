"""A tiny GPT, every optimizer by name, and steps with gradients from a fixed stream."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from common.settings import ModelSettings
from trainer_node.model.gpt import GPT
from trainer_node.optim.build import LIBRARIES

CPU = torch.device("cpu")
TINY = ModelSettings(layers=3, heads=2, width=8, context_tokens=8, vocabulary_size=257)


def by_name(*names: str) -> list:
    """For parametrize; skipped visibly where an optional library is missing."""
    missing = {n: library for n, library in LIBRARIES.items() if find_spec(library) is None}
    skip = pytest.mark.skipif
    return [pytest.param(n, marks=skip(n in missing, reason=f"no {missing.get(n)}")) for n in names]


EVERY_OPTIMIZER = by_name("adamw", "adamw8bit", "lion", "muon", "sgd")


def tiny_gpt(**changes):
    torch.manual_seed(0)
    return GPT(ModelSettings(**{**vars(TINY), **changes}))


def run_steps(parameters, optimizers, count):
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
        for optimizer in optimizers:
            optimizer.step()


def routed(optimizers, kind):
    return {
        parameter
        for optimizer in optimizers
        if isinstance(optimizer, kind)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
