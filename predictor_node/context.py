"""What the bandit knows when it chooses: a short vector that describes the run here and now.

All entries lie within about [-1, 1], whatever the unit of the loss, so that one ridge suits all of them and
a bandit can be carried over to another run. The first is the constant 1.
"""

from __future__ import annotations

import math

import numpy as np

from common import features
from predictor_node.forecast import LossCurve
from predictor_node.policy import DecisionInput

NUM_LATENT = 4  # numbers of the world model's latent that are part of the context

NAMES = (
    "one", "progress", "rate_over_peak", "decay_progress", "slope_over_noise", "slope_share", "unexplained",
    "drift_and_slow_cosine", "pull_back_over_drift", "drift_over_weights", "accepted_share", "has_jump",
    "forecaster_explains", *(f"latent_{n}" for n in range(NUM_LATENT)),
)  # fmt: skip
DIMENSION = len(NAMES)


def context_of(
    point: DecisionInput,
    curve: LossCurve,
    *,
    probation_steps: int,
    forecaster_explains: float,
    latent: np.ndarray,
) -> tuple[float, ...]:
    """(DIMENSION,) finite numbers. `latent`: at least NUM_LATENT numbers of the world model."""
    feature = dict(zip(features.NAMES, point.observation.features, strict=True))
    step = point.observation.step
    slope_nats = -curve.slope_at(step) * probation_steps
    noise_nats = math.sqrt(curve.residual_variance)
    drift, pull, cosine, weights = _norms(point)
    values = (
        1.0,
        feature["progress"],
        feature["rate_over_peak"],
        feature["decay_progress"],
        _squashed(slope_nats, noise_nats),
        _squashed(slope_nats, 0.1 * abs(feature["loss_ema_16"])),
        float(np.mean(point.point.unexplained_share)) if point.point.unexplained_share else 1.0,
        cosine,
        _squashed(pull, drift),
        _squashed(drift, 0.01 * weights),
        feature["accepted_share_8"],
        feature["has_jump"],
        max(-1.0, min(1.0, forecaster_explains)),
        *(math.tanh(float(value)) for value in latent[:NUM_LATENT]),
    )
    return tuple(value if math.isfinite(value) else 0.0 for value in values)


def _norms(point: DecisionInput) -> tuple[float, float, float, float]:
    """Over all groups: |drift|, |pull-back|, cosine of drift and slow drift, |weights|."""
    num_directions = len(point.directions)
    gram_KK = np.asarray(point.point.gram).reshape(-1, num_directions, num_directions).sum(axis=0)
    index = {name: position for position, name in enumerate(point.directions)}
    drift, slow, pull = (index[name] for name in ("drift", "slow_drift", "pull_back"))
    norms = np.sqrt(np.maximum(np.diag(gram_KK), 0.0))
    product = float(norms[drift] * norms[slow])
    cosine = float(gram_KK[drift, slow]) / product if product > 0.0 else 0.0
    weights = math.sqrt(math.fsum(norm * norm for norm in point.point.parameter_norms))
    return float(norms[drift]), float(norms[pull]), cosine, weights


def _squashed(value: float, scale: float) -> float:
    """value / (|value| + scale): in (-1, 1), 0 for 0, half-way where both are equal."""
    total = abs(value) + abs(scale)
    return value / total if total > 0.0 else 0.0
