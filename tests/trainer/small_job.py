"""A job of a few hundred weights for the laws of the trainer core, and its state bit by bit.

The net has dropout, so a step draws from the RNG; several kinds of modules, so there are several
groups; hidden matrices, so Muon has work. No loop, no phases: a test drives the parts itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.messages import DIRECTIONS
from common.settings import BasisSettings, OptimizerSettings
from trainer_node.basis import Basis
from trainer_node.fingerprint import fingerprint
from trainer_node.groups import ParameterGroup, parameter_groups
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.snapshot import optimizer_tensors
from trainer_node.step import StepTensors, mean_loss, train_step

CPU = torch.device("cpu")
MOMENTUM, DRIFT, SLOW_DRIFT, PULL_BACK = range(len(DIRECTIONS))


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(SmallBlock() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, inputs, targets):
        stream = self.embedding(inputs)
        for block in self.blocks:
            stream = block(stream)
        return F.cross_entropy(self.head(stream), targets)


class SmallBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, stream):
        return stream + self.dropout(F.relu(self.mlp(self.norm(stream))))


@dataclass
class SmallJob:
    model: SmallNet
    groups: list[ParameterGroup]
    optimizers: list[torch.optim.Optimizer]
    basis: Basis
    steps_done: int = 0

    def loss_of(self, batch) -> torch.Tensor:
        return self.model(*batch)

    def batch(self, position: int):
        random = torch.Generator().manual_seed(1000 + position)
        inputs = torch.randint(12, (16,), generator=random)
        return inputs, inputs % 5

    def step(self) -> StepTensors:
        """One real step, with the averages kept by hand."""
        self.basis.averages.before_step()
        tensors = train_step(
            self.model,
            self.loss_of,
            [self.batch(self.steps_done)],
            self.optimizers,
            self.groups,
            clip_norm=1.0,
        )
        self.basis.averages.after_step()
        self.steps_done += 1
        return tensors

    def window(self, steps: int = 4):
        """A FULL window; returns its decision point."""
        self.basis.averages.begin_window()
        for _ in range(steps):
            self.step()
        return self.close()

    def close(self):
        return self.basis.close_window(window=1, fingerprint=fingerprint(self.basis.parameters))

    def guard_loss(self) -> float:
        return mean_loss(self.model, self.loss_of, [self.batch(-1)])

    def state(self) -> dict[str, bytes]:
        """Everything that a restored jump must leave as it was, as raw bytes."""
        tensors = {
            **{f"weights.{name}": p for name, p in self.model.named_parameters()},
            **{f"optimizer.{i}": t for i, t in enumerate(optimizer_tensors(self.optimizers))},
            **{f"basis.{name}": t for name, t in self.basis.tensors().items()},
            "random": torch.get_rng_state(),
        }
        return {name: bits(tensor) for name, tensor in tensors.items()}


def small_job(
    *, optimizer: str = "adamw", seed: int = 0, weights: torch.dtype = torch.float32, **basis: object
) -> SmallJob:
    torch.manual_seed(seed)
    model = SmallNet().to(weights)
    groups = parameter_groups(model)
    optimizers = build_optimizers(model, OptimizerSettings(name=optimizer, rate=0.01), CPU)
    set_rates(optimizers, 1.0)
    settings = BasisSettings(**{"average_steps": 4, "average_every_steps": 1, "sample_size": 4096, **basis})
    return SmallJob(model, groups, optimizers, Basis(groups, optimizers, settings, seed=0))


def bits(tensor: torch.Tensor) -> bytes:
    """Raw bytes: unlike torch.equal, tells 0.0 from -0.0 and NaN from nothing."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def whole(tensors) -> np.ndarray:
    """One float64 vector of all tensors."""
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors])


def directions_by_group(basis: Basis) -> list[np.ndarray]:
    """Per group the (K, N_g) float64 matrix of whole directions."""
    rows: list[list[tuple[int, list[np.ndarray]]]] = [[] for _ in range(basis.num_groups)]
    for index, directions in basis.directions():
        flat = [d.detach().double().reshape(-1).numpy().copy() for d in directions]
        rows[basis.group_of[index]].append((index, flat))
    return [
        np.stack([np.concatenate(parts) for parts in zip(*(flat for _, flat in sorted(group)), strict=True)])
        for group in rows
    ]
