"""What the newest steps say about the run: its trend, its noise, and whether it is being ruined. Pure.

A rate that is far too high shows in five ways, and only in the early steps in a sixth:

    not finite   a loss that is no number
    beyond       the loss has left its best by a quarter of all that was gained, or a tenth of the level,
                 and by what noise makes of the best of many, and is not on its way back
    rising       a slope that is significantly positive, and a rise that matters; where every gradient is
                 clipped, less significance is enough
    exploded     the loss was far above its first one, and has gained nothing since: the weights are dead, and
                 a loss that stands still at chance tells nothing else
    stuck        early, when a healthy run falls fast: no fall to be told from noise, and the loss is still
                 near its first one. A rate that is too low also falls slowly, but with little noise, so its
                 slope is significant; a run that has gained its tenth falls unseen under the noise of its
                 batches (512 tokens: 64 flat steps at 4.1 after 5.5). A rate that was lowered and still shows
                 no progress is not cured by lowering it: then it is no sign (digits went down to rate_low)

A clip share of 1 alone is no sign: many sound language-model runs clip every step for hundreds of steps.
Thresholds are guesses that stand beside those of trainer_node/spikes.py. Proposes nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from common import features
from predictor_node.history import Row

LEVEL_STEPS, TREND_STEPS = 8, 64
MIN_TREND_STEPS, MIN_STUCK_STEPS = 8, 48
BEYOND_GAINED, BEYOND_LEVEL = 0.25, 0.1
SURE_RISE, SURE_RISE_CLIPPED = 4.0, 2.0  # slopes in deviations; losses in a row are not independent
BEST_OF_MANY = 4.0  # deviations that the best single loss may lie below the level of its time
RISE_SHARE = 0.1  # of what was gained so far: a rise below that is none to act on
EARLY_SHARE, EARLY_STEPS = 0.2, 512.0  # of the run, and at most
STUCK_GAIN = 0.1  # of the first loss: a run that gained as much is not stuck
EXPLODED = 0.5  # of the first loss above it: 3.5 and 100 of it at 30 times the best rate (docs/lab-log.md)
PLAIN_FALL = 3.0  # deviations: at a point in forty noise alone shows two
SURE_FALL = 2.0  # deviations that a fall may be faster than its fit
MIN_NOISE_ROWS = 4

_FIRST, _BEST = features.INDEX["loss_over_first"], features.INDEX["loss_over_best"]
_CLIPPED, _HAS_NOISE = features.INDEX["clipped_share_64"], features.INDEX["has_noise_scale"]
_NOISE, _BATCH = features.INDEX["log10_noise_scale_over_batch"], features.INDEX["log2_batch_factor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Losses in nats. NaN where nothing is known."""

    num_steps: int  # since the controls changed, at most TREND_STEPS
    is_finite: bool
    level: float  # mean of the newest LEVEL_STEPS finite losses
    first: float
    best: float
    peak: float  # of the same steps as the slope
    late_significance: float  # of the slope of the newer half of them: a leap early on does not hide a fall
    slope: float  # per step, over `num_steps`; positive = rising
    significance: float  # slope in its own deviations
    noise: float  # deviation of a single loss, from successive differences
    clipped_share: float
    noise_scale: float  # in configured batches (McCandlish et al. 2018, B_simple)


