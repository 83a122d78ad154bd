"""What a trial of controls was worth: reward.py's form, but for steps that take another time.

time     = probation steps * seconds of one of them / seconds of an ordinary step        ordinary steps
expected = max(slope without it, what the judge's forecast falls a step) * time          nats
gained   = (loss_before - loss_end - expected) / slope                                   ordinary steps
seen     = gained / time                         share of progress per second, costs aside: for people
reward   = tanh((gained - cost) / time)          accepted
         = -1                                    refused or ruined
         = None                                  anything else, or not measured

Beside a twin (rate, batch) nothing is forecast: loss_forecast is that of the run without the change after as
much time, so seen = (loss_forecast - loss_end) / (loss_before - loss_forecast), where that fall is at least
what a guard loss shakes by. The steps that the twin lost are the price of knowing, not part of the worth.
"""

from __future__ import annotations

import math
from dataclasses import replace

from common.messages import Outcome, Verdict
from predictor_node.reward import TINY_SLOPE_SHARE, UNDONE, cost_steps

MOST_SEEN = 9.99


def worth_of(
    outcome: Outcome,
    *,
    slope_nats: float,
    step_seconds: float,
    ordinary_seconds: float = math.nan,
    batch_change: float = 1.0,
) -> tuple[float, float | None]:
    """(seen, reward); seen is NaN where nothing was measured.

    slope_nats    what an ordinary step without the change is expected to bring, positive = the loss falls
    step_seconds  of the trial's steps, in the unit of the outcome; NaN = as an ordinary one
    ordinary_seconds  of an ordinary step; NaN = what the outcome says, which is a median over the last 64
                  steps: for so long after a kept change of the batch it is of two kinds of steps
    batch_change  items of such a step over those of an ordinary one
    """
    if ordinary_seconds > 0.0:
        outcome = replace(outcome, full_step_seconds=ordinary_seconds)
    seen, cost_share = _seen(outcome, slope_nats, step_seconds, batch_change)
    if outcome.verdict in (Verdict.REFUSED, Verdict.RUINED):
        return seen, UNDONE
    if outcome.verdict is not Verdict.ACCEPTED or not math.isfinite(seen - cost_share):
        return seen, None
    return seen, math.tanh(seen - cost_share)


def worth_beside_twin(outcome: Outcome, *, ordinary_seconds: float = math.nan) -> tuple[float, float | None]:
    """(seen, reward) of a trial of another rate or batch; seen is NaN where nothing was measured."""
    if ordinary_seconds > 0.0:
        outcome = replace(outcome, full_step_seconds=ordinary_seconds)
    gained_nats = outcome.loss_forecast - outcome.loss_end
    shake_nats = outcome.loss_spread if math.isfinite(outcome.loss_spread) else 0.0
    floor_nats = max(shake_nats, TINY_SLOPE_SHARE * abs(outcome.loss_forecast))
    fall_nats = max(outcome.loss_before - outcome.loss_forecast, floor_nats)
    seen = gained_nats / fall_nats if fall_nats > 0.0 else math.nan
    seen = max(-MOST_SEEN, min(MOST_SEEN, seen)) if math.isfinite(seen) else math.nan
    if outcome.verdict in (Verdict.REFUSED, Verdict.RUINED):
        return seen, UNDONE
    steps = cost_steps(replace(outcome, lost_seconds=0.0))
    if (
        outcome.verdict is not Verdict.ACCEPTED
        or not outcome.probation_steps
        or not math.isfinite(seen - steps)
    ):
        return seen, None
    return seen, math.tanh(seen - steps / outcome.probation_steps)


def _seen(
    outcome: Outcome, slope_nats: float, step_seconds: float, batch_change: float
) -> tuple[float, float]:
    """(seen, costs over the time of the trial)."""
    steps, full = outcome.probation_steps, outcome.full_step_seconds
    if not steps or not full > 0.0:
        return math.nan, math.nan
    time_steps = steps * (step_seconds / full if step_seconds > 0.0 else 1.0)
    forecast_steps = steps * batch_change
    forecast_nats = (outcome.loss_before - outcome.loss_forecast) / forecast_steps
    floor = max(
        outcome.loss_spread / forecast_steps if math.isfinite(outcome.loss_spread) else 0.0,
        TINY_SLOPE_SHARE * abs(outcome.loss_forecast) / forecast_steps,
    )
    progress_nats = outcome.loss_before - outcome.loss_end
    if not all(map(math.isfinite, (forecast_nats, progress_nats, slope_nats, floor))) or time_steps <= 0.0:
        return math.nan, math.nan
    expected = max(0.0, slope_nats, forecast_nats)
    slope = max(slope_nats, floor)
    if slope <= 0.0:
        return 0.0, cost_steps(outcome) / time_steps
    seen = (progress_nats - expected * time_steps) / slope / time_steps
    return max(-MOST_SEEN, min(MOST_SEEN, seen)), cost_steps(outcome) / time_steps
