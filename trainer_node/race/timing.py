"""What a run costs, measured so that arms can be compared: in two waves, arms taking turns seed by seed.

The runs that find the crossing are made over hours, arm after arm where searches differ, and a machine is not
the same all that time (measured: equal work took 9 % longer beside a test suite, in seconds of the core
too). So their steps and passes count, and their seconds are those of the timed run of the same arm and seed,
per forward-equivalent: of the quicker of two, since nothing makes equal work quicker than it is (two equal
runs differ by about 3 %). Arms without timed runs keep their own seconds. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from trainer_node.race.run_result import CurvePoint, RunResult


def retimed(results: Iterable[RunResult]) -> list[RunResult]:
    """The results without the timed runs, with their seconds."""
    kept = list(results)
    timed: dict[tuple[str, str, tuple[tuple[str, object], ...], int], CurvePoint] = {}
    for run in kept:
        if run.key.is_timed and not run.diverged and run.final.passes > 0:
            place = (run.key.task, run.key.arm, run.key.config, run.key.seed)
            timed[place] = min(timed.get(place, run.final), run.final, key=_seconds_per_pass)
    return [_with_seconds(run, timed) for run in kept if not run.key.is_timed]


def _seconds_per_pass(final: CurvePoint) -> float:
    return (final.trainer_seconds + final.predictor_seconds) / final.passes


def _with_seconds(
    run: RunResult, timed: dict[tuple[str, str, tuple[tuple[str, object], ...], int], CurvePoint]
) -> RunResult:
    final = timed.get((run.key.task, run.key.arm, run.key.config, run.key.seed))
    if final is None:
        return run
    trainer, predictor = final.trainer_seconds / final.passes, final.predictor_seconds / final.passes
    curve = [
        replace(point, trainer_seconds=trainer * point.passes, predictor_seconds=predictor * point.passes)
        for point in run.curve
    ]
    return replace(run, curve=tuple(curve))