def evidence_of(rows: Sequence[Row], *, since_step: int) -> Evidence:
    """`rows` oldest first, without a hole, not empty; the trend is that of the steps after `since_step`."""
    newest = [row for row in rows[-TREND_STEPS:] if row.step > since_step]
    losses = [row.loss for row in newest]
    finite = [row.loss for row in rows[-LEVEL_STEPS:] if math.isfinite(row.loss)]
    known = [loss for loss in losses if math.isfinite(loss)]
    slope, significance = trend_of(known)
    last = rows[-1]
    seen = [row.loss for row in rows if math.isfinite(row.loss)]
    return Evidence(
        num_steps=len(newest),
        is_finite=all(math.isfinite(row.loss) for row in rows[-2:]),
        level=math.fsum(finite) / len(finite) if finite else math.nan,
        first=_base(last, _FIRST, max(seen, default=math.nan)),
        best=min(_base(last, _BEST, math.inf), min(seen, default=math.nan)),
        peak=max(known, default=math.nan),
        late_significance=trend_of(known[len(known) // 2 :])[1],
        slope=slope,
        significance=significance,
        noise=_noise(seen[-TREND_STEPS:]),
        clipped_share=last.features[_CLIPPED],
        noise_scale=_noise_scale(newest),
    )


def ruin_words(evidence: Evidence, *, is_early: bool, is_lowered: bool = False) -> str:
    """Why the run looks ruined, or "". `is_lowered`: the rate, by the newest change or below its schedule."""
    if not evidence.is_finite:
        return "the loss is not finite"
    if evidence.num_steps < MIN_TREND_STEPS:
        return ""
    gained = max(0.0, evidence.first - evidence.best)
    beyond = evidence.level - evidence.best
    is_falling = evidence.significance < -2.0
    allowed = max(BEYOND_GAINED * gained, BEYOND_LEVEL * abs(evidence.best)) + BEST_OF_MANY * evidence.noise
    if beyond > allowed and not is_falling:
        return f"the loss is {beyond:.3g} above its best"
    rise = evidence.slope * evidence.num_steps
    sure = SURE_RISE_CLIPPED if evidence.clipped_share >= 1.0 else SURE_RISE
    if evidence.significance > sure and rise > RISE_SHARE * gained:
        clipped = ", every gradient is clipped" if evidence.clipped_share >= 1.0 else ""
        return f"the loss rises, {rise:.2g} in {evidence.num_steps} steps{clipped}"
    if _has_exploded(evidence):
        return f"the loss exploded ({evidence.peak:.3g} after {evidence.first:.3g}) and gained nothing since"
    if is_early and not is_lowered and _is_stuck(evidence):
        return f"no progress in {evidence.num_steps} early steps"
    return ""


def has_learned(evidence: Evidence) -> bool:
    """Whether the loss has left its first one by STUCK_GAIN of it. False where either is not known."""
    return evidence.first - evidence.level >= STUCK_GAIN * abs(evidence.first)


def _has_exploded(evidence: Evidence) -> bool:
    is_far = evidence.peak - evidence.first > max(
        EXPLODED * abs(evidence.first), BEST_OF_MANY * evidence.noise
    )
    return is_far and not has_learned(evidence) and evidence.late_significance > -PLAIN_FALL


def _is_stuck(evidence: Evidence) -> bool:
    return (
        not has_learned(evidence) and evidence.num_steps >= MIN_STUCK_STEPS and evidence.significance > -1.0
    )


def fastest_fall(rows: Sequence[Row], *, since_step: int) -> float:
    """Nats per step that the loss may be falling by, SURE_FALL deviations included, >= 0; inf: not known.

    Of all the rows behind `since_step`. Where the fall slows down, as it does, later steps bring less.
    """
    losses = [row.loss for row in rows if row.step > since_step]
    if len(losses) < MIN_TREND_STEPS or not all(map(math.isfinite, losses)):
        return math.inf
    slope, deviation = _line(losses)
    return SURE_FALL * deviation - min(0.0, slope)  # a rise promises nothing: it is noise, or worse


def trend_of(losses: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope per step, and the same in its own deviations; (0, 0) for too few losses."""
    if len(losses) < MIN_TREND_STEPS:
        return 0.0, 0.0
    slope, deviation = _line(losses)
    if deviation == 0.0:
        return slope, math.copysign(math.inf, slope) if slope else 0.0
    return slope, slope / deviation


def _line(losses: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope per step and its standard error, for losses of three steps or more."""
    count = len(losses)
    middle, mean = (count - 1) / 2, math.fsum(losses) / count
    squares = count * (count * count - 1) / 12
    slope = math.fsum((x - middle) * (loss - mean) for x, loss in enumerate(losses)) / squares
    residual = math.fsum((loss - mean - slope * (x - middle)) ** 2 for x, loss in enumerate(losses))
    return slope, math.sqrt(residual / (count - 2) / squares)


def is_early(clock: float, total_steps: int) -> bool:
    return clock < min(EARLY_SHARE * total_steps, EARLY_STEPS)


def _base(row: Row, index: int, unknown: float) -> float:
    """The loss that a ratio is over."""
    ratio = row.features[index]
    base = row.loss / ratio if ratio > 0.0 else unknown
    return base if math.isfinite(base) else unknown


def _noise(losses: Sequence[float]) -> float:
    """The median keeps a leap from passing for noise; 0.6745 makes it a deviation for normal noise."""
    changes = [abs(later - earlier) for earlier, later in itertools.pairwise(losses)]
    return statistics.median(changes) / (0.6745 * math.sqrt(2.0)) if changes else 0.0


def _noise_scale(rows: Sequence[Row]) -> float:
    """Geometric mean: single estimates scatter by factors."""
    logs = [
        row.features[_NOISE] + row.features[_BATCH] * math.log10(2.0)
        for row in rows
        if row.features[_HAS_NOISE] > 0.0 and math.isfinite(row.features[_NOISE])
    ]
    return 10.0 ** (math.fsum(logs) / len(logs)) if len(logs) >= MIN_NOISE_ROWS else math.nan
