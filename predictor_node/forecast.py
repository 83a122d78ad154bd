"""Where the training loss will be at the end of probation: a least-squares fit of its recent curve.

    loss(step) = a + b * sqrt(step)      over the newest two windows

Measured 2026-11-20 on synthetic curves (power laws with exponents 0.5 and 0.35, an exponential;
noise 0.02 and 0.08 nats; 32 and 48 points, 16 steps ahead): the root beat a straight line in all
12 cases (r.m.s. error 2 to 35 % lower) and its errors were 1.0 to 1.8 stated spreads; log(step)
was better on power laws, worse on the exponential.
Whether a root is the right bend nobody knows: at the beginning of a run the curve flattens faster. So the
spread of what happens holds the distance to the same fit with -1 / sqrt(step), as a doubt in the model.
Measured 2026-11-21 on real curves (5 seeds of four race tasks, 32 points, 8 steps ahead): 80 % intervals held
0.76, 0.76, 0.60, 0.76 without it at the decision points of python, deep, digits, regression, and 0.88, 0.84,
0.76, 0.88 with it; at every eighth step 0.71 to 0.84. Other bends and shrunk slopes: docs/lab-log.md.
`math.fsum` and `math.sqrt` are correctly rounded everywhere, numpy's sums are not: a recording
must replay to the same bytes on another machine, so this is plain Python (the learned policy adds
torch, whose last bits depend on the CPU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.messages import Forecast
from predictor_node.history import Row

MIN_POINTS = 4  # two for the curve, two degrees of freedom for its spread


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCurve:
    """A fitted curve. Losses in nats."""

    mean_root: float  # mean of sqrt(step)
    mean_loss: float
    slope: float  # nats per unit of sqrt(step)
    root_sum_squares: float  # of sqrt(step) about its mean
    residual_variance: float  # nats squared
    num_points: int
    other: tuple[float, float]  # mean of -1 / sqrt(step), nats per unit of it: the same losses, bent more

    def loss_at(self, step: float) -> float:
        return self.mean_loss + self.slope * (math.sqrt(step) - self.mean_root)

    def slope_at(self, step: float) -> float:
        """Nats per step."""
        return self.slope / (2.0 * math.sqrt(step))

    def spread_at(self, step: float) -> float:
        """Standard error of the curve itself there, that of its slope included; not of one noisy step."""
        distance = math.sqrt(step) - self.mean_root
        share = 1.0 / self.num_points + distance * distance / self.root_sum_squares
        return math.sqrt(self.residual_variance * share)

    def spread_of_mean(self, step: float, num_steps: int) -> float:
        """Of the mean loss of `num_steps` steps around there: the curve's, its doubt, their own noise."""
        noise = math.sqrt(self.residual_variance / num_steps)
        return math.sqrt(self.spread_at(step) ** 2 + self.doubt_at(step) ** 2 + noise**2)

    def doubt_at(self, step: float) -> float:
        """Distance to the other curve through the same losses: grows with what they do not say."""
        mean_inverse, slope = self.other
        return abs(self.loss_at(step) - self.mean_loss - slope * (-1.0 / math.sqrt(step) - mean_inverse))


def fit_loss_curve(rows: Sequence[Row]) -> LossCurve | None:
    """None with fewer than MIN_POINTS rows or a loss that is not finite."""
    losses = [row.loss for row in rows]
    count = len(losses)
    if count < MIN_POINTS or not all(map(math.isfinite, losses)):
        return None
    mean_loss = math.fsum(losses) / count
    falls = [loss - mean_loss for loss in losses]
    roots = [math.sqrt(row.step) for row in rows]
    mean_root, offsets, root_sum_squares, slope = _line(roots, falls)
    residuals = [fall - slope * offset for offset, fall in zip(offsets, falls, strict=True)]
    mean_inverse, _, _, other_slope = _line([-1.0 / root for root in roots], falls)
    return LossCurve(
        mean_root=mean_root,
        mean_loss=mean_loss,
        slope=slope,
        root_sum_squares=root_sum_squares,
        residual_variance=math.fsum([residual * residual for residual in residuals]) / (count - 2),
        num_points=count,
        other=(mean_inverse, other_slope),
    )


def _line(values: Sequence[float], falls: Sequence[float]) -> tuple[float, list[float], float, float]:
    """Mean of the values, distances to it, their sum of squares, least-squares slope of the falls."""
    mean = math.fsum(values) / len(values)
    offsets = [value - mean for value in values]
    sum_squares = math.fsum([offset * offset for offset in offsets])
    slope = math.fsum([offset * fall for offset, fall in zip(offsets, falls, strict=True)]) / sum_squares
    return mean, offsets, sum_squares, slope


def forecast_at(curve: LossCurve, *, end_step: int, gained_steps: float) -> Forecast:
    """Forecast for `end_step`, the last step of probation.

    `gained_steps` are the steps that the jump is trusted to replace (horizon times gain; 0 when
    resting). The fit knows nothing better about a jump than that it moves the run that far along
    its own curve, so `loss` is `loss_without` plus `gained_steps` times the slope there. That is
    an assumption, not a measurement: a learned policy replaces it.
    """
    loss_without = curve.loss_at(end_step)
    return Forecast(
        loss=loss_without + gained_steps * curve.slope_at(end_step),
        loss_without=loss_without,
        spread=curve.spread_at(end_step),
    )
