"""The figures of a race: one ArmFigures per arm and the comparisons between arms. Pure: runs in, numbers out.

Which runs count: those of the record's task, seeds and tuned configs. For arms read at their end, lengths
that the race visited (a tuning run of one seed at another length would give that seed more chances
than the others have). Which reading counts: the end of the run for arms with decay; otherwise the held-out
curve of the weights as they are or as handed out, whichever brings the arm there with fewer passes in the
median over seeds: one choice per arm, never per seed.

A seed without runs is missing, not missed: it is named and left out of every comparison.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer_node.race.arm_table import ARMS, GROUPS
from trainer_node.race.crossing import (
    READINGS,
    Crossing,
    crossing_in_curve,
    crossing_over_lengths,
    final_loss,
    final_loss_at_passes,
    loss_at,
)
from trainer_node.race.plan import RaceRecord
from trainer_node.race.run_result import RunResult
from trainer_node.race.statistics import (
    Calibration,
    Ratio,
    calibration,
    pooled_ratio_of,
    ratio_of,
    time_median,
)

PASSES_PER_STEP = 3.0  # forward-equivalents of one train step of one micro-batch
AT_THE_END = "end"  # beside READINGS: how an arm with decay is read


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmFigures:
    """NaN = unknown so far; infinite = missed. Medians are over the seeds that have runs."""

    arm: str
    config: Mapping[str, Any]
    reading: str  # "end", "raw" or "read"
    lengths: tuple[int, ...]  # planned lengths that count
    crossings: Mapping[int, Crossing]  # by seed
    missing: tuple[str, ...]  # runs that are not there, in words
    ratio: Ratio  # reference / arm in seconds, predictor on the trainer's core: the headline
    ratio_free_core: Ratio  # the same with the predictor on a spare core
    ratio_passes: Ratio
    final_quality_median: float  # held-out loss of what is handed out after T0 steps
    final_quality_equal_passes_median: (
        float  # the same for what T0 plain steps cost in forward-equivalents, checks and undone steps paid
    )
    verdicts: Mapping[str, int]
    cosine_median: float  # delta against the displacement of the probation
    calibration: Calibration | None
    peak_bytes: int
    diverged: int  # runs

    @property
    def misses(self) -> int:
        return sum(crossing.missed for crossing in self.crossings.values())

    @property
    def at_most(self) -> int:
        """Seeds whose crossing is only known to be no later than stated."""
        return sum(crossing.at_most for crossing in self.crossings.values())

    def cost_median(self, of: str) -> float:
        """`of`: a field of Crossing."""
        return time_median([getattr(crossing, of) for crossing in self.crossings.values()])


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """`ratio` = seconds of `versus` / seconds of `arm`: above 1 means that `arm` was faster."""

    arm: str
    versus: str
    ratio: Ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class RaceFigures:
    race: RaceRecord
    arms: tuple[ArmFigures, ...]  # in the record's order; arms without a tuned config are left out
    pairs: tuple[Pair, ...]  # every arm against every other one; groups against arms outside them
    runs: Mapping[str, tuple[RunResult, ...]]  # by arm: those that counted
    missing: tuple[str, ...]  # in words

    def arm(self, name: str) -> ArmFigures | None:
        return next((figures for figures in self.arms if figures.arm == name), None)

    def pair(self, arm: str, versus: str) -> Ratio | None:
        return next((p.ratio for p in self.pairs if (p.arm, p.versus) == (arm, versus)), None)


def race_figures(
    race: RaceRecord, results: Iterable[RunResult], *, read_mid_run: frozenset[str]
) -> RaceFigures:
    """`read_mid_run`: arms whose rate does not decay, so that any reading may be their last."""
    results = list(results)
    runs = {
        arm: _runs_that_count(race, arm, results, by_length=arm not in read_mid_run)
        for arm in race.arms
        if arm in race.tuned
    }
    read = {arm: _crossings(race, arm_runs, arm in read_mid_run) for arm, arm_runs in runs.items()}
    crossings = {arm: by_seed for arm, (_, by_seed) in read.items()}
    reference = crossings.get(race.reference_arm, {})
    step_passes = _step_passes([run for arm in runs if not ARMS[arm].is_ours for run in runs[arm]])
    arms = tuple(
        _arm_figures(race, arm, runs[arm], reading, by_seed, reference, step_passes)
        for arm, (reading, by_seed) in read.items()
    )
    pairs = tuple(
        Pair(arm=arm, versus=versus, ratio=_ratio(crossings[versus], crossings[arm], "seconds"))
        for arm in crossings
        for versus in crossings
        if arm != versus
    )
    pairs += tuple(
        Pair(arm=group, versus=versus, ratio=_pooled(crossings[versus], [crossings[arm] for arm in members]))
        for group, members in GROUPS.items()
        if crossings.keys() >= set(members)
        for versus in crossings.keys() - set(members)
    )
    return RaceFigures(race=race, arms=arms, pairs=pairs, runs=runs, missing=_missing(race, arms))


def _missing(race: RaceRecord, arms: Sequence[ArmFigures]) -> tuple[str, ...]:
    lines = [] if race.target is not None else ["the target is not known yet: no crossing can be computed"]
    lines += [f"{arm}: not tuned yet" for arm in race.arms if arm not in race.tuned]
    lines += [f"{figures.arm}: {line}" for figures in arms for line in figures.missing]
    lines += [f"{arm}: still has runs to do" for arm in race.incomplete if arm in race.tuned]
    return (*lines, *race.notes)


def _runs_that_count(
    race: RaceRecord, arm: str, results: Sequence[RunResult], *, by_length: bool
) -> tuple[RunResult, ...]:
    """Sorted by seed and length. For arms that are read in the curve: the longest run of each seed."""
    found = {
        (run.key.seed, run.key.planned_steps): run
        for run in reversed(results)
        if (run.key.task, run.key.arm, run.key.config) == (race.task, arm, race.tuned[arm])
        and run.key.seed in race.seeds
        and run.key.purpose != "audit"
    }
    if not by_length:
        longest = {seed: run for (seed, _), run in sorted(found.items())}
        return tuple(longest.values())
    visited = {length for (_, length), run in found.items() if run.key.purpose == "race"}
    visited |= {n for _, n in found if all((seed, n) in found for seed in race.seeds)}
    return tuple(run for (_, length), run in sorted(found.items()) if length in visited)


def _crossings(
    race: RaceRecord, runs: Sequence[RunResult], in_the_curve: bool
) -> tuple[str, dict[int, Crossing]]:
    """(reading, crossing by seed); no crossings while the target is unknown."""
    if not in_the_curve:
        by_seed: dict[int, list[RunResult]] = {}
        for run in runs:
            by_seed.setdefault(run.key.seed, []).append(run)
        if (target := race.target) is None:
            return AT_THE_END, {}
        return AT_THE_END, {seed: crossing_over_lengths(own, target) for seed, own in by_seed.items()}
    if race.target is None:
        return READINGS[0], {}
    candidates = [
        (reading, {run.key.seed: crossing_in_curve(run, race.target, reading) for run in runs})
        for reading in READINGS
    ]
    return min(candidates, key=lambda candidate: _rank(candidate[1].values()))


def _rank(crossings: Iterable[Crossing]) -> tuple[float, int]:
    """Fewer passes in the median, then fewer misses; `min` keeps the first (raw) of equals."""
    crossings = list(crossings)
    median = time_median([crossing.passes for crossing in crossings])
    return (math.inf if math.isnan(median) else median), sum(crossing.missed for crossing in crossings)


def _arm_figures(
    race: RaceRecord,
    arm: str,
    runs: Sequence[RunResult],
    reading: str,
    crossings: dict[int, Crossing],
    reference: Mapping[int, Crossing],
    step_passes: float,
) -> ArmFigures:
    lengths = tuple(sorted({run.key.planned_steps for run in runs}))
    final, final_equal_passes = _final_quality(race, runs, reading, step_passes)
    cosines = [cosine for run in runs for cosine in run.cosines if math.isfinite(cosine)]
    verdicts: Counter[str] = Counter()
    for run in runs:
        verdicts.update(dict(run.verdicts))
    return ArmFigures(
        arm=arm,
        config=dict(race.tuned[arm]),
        reading=reading,
        lengths=lengths,
        crossings=crossings,
        missing=_missing_runs(race, runs, lengths, by_length=reading == AT_THE_END),
        ratio=_ratio(reference, crossings, "seconds"),
        ratio_free_core=_ratio(reference, crossings, "trainer_seconds"),
        ratio_passes=_ratio(reference, crossings, "passes"),
        final_quality_median=final,
        final_quality_equal_passes_median=final_equal_passes,
        verdicts=dict(sorted(verdicts.items())),
        cosine_median=time_median(cosines),
        calibration=calibration([run.forecasts for run in runs]),
        peak_bytes=max((run.peak_bytes for run in runs), default=0),
        diverged=sum(run.diverged for run in runs),
    )


def _step_passes(plain_runs: Sequence[RunResult]) -> float:
    """Of a step of the task without prediction, whatever its micro-batches: 3 for each of them."""
    ends = [run.final for run in plain_runs if run.final.steps and not run.diverged]
    return ends[0].passes / ends[0].steps if ends else PASSES_PER_STEP


def _final_quality(
    race: RaceRecord, runs: Sequence[RunResult], reading: str, step_passes: float
) -> tuple[float, float]:
    """Medians over seeds of the loss (after T0 steps, after what they cost); NaN where no seed was read."""
    after_steps, after_passes = [], []
    budget_passes = step_passes * race.base_steps
    for seed in sorted({run.key.seed for run in runs}):
        own = [run for run in runs if run.key.seed == seed]
        if reading == AT_THE_END:
            after_steps += [final_loss(run) for run in own if run.key.planned_steps == race.base_steps]
            after_passes.append(final_loss_at_passes(own, budget_passes))
        else:
            after_steps.append(loss_at(own[0], race.base_steps, reading))
            after_passes.append(loss_at(own[0], budget_passes, reading, of="passes"))
    return (
        time_median([loss for loss in after_steps if not math.isnan(loss)]),
        time_median([loss for loss in after_passes if not math.isnan(loss)]),
    )


def _missing_runs(
    race: RaceRecord, runs: Sequence[RunResult], lengths: Sequence[int], *, by_length: bool
) -> tuple[str, ...]:
    if not runs:
        return ("no runs yet",)
    done = {(run.key.seed, run.key.planned_steps if by_length else 0) for run in runs}
    lines = []
    for length in lengths if by_length else (0,):
        absent = [str(seed) for seed in race.seeds if (seed, length) not in done]
        if absent:
            where = f"{length} steps, " if by_length else ""
            lines.append(f"{where}seed{'s' * (len(absent) > 1)} {', '.join(absent)}: no run yet")
    return tuple(lines)


def _ratio(reference: Mapping[int, Crossing], arm: Mapping[int, Crossing], of: str) -> Ratio:
    return ratio_of(_costs(reference, of), _costs(arm, of))


def _pooled(reference: Mapping[int, Crossing], arms: Sequence[Mapping[int, Crossing]]) -> Ratio:
    return pooled_ratio_of(_costs(reference, "seconds"), [_costs(arm, "seconds") for arm in arms])


def _costs(crossings: Mapping[int, Crossing], of: str) -> dict[int, float]:
    return {seed: getattr(crossing, of) for seed, crossing in crossings.items()}
