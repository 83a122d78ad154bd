"""The simple gradient noise scale of a run: how large a batch must be before its gradient is mostly signal.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1: B_simple = tr(S) / |G|^2, where G is the gradient of
the expected loss and S the covariance of one example's gradient. The squared norm of a gradient over B
examples has the mean |G|^2 + tr(S) / B, so the norms at two batch sizes, here a part of a step's batch and
all of it, give unbiased estimates of both. Those of one step are mostly noise, and their ratio has no mean:
both are averaged over steps first, then divided. Pure; holds four numbers, which a restore sets back.

Batches are counted in configured batches: what was learned at one batch_factor holds at another. A step that
would be a single forward pass shows one batch size only: now and then such a step is taken in two halves
(`is_measured`): the same step up to rounding, but that dropout draws other masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AVERAGE_STEPS = 64  # span of the averages, as that of the longest window of featurize.py
# Of an estimate from so few steps the spread is about a quarter of what one step's is. Guess, untested.
KNOWN_AFTER_STEPS = 16
# One measurement stands for at most so many steps: an average is then one of 16 of them or more.
MOST_STEPS_OF_ONE = 4
# Two halves of a batch take 0.92 of its time where a pass is long (GPT `nano`, 16 x 128 tokens), and 1.55 of
# it where it is short (CNN, 32 images of 8 x 8; one core, 2026-11-22): every 32nd step in halves then costs
# 2 % of the time of passes. Until the scale is known, at step 128, it is every 8th.
EARLY_STEPS, EARLY_EVERY, LATER_EVERY = 128, 8, 32


def is_measured(step: int) -> bool:
    """Whether step number `step`, from 1, is taken in halves if it would be one forward pass.

    By the number alone, so that a run that was restored or resumed measures in the same steps.
    """
    return step % (EARLY_EVERY if step <= EARLY_STEPS else LATER_EVERY) == 0


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """Averages that began at zero, both in the same steps: their ratio needs no correction for that."""

    square_norm: float = 0.0  # of |G|^2
    noise: float = 0.0  # of tr(S), in configured batches times |G|^2's unit
    steps: int = 0  # that were measured, up to KNOWN_AFTER_STEPS
    waited_steps: int = 0  # since the newest of them, below MOST_STEPS_OF_ONE

    def over_batch(self, batch_factor: float) -> float | None:
        """B_simple in batches of `batch_factor` configured batches; None: it cannot be known.

        It cannot from too few steps, nor where the signal drowns: then the estimate of |G|^2 is not positive,
        nor where the noise does.
        """
        if self.steps < KNOWN_AFTER_STEPS or self.square_norm <= 0.0:
            return None
        ratio = self.noise / self.square_norm / batch_factor
        return ratio if 0.0 < ratio < math.inf else None


def estimates(small_norm: float, whole_norm: float, small_share: float) -> tuple[float, float]:
    """Unbiased (|G|^2, tr(S) in batches of this step) from L2 norms of mean gradients.

    `small_norm` is that of a part of the batch, `small_share` in (0, 1) how large a part it is.
    """
    small, whole = small_norm * small_norm, whole_norm * whole_norm
    square_norm = (whole - small_share * small) / (1.0 - small_share)
    noise = (small - whole) * small_share / (1.0 - small_share)
    return square_norm, noise


def with_step(
    scale: NoiseScale, *, small_norm: float, whole_norm: float, small_share: float, batch_factor: float
) -> NoiseScale:
    """After one more step; norms as those of `estimates`.

    Without a measured part (share NaN), or with a norm that is not finite, what was known stays known. After
    steps that were not measured one counts for several: averages go over steps, and not over measurements.
    """
    if not 0.0 < small_share < 1.0:
        return _after_waiting(scale)
    square_norm, noise = estimates(small_norm, whole_norm, small_share)
    noise *= batch_factor
    if not (math.isfinite(square_norm) and math.isfinite(noise)):
        return scale
    weight = 1.0 - (1.0 - 2.0 / (AVERAGE_STEPS + 1)) ** (1 + scale.waited_steps)
    return NoiseScale(
        square_norm=scale.square_norm + weight * (square_norm - scale.square_norm),
        noise=scale.noise + weight * (noise - scale.noise),
        steps=min(scale.steps + 1, KNOWN_AFTER_STEPS),
    )


def _after_waiting(scale: NoiseScale) -> NoiseScale:
    """After a step that was not measured."""
    if scale.steps == 0 or scale.waited_steps == MOST_STEPS_OF_ONE - 1:
        return scale
    return NoiseScale(scale.square_norm, scale.noise, scale.steps, scale.waited_steps + 1)
