"""The two-stage verdict on a jump: pure arithmetic on losses.

Stage 1, at once: non-finite or beyond the ruin bound means restore. The bound is wide on purpose:
on a small CNN a strict check right after the jump would have refused 27 of 32 jumps that turned out
useful (DESIGN.md, Verdict in two stages).
Stage 2, after probation: the loss on the same held-back batches against a forecast of the run
without the jump. The anchor is the guard loss before the jump. The trend is a straight line through
the recent training losses (ordinary least squares; Draper & Smith, Applied Regression Analysis, eq.
1.4.7 for its deviation) joined with what the guard loss itself did over steps without a jump, and
shrunk towards none as far as noise could have made it (positive part, from two deviations on). The
spread is the guard loss' own. tests/trainer/test_judge.py holds the judge to its rates of error.
Knows no weights and no phases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from common.messages import Verdict

MIN_FIT_POINTS = 8
# Of what the run without it gained: by so much more another rate or batch must lower the loss. Less would
# hardly bring back the steps that the trial cost, and of two equal rates noise prefers one.
TWIN_GAIN_SHARE = 0.05
# The best rate of some early steps is above that of a whole run (digits, 1500 steps: four times the rate
# gained 1.2 and 2 spreads at step 80, and ended at twice the loss): what a trial gains must be beyond doubt.
PROOF_SPREADS = 2.0
# Before any guard loss was compared with another, its noise is taken for this share of the noise of a
# training loss. Measured 2026-11-21, one guard batch: 0.1 to 0.4 on a small GPT, where training batches
# differ more than weights do, about 2 on digits at a high rate.
GUARD_NOISE_SHARE = 0.3
CHANGES_KEPT = 8  # noise and slope fall as training goes on: old ones would mislead


@dataclass(frozen=True, slots=True)
class NoJumpForecast:
    change: float  # nats: expected change of the loss over the horizon without the jump
    spread: float  # nats: one standard deviation of that change


@dataclass
class GuardRecord:
    """How guard losses changed over steps without a jump. Knowledge: no restore sets it back."""

    changes: list[tuple[float, float]] = field(default_factory=list)  # nominal steps, nats; newest last
    step: float = -1  # nominal, of the newest guard loss of weights that are still in place; -1 = none
    loss: float = math.nan

    def copy(self) -> GuardRecord:
        return replace(self, changes=list(self.changes))

    def observe(self, step: float, loss: float, *, longest_steps: float) -> None:
        """A guard loss before a jump: since the last one only real steps were taken.

        Over more than `longest_steps` the curve bends more than it shakes, so nothing is learned.
        """
        taken_steps = step - self.step
        if self.step >= 0 and 0 < taken_steps <= longest_steps and math.isfinite(loss - self.loss):
            self.changes = [*self.changes[1 - CHANGES_KEPT :], (taken_steps, loss - self.loss)]
        self.move_to(step, loss)

    def move_to(self, step: float, loss: float) -> None:
        """A guard loss that is no sample of ordinary steps: after a kept jump."""
        self.step, self.loss = step, loss

    def forget_level(self) -> None:
        """The weights in place have no guard loss that was measured: the next one is no change of it."""
        self.move_to(-1, math.nan)

    def trend(self, loss_noise: float) -> tuple[float, float, float]:
        """(slope, its deviation, spread of a single change): nats per step, nats per step, nats.

        Least squares through the origin; a prior from `loss_noise` counts as one more residual. Without a
        change the slope is unknown: 0 with an infinite deviation.
        """
        prior = GUARD_NOISE_SHARE * loss_noise
        weight = math.fsum(steps * steps for steps, _ in self.changes)
        if not weight:
            return 0.0, math.inf, prior
        slope = math.fsum(steps * change for steps, change in self.changes) / weight
        squares = math.fsum((change - slope * steps) ** 2 for steps, change in self.changes)
        spread = math.sqrt((prior * prior + squares) / len(self.changes))  # one residual for the slope
        return slope, spread / math.sqrt(weight), spread


def line_forecast(losses: Sequence[float], *, horizon_steps: float) -> NoJumpForecast:
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


def forecast_without_jump(
    losses: Sequence[float],
    *,
    horizon_steps: float,
    guard: GuardRecord,
    loss_noise: float,
    guard_horizon_steps: float | None = None,
) -> NoJumpForecast:
    """How the guard loss would change over `horizon_steps` steps as those of `losses`.

    These are `guard_horizon_steps` in the steps of the guard's record; None: as many.

    Two windows of training losses say little of the trend (over 16 steps of a small GPT the line was off
    by 0.12 nats where no trend at all was off by 0.08), so the changes of the guard loss itself are joined to
    it by inverse variances, and what is left counts only as far as it is significant:
    change = trend * w with w = max(0, 1 - (2 deviation / trend)^2), spread^2 = guard^2 + w deviation^2.
    """
    line = line_forecast(losses, horizon_steps=horizon_steps)
    if not math.isfinite(line.spread):
        return line
    slope, slope_deviation, guard_spread = guard.trend(loss_noise)
    guard_steps = horizon_steps if guard_horizon_steps is None else guard_horizon_steps
    change, deviation = _joined(line.change, line.spread, slope * guard_steps, slope_deviation * guard_steps)
    ratio = deviation / abs(change) if change else math.inf
    share = max(0.0, 1.0 - (2.0 * ratio) ** 2)
    return NoJumpForecast(
        change=share * change, spread=math.hypot(guard_spread, math.sqrt(share) * deviation)
    )


def _joined(
    first: float, first_deviation: float, second: float, second_deviation: float
) -> tuple[float, float]:
    """Two estimates of one value, weighted by inverse variances: (value, deviation)."""
    if first_deviation == 0.0 or math.isinf(second_deviation):
        return first, first_deviation
    share = 1.0 / (1.0 + (second_deviation / first_deviation) ** 2)  # of the second
    return first + share * (second - first), math.sqrt(share) * second_deviation


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


def is_better_than_twin(
    *,
    loss_before: float,
    loss_with: float,
    loss_without: float,
    spread: float = 0.0,
    is_way_out: bool = False,
) -> bool:
    """Whether a trial that ended at `loss_with` goes on, not the run without it. Nats on the guard batches.

    It must gain TWIN_GAIN_SHARE more than the other, and PROOF_SPREADS times what a guard loss shakes by
    (`spread`). A way out (a lower rate) of a run that gains nothing has to be no worse by more than one:
    where all is lost, both stand still for a while.
    """
    if not math.isfinite(loss_with):
        return False
    if not math.isfinite(loss_without):
        return True
    gained_without = loss_before - loss_without if math.isfinite(loss_before) else 0.0
    if gained_without <= 0.0 and is_way_out:
        return loss_with <= loss_without + spread
    return loss_with < loss_without - max(TWIN_GAIN_SHARE * gained_without, PROOF_SPREADS * spread)
