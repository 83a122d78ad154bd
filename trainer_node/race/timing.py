"""What a run costs, measured so that arms can be compared: in one wave, one run at a time, arms taking turns.

The runs that find the crossing are made over hours, arm after arm where searches differ, and a machine is not
the same all that time (measured: equal work took 9 % longer beside a test suite, in seconds of the core
too). So their steps and passes count, and their seconds are those of the timed run of the same arm and seed,
per forward-equivalent. Arms without timed runs keep their own seconds. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from trainer_node.race.run_result import TIME, CurvePoint, RunResult


def retimed(results: Iterable[RunResult]) -> list[RunResult]:
    """The results without the timed runs, with their seconds."""
    kept = list(results)
    timed = {
        (run.key.task, run.key.arm, run.key.config, run.key.seed): run.final
        for run in kept
        if run.key.purpose == TIME and not run.diverged and run.final.passes > 0
    }
    return [_with_seconds(run, timed) for run in kept if run.key.purpose != TIME]


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
