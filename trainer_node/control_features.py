"""The features that the choice of controls needs, from numbers that are at hand. Pure; measures nothing."""

from __future__ import annotations

import math

from trainer_node.window_statistics import TINY, ratio


def control_features(
    *,
    noise_scale: float | None,
    progress_per_second: float,
    average_distance: float | None,
    parameter_norm: float,
    factors: tuple[float, float, float],
) -> dict[str, float]:
    """common.features.CONTROLS by name; what is not known is 0.0 and its has_ feature too.

    `noise_scale` in batches of the step; `average_distance` L2 from weights to averages; None: unknown.
    `factors`: of the rate, of the batch, of the context, as they are in force.
    """
    rate_factor, batch_factor, context_share = factors
    return {
        "has_noise_scale": float(noise_scale is not None),
        "log10_noise_scale_over_batch": math.log10(noise_scale) if noise_scale is not None else 0.0,
        "progress_per_second": progress_per_second,
        "has_average": float(average_distance is not None),
        "distance_to_average_over_norm": ratio(average_distance or 0.0, parameter_norm),
        "log2_rate_factor": math.log2(max(rate_factor, TINY)),
        "log2_batch_factor": math.log2(max(batch_factor, TINY)),
        "context_share": context_share,
    }
