"""Where a run reaches the target, and what it has cost by then. Pure; knows nothing of arms or ratios.

Two ways to read, after reference/speedup.md section 3 ("decay-aware time-to-target"):

over lengths   for arms whose learning rate decays: only the end of a run counts, so the runs of several
               planned lengths of one seed form a curve of final loss over length. It is made monotone
               (best loss of any length up to this one) and interpolated over log(length).
in the curve   for arms that may stop at any moment: the first held-out reading at or below the target,
               interpolated linearly from the reading before. No smoothing. First passage of a noisy
               curve comes early; it does so in every arm alike.

A run that never reaches the target misses: every cost is infinite. Nothing is extrapolated beyond the
visited lengths, so the search must bracket single seeds, not only their mean (crossing_search.bracket).
A diverged run counts as infinite loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer_node.race.run_result import CurvePoint, RunResult

READINGS = ("raw", "read")  # CurvePoint.loss, CurvePoint.read_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """Cumulative cost at the crossing; all fields are infinite for a miss."""

    steps: float
    passes: float  # forward-equivalents
    seconds: float  # trainer + predictor: both on the trainer's core
    trainer_seconds: float  # predictor on a spare core
    at_most: bool = False  # already passed at the first reading: the true crossing is here or earlier

    @property
    def missed(self) -> bool:
        return math.isinf(self.steps)


MISS = Crossing(steps=math.inf, passes=math.inf, seconds=math.inf, trainer_seconds=math.inf)


def loss_of(point: CurvePoint, reading: str) -> float:
    """The held-out loss of one reading; infinite where it is not a number."""
    loss = point.loss if reading == "raw" else point.read_loss
    return loss if math.isfinite(loss) else math.inf


def final_loss(run: RunResult) -> float:
    """What the arm hands out at the end; infinite if it diverged."""
    return math.inf if run.diverged else loss_of(run.final, "read")


def crossing_over_lengths(runs: Sequence[RunResult], target: float) -> Crossing:
    """Crossing of one seed from its runs of several planned lengths (any order, lengths distinct).

    Costs per step are those of the neighbouring runs, interpolated with the same share as the loss.
    """
    runs = sorted(runs, key=lambda run: run.key.planned_steps)
    losses = [final_loss(run) for run in runs]
    first = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if first is None:
        return MISS
    best_before = min(losses[:first], default=math.inf)
    if math.isinf(best_before):
        return _cost_at(runs[first].final, at_most=True)
    share = (best_before - target) / (best_before - losses[first])
    shorter, longer = runs[first - 1], runs[first]
    log_steps = _between(math.log(shorter.key.planned_steps), math.log(longer.key.planned_steps), share)
    steps = math.exp(log_steps) if share < 1 else float(longer.key.planned_steps)

    def cost(of: str) -> float:
        rates = [getattr(_cost_at(run.final), of) / run.key.planned_steps for run in (shorter, longer)]
        return steps * _between(rates[0], rates[1], share)

    return Crossing(
        steps=steps, passes=cost("passes"), seconds=cost("seconds"), trainer_seconds=cost("trainer_seconds")
    )


def crossing_in_curve(run: RunResult, target: float, reading: str) -> Crossing:
    """First passage of one run's held-out curve, read as "raw" or "read"."""
    if run.diverged:
        return MISS
    before: CurvePoint | None = None
    for point in run.curve:
        loss = loss_of(point, reading)
        if loss > target:
            before = point
            continue
        if before is None or math.isinf(loss_of(before, reading)):
            return _cost_at(point, at_most=True)
        loss_before = loss_of(before, reading)
        share = (loss_before - target) / (loss_before - loss)
        start, end = _cost_at(before), _cost_at(point)
        return Crossing(
            steps=_between(start.steps, end.steps, share),
            passes=_between(start.passes, end.passes, share),
            seconds=_between(start.seconds, end.seconds, share),
            trainer_seconds=_between(start.trainer_seconds, end.trainer_seconds, share),
        )
    return MISS


def loss_at(run: RunResult, cost: float, reading: str, *, of: str = "steps") -> float:
    """Held-out loss when `of` (steps or passes) reaches `cost`, linear between readings; NaN outside them."""
    if run.diverged:
        return math.inf
    for before, point in itertools.pairwise(run.curve):
        start, end = getattr(before, of), getattr(point, of)
        if start <= cost <= end:
            share = (cost - start) / (end - start) if end > start else 1.0
            return _between(loss_of(before, reading), loss_of(point, reading), share)
    return math.nan


def final_loss_at_passes(runs: Sequence[RunResult], passes: float) -> float:
    """Final loss of a run planned to cost this many passes, linear over log(passes); NaN if not visited."""
    ends = sorted((run.final.passes, final_loss(run)) for run in runs)
    for (low, loss_low), (high, loss_high) in itertools.pairwise(ends):
        if low <= passes <= high:
            span = math.log(high) - math.log(low)
            return _between(loss_low, loss_high, (math.log(passes) - math.log(low)) / span if span else 0.0)
    exact = [loss for cost, loss in ends if math.isclose(cost, passes)]
    return exact[0] if exact else math.nan


def _cost_at(point: CurvePoint, *, at_most: bool = False) -> Crossing:
    return Crossing(
        steps=float(point.steps),
        passes=point.passes,
        seconds=point.trainer_seconds + point.predictor_seconds,
        trainer_seconds=point.trainer_seconds,
        at_most=at_most,
    )


def _between(start: float, end: float, share: float) -> float:
    """Exact at both ends; strictly inside, an infinite end makes it infinite."""
    if share <= 0 or share >= 1:
        return start if share <= 0 else end
    return start + (end - start) * share if math.isfinite(start) and math.isfinite(end) else math.inf
