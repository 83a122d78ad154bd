"""Turns a decision into moved weights: besides correct.py the only code but the optimizer that moves them.

delta_theta = sum_k c[g, k] d[g, k], or the displacement of the per-weight forecaster where a decision
brings one; added in place, one parameter at a time. Undoing is not this file's business: adding and
subtracting a delta is not exact, so snapshot.py restores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.messages import DIRECTIONS, PhaseDecision
from trainer_node.basis import Basis
from trainer_node.weight_forecast import WeightForecaster, read_forecaster

_ABLATION_STREAM = 0xAB1A7E


@dataclass(frozen=True, slots=True)
class AppliedDelta:
    norm: float  # L2 over all weights
    sample_Gm: Tensor  # sampled delta
    weights_Gm: Tensor  # sampled weights right after it


def coefficients_of(decision: PhaseDecision) -> Tensor:
    """(G, K) float32; zeros where a forecaster comes without coefficients."""
    shape = decision.num_groups, decision.num_directions
    if not decision.coefficients:
        return torch.zeros(shape)
    return torch.tensor(decision.coefficients, dtype=torch.float32).view(shape)


def forecaster_of(basis: Basis, decision: PhaseDecision) -> WeightForecaster | None:
    """The forecaster that the decision brings; None if it brings none.

    Raises ValueError when it cannot be used: other bytes than expected, or too short a history.
    """
    if not decision.forecaster:
        return None
    if basis.history is None or not basis.history.is_full:
        raise ValueError("too few snapshots of the weights for a forecaster")
    return read_forecaster(
        decision.forecaster, num_groups=basis.num_groups, num_differences=basis.history.num_differences
    )


def apply_delta(basis: Basis, coefficients_GK: Tensor) -> AppliedDelta:
    """Move the weights; the averages move along, so that a jump is not taken for drift."""
    return move(basis, linear_deltas(basis, coefficients_GK))


@torch.no_grad()
def linear_deltas(basis: Basis, coefficients_GK: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(parameter index, its delta), one at a time; parameters that do not move are left out."""
    with_momentum = bool(coefficients_GK[:, DIRECTIONS.index("momentum")].any())
    rows = coefficients_GK.tolist()
    for index, directions in basis.directions(with_momentum=with_momentum):
        row = rows[basis.group_of[index]]
        if not any(row):
            continue  # not even a zero is added: it would make +0.0 of a weight that is -0.0
        delta = torch.zeros_like(basis.parameters[index])
        for coefficient, direction in zip(row, directions, strict=True):
            if coefficient != 0.0:
                delta.add_(direction, alpha=coefficient)
        yield index, delta


@torch.no_grad()
def random_deltas(
    deltas: Iterable[tuple[int, Tensor]], *, key: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Each delta replaced by a random one of the same norm, so every group keeps its norm too.

    `key` is (seed, step, attempt): the same on any device, at any time, and apart from torch's own
    random state.
    """
    for index, delta in deltas:
        yield index, _random_like(delta, (*key, index))


@torch.no_grad()
def move(basis: Basis, deltas: Iterable[tuple[int, Tensor]]) -> AppliedDelta:
    square = torch.zeros((), dtype=torch.float32, device=basis.parameters[0].device)
    sample_Gm = basis.empty_sample()
    for index, delta in deltas:
        basis.parameters[index].add_(delta)
        basis.averages.shift(index, delta)
        basis.sample_into(sample_Gm, index, delta)
        square += delta.float().square().sum()
    for part in (square, sample_Gm):
        basis.split.shards.sum_(part)
    return AppliedDelta(
        norm=float(square.sqrt()), sample_Gm=sample_Gm, weights_Gm=basis.sampled(basis.parameters)
    )


@torch.no_grad()
def equal_parts(basis: Basis, deltas: Iterable[tuple[int, Tensor]], count: int) -> list[tuple[int, Tensor]]:
    """One of `count` equal parts of the whole delta, held on the device: 1 x weights.

    It takes the place of the gradients of the last step, which nothing needs any more: directions that
    are made anew after the first part would be others, since the averages have moved.
    """
    basis.drop_gradients()
    return [(index, delta.div_(count)) for index, delta in deltas]


def _random_like(delta: Tensor, key: tuple[int, ...]) -> Tensor:
    """A random direction of the norm of `delta`: a function of the key, on any device."""
    seed = int(np.random.SeedSequence([_ABLATION_STREAM, *key]).generate_state(1, np.uint64)[0] >> 1)
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed)).to(delta)
    norm = torch.linalg.vector_norm
    return noise.mul_(norm(delta) / norm(noise))
