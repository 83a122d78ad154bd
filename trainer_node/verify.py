"""The two-stage verdict on a jump: pure arithmetic on losses.

Stage 1, at once: non-finite or beyond the ruin bound means restore. The bound is wide on purpose:
on a small CNN a strict check right after the jump would have refused 27 of 32 jumps that turned out
useful (DESIGN.md, Verdict in two stages).
Stage 2, after probation: the loss on the same held-back batches against a forecast of the run
without the jump, which is a straight line through the recent training losses (ordinary least
squares; Draper & Smith, Applied Regression Analysis, eq. 1.4.7 for the spread).
Knows no weights and no phases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.messages import Verdict

MIN_FIT_POINTS = 8


@dataclass(frozen=True, slots=True)
class NoJumpForecast:
    change: float  # nats: expected change of the loss over the horizon without the jump
    spread: float  # nats: one standard deviation of that change


def forecast_without_jump(losses: Sequence[float], *, horizon_steps: int) -> NoJumpForecast:
    """Line through the losses of successive real steps, read `horizon_steps` beyond the last one.

    With fewer than MIN_FIT_POINTS finite losses the change is 0 and the spread infinite: everything
    that is not a ruin would pass, so callers do not jump that early.
    """
    values = [loss for loss in losses if math.isfinite(loss)]
    n = len(values)
    if n < MIN_FIT_POINTS:
        return NoJumpForecast(change=0.0, spread=math.inf)
    mean_x, mean_y = (n - 1) / 2, math.fsum(values) / n
    square_x = math.fsum((x - mean_x) ** 2 for x in range(n))
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in enumerate(values)) / square_x
    residual = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in enumerate(values))
    slope_deviation = math.sqrt(residual / (n - 2) / square_x)
    return NoJumpForecast(change=slope * horizon_steps, spread=slope_deviation * horizon_steps)


def ruin_bound(*, loss_before: float, first_loss: float, ruin_share: float, noise: float) -> float:
    """Loss above which a jump is undone at once.

    `ruin_share` of the way back from the present loss to the run's first one, and never closer than
    six standard deviations of the training loss (`noise`), so that noise alone is no ruin.
    """
    return loss_before + max(ruin_share * max(0.0, first_loss - loss_before), 6.0 * noise)


def is_ruin(loss_after: float, *, bound: float) -> bool:
    return not math.isfinite(loss_after) or loss_after > bound


def judge(*, loss_before: float, loss_end: float, forecast: NoJumpForecast, tolerance: float) -> Verdict:
    """ACCEPTED if the loss after probation is no worse than the forecast by `tolerance` spreads."""
    if not math.isfinite(loss_end):
        return Verdict.REFUSED
    limit = loss_before + forecast.change + tolerance * forecast.spread
    return Verdict.ACCEPTED if loss_end <= limit else Verdict.REFUSED
