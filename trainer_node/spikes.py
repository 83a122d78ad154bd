"""Whether the training loss has spiked: left its bounds and is not on its way back. Pure.

    bound = median + max(deviations x 1.4826 MAD, share x (first loss - median), a tenth of |median|)

over the steps before the newest ones; MAD is the median absolute deviation, which a spike hardly moves
(Leys et al. 2013; 1.4826 makes it a standard deviation for normal noise). A spike is `steps` losses in a row
above the bound of which the newer half has not come a quarter of the way back; or RECOVERY_STEPS in a row,
however they fall; or two that are not finite. The second term keeps the rule from firing on what a run does
anyway: early on, on hard documents in a row, after a kept jump. Says nothing about what to do: rollback.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from common.settings import SpikeSettings

CHECK_STEPS = 8  # between looks; as often as short steps are told (observer.py)
CLEAR_STEPS = 64  # past the last spike, the next one is no longer "in a row"
NON_FINITE_STEPS = 2  # one may pass: a batch can overflow in bf16 and leave the weights sound
MIN_USUAL_STEPS = 24  # below that a median and its deviation say little
LEVEL_SHARE = 0.1  # of the level: a loss that hardly moves has no deviation to measure by. Guess, untested
RECOVERY_STEPS = 24  # much longer, and the spike itself would tell what is usual
RECOVERED_SHARE = 0.25  # of the rise, from the older to the newer half of the spike. Guess, untested
_SIGMAS_PER_MAD = 1.4826


@dataclass(frozen=True, kw_only=True, slots=True)
class Spike:
    first_step: int  # the first step whose loss was out of bounds
    loss: float  # the newest, nats
    usual_loss: float  # median before; NaN if it is not known


def find_spike(
    losses: Sequence[float], *, last_step: int, first_loss: float, settings: SpikeSettings
) -> Spike | None:
    """`losses` of the newest steps in nats, oldest first, the last one of step `last_step`."""
    usual_loss, bound = _bound(losses[: -settings.steps], first_loss, settings)
    is_out = [loss > bound or not math.isfinite(loss) for loss in losses]
    run = next((back for back, out in enumerate(reversed(is_out)) if not out), len(is_out))
    is_lost = len(losses) >= NON_FINITE_STEPS and not any(map(math.isfinite, losses[-NON_FINITE_STEPS:]))
    is_high = bound < math.inf and run >= settings.steps
    is_stuck = is_high and (run >= RECOVERY_STEPS or not _recovers(losses[-settings.steps :], usual_loss))
    if not (is_lost or is_stuck):
        return None
    return Spike(first_step=last_step - run + 1, loss=losses[-1], usual_loss=usual_loss)


def is_in_bounds(losses: Sequence[float], *, first_loss: float, settings: SpikeSettings) -> bool:
    """Of the newest loss; the bound is that of `find_spike`."""
    bound = _bound(losses[: -settings.steps], first_loss, settings)[1]
    return math.isfinite(losses[-1]) and losses[-1] <= bound


def _bound(before: Sequence[float], first_loss: float, settings: SpikeSettings) -> tuple[float, float]:
    """(median, bound) of the finite losses; (NaN, inf) if they are too few to tell."""
    finite = [loss for loss in before if math.isfinite(loss)]
    if len(finite) < MIN_USUAL_STEPS or not math.isfinite(first_loss):
        return math.nan, math.inf
    usual = statistics.median(finite)
    deviation = _SIGMAS_PER_MAD * statistics.median([abs(loss - usual) for loss in finite])
    ground = settings.share * (first_loss - usual)
    rise = max(settings.deviations * deviation, ground, LEVEL_SHARE * abs(usual))
    return usual, usual + rise


def _recovers(newest: Sequence[float], usual_loss: float) -> bool:
    values = [loss if math.isfinite(loss) else math.inf for loss in newest]
    half = len(values) // 2
    older, newer = statistics.median(values[:half]), statistics.median(values[half:])
    return newer < math.inf and older - newer >= RECOVERED_SHARE * (older - usual_loss)
