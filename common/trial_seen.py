"""What became of a trial of controls, for people: pure, and one answer for page and predictor.

    with     loss before - loss at the end of the trial
    without  loss before - loss at the end of the run without it, after as much time (several ranks: data)
    seen     with / without - 1: a share of progress per second, give or take what a guard loss shakes by

Losses are the trainer's, on the guard batches (trainer_node/control_twin.py; loss_forecast is that of the run
without the change). Decides nothing: what a predictor learns from a trial is its own business
(predictor_node/control_reward.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from common.control_rules import is_beside_twin
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


def seen_of(outcome: Outcome, *, before: Controls, after: Controls) -> Seen | None:
    """None where the losses do not say.

    They do not where more than rate and batch changes (losses of other contexts do not compare), where
    nothing was measured, and where the fall without the change is within two of its deviations: a share of
    it would be a share of noise (digits runs: +882 ± 871 %; a fall forecast of 0.000 ± 0.022 nats).
    """
    if not is_beside_twin(after, before):
        return None
    fall, fall_without = outcome.loss_before - outcome.loss_end, outcome.loss_before - outcome.loss_forecast
    spread = outcome.loss_spread
    if not all(map(math.isfinite, (fall, fall_without, spread))):
        return None
    if fall_without <= max(0.0, TOLD_SPREADS * spread):
        return None
    ratio = fall / fall_without
    seen = Seen(ratio - 1.0, abs(ratio * spread / fall_without))
    return seen if all(map(math.isfinite, seen)) else None


def share_words(seen: Seen) -> str:
    """ "+10 ± 6 %"."""
    most = _MOST_PERCENT / 100.0
    share, spread = (100.0 * max(-most, min(most, part)) for part in seen)
    return f"{share:+.0f} ± {spread:.0f} %".replace("-", "\N{MINUS SIGN}")


def seen_words(seen: Seen | None, outcome: Outcome, *, beside_twin: bool = True) -> str:
    """ "+10 ± 6 % seen", else how far the loss was from that of the run without it; "" if nobody looked."""
    if seen is not None:
        return f"{share_words(seen)} seen"
    excess_nats = outcome.loss_end - outcome.loss_forecast
    if not (math.isfinite(excess_nats) and math.isfinite(outcome.loss_spread)):
        is_ruin = beside_twin and math.isfinite(outcome.loss_end - outcome.loss_before)
        return f"loss {outcome.loss_end:.3g} half-way, {outcome.loss_before:.3g} before" if is_ruin else ""
    side = "above" if excess_nats > 0.0 else "below"
    other = "the run" if beside_twin else "the forecast"
    return f"loss {abs(excess_nats):.2g} ± {outcome.loss_spread:.2g} {side} {other} without it"
