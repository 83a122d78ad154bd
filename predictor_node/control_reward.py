"""What a trial of another rate or batch was worth, beside the real run without it (control_twin.py).

seen     = (loss_forecast - loss_end) / fall           share of progress per second, costs aside
fall     = loss_before - loss_forecast                 nats, at least what a guard loss shakes by
reward   = tanh(seen - cost / probation steps)         accepted
         = -1                                          refused or ruined
         = None                                        anything else, or not measured

loss_forecast is that of the run without the change after as much time: nothing is forecast. The cost is of
snapshots and checks; the steps that the twin lost are the price of knowing, not part of the worth.
"""

from __future__ import annotations

import math
from dataclasses import replace

from common.messages import Outcome, Verdict
from predictor_node.reward import TINY_SLOPE_SHARE, UNDONE, cost_steps

MOST_SEEN = 9.99


def worth_of(outcome: Outcome, *, ordinary_seconds: float = math.nan) -> tuple[float, float | None]:
    """(seen, reward); seen is NaN where nothing was measured.

    ordinary_seconds: of a step with the controls of before; NaN = what the outcome says, which is a median
    over the last 64 steps: for so long after a kept change of the batch it is of two kinds of steps.
    """
    if ordinary_seconds > 0.0:
        outcome = replace(outcome, full_step_seconds=ordinary_seconds)
    shake_nats = outcome.loss_spread if math.isfinite(outcome.loss_spread) else 0.0
    floor_nats = max(shake_nats, TINY_SLOPE_SHARE * abs(outcome.loss_forecast))
    fall_nats = max(outcome.loss_before - outcome.loss_forecast, floor_nats)
    seen = (outcome.loss_forecast - outcome.loss_end) / fall_nats if fall_nats > 0.0 else math.nan
    seen = max(-MOST_SEEN, min(MOST_SEEN, seen)) if math.isfinite(seen) else math.nan
    if outcome.verdict in (Verdict.REFUSED, Verdict.RUINED):
        return seen, UNDONE
    if outcome.verdict is not Verdict.ACCEPTED or not outcome.probation_steps:
        return seen, None
    net = seen - cost_steps(replace(outcome, lost_seconds=0.0)) / outcome.probation_steps
    return seen, math.tanh(net) if math.isfinite(net) else None
