"""Turns G x K coefficients into moved weights. The only code that moves weights besides the optimizer.

delta_theta = sum_k c[g, k] d[g, k], added in place, one parameter at a time. Undoing is not this
file's business: adding and subtracting a delta is not exact, so snapshot.py restores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages import DIRECTIONS, PhaseDecision
from trainer_node.basis import Basis


@dataclass(frozen=True, slots=True)
class AppliedDelta:
    norm: float  # L2 over all weights
    sample_Gm: Tensor  # sampled delta
    weights_Gm: Tensor  # sampled weights right after it


def coefficients_of(decision: PhaseDecision) -> Tensor:
    """(G, K) float32."""
    return torch.tensor(decision.coefficients, dtype=torch.float32).view(
        decision.num_groups, decision.num_directions
    )


@torch.no_grad()
def apply_delta(basis: Basis, coefficients_GK: Tensor) -> AppliedDelta:
    """Move the weights; the averages move along, so that a jump is not taken for drift."""
    with_momentum = bool(coefficients_GK[:, DIRECTIONS.index("momentum")].any())
    rows = coefficients_GK.tolist()
    square = torch.zeros((), dtype=torch.float32, device=basis.parameters[0].device)
    sample_Gm = basis.empty_sample()
    for index, directions in basis.directions(with_momentum=with_momentum):
        parameter, row = basis.parameters[index], rows[basis.group_of[index]]
        if not any(row):
            continue  # not even a zero is added: it would make +0.0 of a weight that is -0.0
        delta = torch.zeros_like(parameter)
        for coefficient, direction in zip(row, directions, strict=True):
            if coefficient != 0.0:
                delta.add_(direction, alpha=coefficient)
        parameter.add_(delta)
        basis.averages.shift(index, delta)
        basis.sample_into(sample_Gm, index, delta)
        square += delta.float().square().sum()
    return AppliedDelta(
        norm=float(square.sqrt()), sample_Gm=sample_Gm, weights_Gm=basis.sampled(basis.parameters)
    )
