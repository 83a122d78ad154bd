"""From arms to deltas: the coefficients of every arm at one decision point, within the trust region.

The trust region bounds the norm of a delta, which the Gram matrices of the directions give exactly:
|delta_g|^2 = c_g' Gram_g c_g. A delta that is too long is shortened, not dropped. What a per-weight
forecaster will do is not a combination of directions; it limits itself (weight_forecast in the trainer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.messages import PhaseDecision
from predictor_node.arms import FORECASTER, HEAD, PULL_BACK, SLOW, Arm
from predictor_node.policy import DecisionInput
from predictor_node.tempers import Temper


@dataclass(frozen=True, slots=True)
class Imagined:
    """What the world model sees at the end of the probation."""

    change_by_jump: float  # nats: loss with the jump less loss without it
    spread: float  # nats: one standard deviation of that, by what the ensemble does not agree on
    refusal: float | None  # probability in [0, 1]; None while too little is known


class DeltaSource(Protocol):
    """What knows how the weights move; models.py."""

    def head_coefficients(self, point: DecisionInput, horizon_steps: int) -> np.ndarray:
        """(G, K); zero while nothing is known."""

    def forecaster(self, horizon_steps: int) -> bytes:
        """Weights of phi; empty while it explains nothing."""


@dataclass(slots=True)
class Proposal:
    arm: Arm
    coefficients_GK: np.ndarray
    relative_norm: float  # of the delta over that of the weights
    horizon_windows: float
    forecaster: bytes = b""
    imagined: Imagined | None = None

    def scale(self, factor: float, trust_norm: float) -> None:
        """Multiply the coefficients, within the trust region."""
        self.coefficients_GK = self.coefficients_GK * factor
        self.relative_norm *= factor
        _shorten(self, trust_norm)

    def coefficients(self) -> tuple[float, ...]:
        """(G*K) for the message."""
        return tuple(self.coefficients_GK.reshape(-1).tolist())

    def action(self) -> tuple[float, ...]:
        """See episodes.ACTION_NAMES."""
        return _action(self.coefficients_GK, self.horizon_windows, bool(self.forecaster), self.relative_norm)


def proposals_for(
    arms: Sequence[Arm],
    point: DecisionInput,
    source: DeltaSource,
    temper: Temper,
    limit_steps: int,
) -> list[Proposal]:
    """Every arm but rest that moves something here, in the order of the arms.

    Horizons above `limit_steps` are left out.
    """
    proposals = []
    for arm in arms:
        if arm.horizon_steps > limit_steps:
            continue
        proposal = _proposal(arm, point, source)
        if proposal is not None:
            _shorten(proposal, temper.trust_norm)
            proposals.append(proposal)
    return proposals


def _proposal(arm: Arm, point: DecisionInput, source: DeltaSource) -> Proposal | None:
    shape = (point.num_groups, len(point.directions))
    coefficients_GK, forecaster = np.zeros(shape), b""
    if arm.kind == HEAD:
        coefficients_GK = source.head_coefficients(point, arm.horizon_steps)
    elif arm.kind in (SLOW, PULL_BACK):
        direction = "slow_drift" if arm.kind == SLOW else "pull_back"
        if direction not in point.directions:
            return None
        coefficients_GK[:, point.directions.index(direction)] = arm.share * _per_window(arm, point)
    elif arm.kind == FORECASTER:
        forecaster = source.forecaster(arm.horizon_steps)
    else:
        return None
    norm = relative_norm(coefficients_GK, point)
    if not math.isfinite(norm) or (norm == 0.0 and not forecaster):
        return None
    return Proposal(arm, coefficients_GK, norm, arm.horizon_windows, forecaster)


def _per_window(arm: Arm, point: DecisionInput) -> float:
    """A drift that a stretched window made counts as one of the usual length."""
    if arm.kind != SLOW or not point.point.window_steps:
        return 1.0
    return arm.horizon_steps / arm.share / point.point.window_steps


def followed(decision: PhaseDecision, arm: Arm, point: DecisionInput) -> Proposal:
    """The proposal behind a decision that somebody else made (a recording)."""
    shape = (point.num_groups, len(point.directions))
    coefficients_GK = np.asarray(decision.coefficients, dtype=np.float64).reshape(shape)
    norm = relative_norm(coefficients_GK, point)
    return Proposal(arm, coefficients_GK, norm, arm.horizon_windows, decision.forecaster)


def relative_norm(coefficients_GK: np.ndarray, point: DecisionInput) -> float:
    """|delta| / |weights| over all groups."""
    num_groups, num_directions = coefficients_GK.shape
    gram_GKK = np.asarray(point.point.gram).reshape(num_groups, num_directions, num_directions)
    squares_G = np.einsum("gk,gkl,gl->g", coefficients_GK, gram_GKK, coefficients_GK)
    weights = math.sqrt(math.fsum(norm * norm for norm in point.point.parameter_norms))
    return math.sqrt(max(0.0, float(squares_G.sum()))) / weights if weights > 0.0 else 0.0


def _shorten(proposal: Proposal, trust_norm: float) -> None:
    if proposal.relative_norm > trust_norm:
        proposal.coefficients_GK = proposal.coefficients_GK * (trust_norm / proposal.relative_norm)
        proposal.relative_norm = trust_norm


def _action(
    coefficients_GK: np.ndarray, horizon_windows: float, is_forecaster: bool, relative_norm: float
) -> tuple[float, ...]:
    means = coefficients_GK.mean(axis=0).tolist()
    return (1.0, math.log1p(horizon_windows), *means, float(is_forecaster), relative_norm)
