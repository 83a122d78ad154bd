"""What became of a trial of controls, for people: pure, and one answer for page and predictor.

    with     (loss before - loss at the end) / (steps * seconds of a step with the change)
    without  (loss before - forecast) / (steps * batch change * seconds of a step with the controls of before)
    seen     with / without - 1, as a share; its uncertainty is one deviation of the forecast

Losses are the trainer's, on the guard batches. Its forecast is of the same data (trainer_node/jump.py), for
which a run without the change takes `batch change` times as many steps. Decides nothing: what a predictor
learns from a trial is its own business (predictor_node/control_reward.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from common.messages import Controls, Outcome, Verdict

TOLD_SPREADS = 2.0  # below that many deviations a fall is not told from none
_MOST_PERCENT = 999.0


class Seen(NamedTuple):
    share: float  # of progress per second: +0.1 = a tenth faster
    spread: float  # one standard deviation, >= 0


def is_kept(outcome: Outcome) -> bool:
    """Whether what was proposed stays. Without the guard a refused change does: nothing is undone."""
    is_undone = outcome.lost_steps > 0 or not outcome.probation_steps
    return outcome.verdict is Verdict.ACCEPTED or (outcome.verdict is Verdict.REFUSED and not is_undone)


def seen_of(
    outcome: Outcome,
    *,
    before: Controls,
    after: Controls,
    step_seconds: float,
    ordinary_seconds: float = math.nan,
) -> Seen | None:
    """None where the losses do not say.

    They do not where more than rate and batch changes (losses of other contexts do not compare), where
    nothing was measured, and where the fall without the change is within two of its deviations: a share of
    it would be a share of noise (digits runs: +882 ± 871 %; a fall forecast of 0.000 ± 0.022 nats).

    step_seconds: geometric mean of the steps of the trial, in the unit of the outcome's seconds.
    ordinary_seconds: the same of steps with the controls of before; NaN = what the outcome says, which is a
    median over the last 64 steps: for so long after a kept change of the batch it is of two kinds of steps.
    """
    alike = replace(before, rate_factor=after.rate_factor, batch_factor=after.batch_factor)
    if alike != after or not before.batch_factor > 0.0:
        return None
    fall, fall_without = outcome.loss_before - outcome.loss_end, outcome.loss_before - outcome.loss_forecast
    spread = outcome.loss_spread
    if not ordinary_seconds > 0.0:
        ordinary_seconds = outcome.full_step_seconds
    is_measured = all(map(math.isfinite, (fall, fall_without, spread, step_seconds, ordinary_seconds)))
    if not is_measured or min(step_seconds, ordinary_seconds) <= 0.0:
        return None
    if fall_without <= max(0.0, TOLD_SPREADS * spread):
        return None
    faster = after.batch_factor / before.batch_factor * (ordinary_seconds / step_seconds)
    ratio = fall / fall_without * faster
    seen = Seen(ratio - 1.0, abs(ratio * spread / fall_without))
    return seen if all(map(math.isfinite, seen)) else None


def share_words(seen: Seen) -> str:
    """ "+10 ± 6 %"."""
    most = _MOST_PERCENT / 100.0
    share, spread = (100.0 * max(-most, min(most, part)) for part in seen)
    return f"{share:+.0f} ± {spread:.0f} %".replace("-", "\N{MINUS SIGN}")


def seen_words(seen: Seen | None, outcome: Outcome) -> str:
    """ "+10 ± 6 % seen", else how far the judge found the loss from its forecast; "" if it did not look."""
    if seen is not None:
        return f"{share_words(seen)} seen"
    excess_nats = outcome.loss_end - outcome.loss_forecast
    if not (math.isfinite(excess_nats) and math.isfinite(outcome.loss_spread)):
        return ""
    side = "above" if excess_nats > 0.0 else "below"
    return f"loss {abs(excess_nats):.2g} ± {outcome.loss_spread:.2g} {side} the forecast without it"
