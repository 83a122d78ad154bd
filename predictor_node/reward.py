"""What a jump was worth: the reward of an Outcome, and what it gained and cost in real steps.

    slope  = max(slope without the jump, loss_spread / probation_steps)        nats per step
    level  = min(loss_forecast, loss_before - probation_steps * slope without the jump)
    gained = (level - loss_end) / slope                                        steps
    cost   = (waiting + snapshot + jump + check + restore + lost seconds) / full_step_seconds
    reward = tanh((gained - cost) / cycle_steps)        accepted
           = -1                                         refused or ruined
           = None                                       anything else: nothing was tried to the end

To first order the argument of tanh is the progress per second of the whole cycle over that of a cycle
of FULL steps, minus 1: a cycle of C steps takes the time of C + cost and brings the progress of
C + gained. tanh is odd, so noise in the loss, which goes both ways, earns nothing.
The judge's forecast takes a trend that is not significant for none (trainer_node/verify.py), which is fair
to a jump on trial; for the reward it would book ordinary progress as the jump's, hence `level`. A slope
that is below the forecast's spread over the probation cannot be told from none; as a floor it keeps the
noise of `gained` within the probation's length. Nothing depends on the unit of the loss. In lockstep
seconds are forward-equivalents, and so is the rate.
"""

from __future__ import annotations

import math

from common.messages import Outcome, Verdict

UNDONE = -1.0  # refused or ruined
TINY_SLOPE_SHARE = 1e-6  # of the loss per cycle; a noiseless plateau has neither slope nor spread


def reward_of(outcome: Outcome, *, slope_nats: float, cycle_steps: int) -> float | None:
    """In [-1, 1], or None where the outcome says nothing about its arm.

    slope_nats   what a step without the jump is expected to bring, nats, positive = the loss falls
    cycle_steps  real steps of the window and the probation, > 0
    """
    if outcome.verdict in (Verdict.REFUSED, Verdict.RUINED):
        return UNDONE
    if outcome.verdict is not Verdict.ACCEPTED:
        return None
    net = gained_steps(outcome, slope_nats=slope_nats, cycle_steps=cycle_steps) - cost_steps(outcome)
    return math.tanh(net / cycle_steps) if math.isfinite(net) else None


def gained_steps(
    outcome: Outcome, *, slope_nats: float, cycle_steps: int, margin_spreads: float = 0.0
) -> float:
    """Real steps that an accepted jump replaced (negative = it set the run back); 0 for one that was undone.

    `margin_spreads` takes that many spreads of the forecast off: a lower bound. NaN when not measured.
    """
    if outcome.verdict is not Verdict.ACCEPTED:
        return 0.0
    progress_nats = outcome.probation_steps * max(0.0, slope_nats)
    level_nats = min(outcome.loss_forecast, outcome.loss_before - progress_nats)
    gain_nats = level_nats - outcome.loss_end
    if not math.isfinite(outcome.loss_before):
        return math.nan
    if not math.isfinite(gain_nats) or not math.isfinite(slope_nats) or math.isnan(outcome.loss_spread):
        return math.nan
    if math.isinf(outcome.loss_spread):
        return 0.0  # a forecast that knows nothing measures nothing
    slope = max(
        slope_nats,
        outcome.loss_spread / max(1, outcome.probation_steps),
        TINY_SLOPE_SHARE * abs(outcome.loss_forecast) / cycle_steps,
    )
    if slope <= 0.0:
        return 0.0  # the loss is exactly 0 and stays there
    return (gain_nats - margin_spreads * outcome.loss_spread) / slope


def cost_steps(outcome: Outcome) -> float:
    """All that the decision cost, undone steps included, in ordinary steps. NaN if theirs is not known."""
    if not outcome.full_step_seconds > 0.0:
        return math.nan
    seconds = math.fsum((
        outcome.waiting_seconds,
        outcome.snapshot_seconds,
        outcome.jump_seconds,
        outcome.check_seconds,
        outcome.restore_seconds,
        outcome.lost_seconds,
    ))  # fmt: skip
    return seconds / outcome.full_step_seconds
