"""The anatomy of a jump: what each direction and size does to the held-out loss, now and later.

At a few points of a plain run every candidate is applied to the same state and trained on with the
same batches; a figure is the held-out loss minus that of the twin without a jump. The run itself goes
on untouched. Candidates are data: a row of coefficients over the directions, or a random direction of
the same norm. Decides nothing about jumps: audit.py runs it, people and the choice of arms use it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from common.clock import SystemClock
from common.messages import DIRECTIONS, Phase, PhaseDecision
from common.schedule import decay_start_step
from common.settings import RunSettings, TrainerSettings
from trainer_node.assembly import build_loop, prepare_task
from trainer_node.delta import forecaster_of, move, random_deltas
from trainer_node.links import NoDecisions
from trainer_node.loop import Loop
from trainer_node.race.twin import Crossroads, Reading, nothing

READ_AT = (0, 20, 50, 200)
STABLE_SHARES = (0.25, 0.5, 0.75)
FIGURES = ("now", "plus20", "plus50", "plus200", "at_end", "step_norms")
NOISE_SHARE = 1e-3  # of a window's drift: how far roads part through rounding alone
DRIFT_WINDOWS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SLOW_DRIFT_SHARES = (0.25, 0.5, 1.0, 2.0)
MOMENTUM_STEPS = (1.0, 3.0, 10.0)
PULL_BACK_SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One kind of jump."""

    direction: str
    size: str  # for people, e.g. "2 windows"
    row: tuple[float, ...]  # (K) coefficients, the same for every group
    is_random: bool = False  # a random direction with the norm of that row's delta, tensor by tensor
    forecaster: bytes = b""  # weights of phi, for a run that holds former weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    name: str
    step: int  # not before this one


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Held-out loss with the jump minus without it, nats; NaN beyond the end of the run."""

    seed: int
    point: str
    step: int
    direction: str
    size: str
    now: float
    plus20: float
    plus50: float
    plus200: float
    at_end: float  # after the last step of the run; NaN unless asked for
    step_norms: float  # L2 of the delta over that of one real step of the twin


def candidate(direction: str, coefficient: float, size: str) -> Candidate:
    return Candidate(
        direction=direction, size=size, row=tuple(coefficient if d == direction else 0.0 for d in DIRECTIONS)
    )


def default_candidates() -> tuple[Candidate, ...]:
    """Every direction at several sizes, and random directions as the control."""
    drift = [candidate("drift", n, f"{n:g} windows") for n in DRIFT_WINDOWS]
    return (
        *(candidate("momentum", n, f"{n:g} steps") for n in MOMENTUM_STEPS),
        *drift,
        *(candidate("slow_drift", n, f"x {n:g}") for n in SLOW_DRIFT_SHARES),
        *(candidate("pull_back", n, f"{n:.0%}") for n in PULL_BACK_SHARES),
        *(
            Candidate(direction="random", size=f"as drift, {d.size}", row=d.row, is_random=True)
            for d in drift
            if d.size in ("1 windows", "4 windows")
        ),
        Candidate(
            direction="random",
            size="rounding only",
            row=candidate("drift", NOISE_SHARE, "").row,
            is_random=True,
        ),
    )


def points_of(settings: TrainerSettings) -> tuple[Point, ...]:
    """Shares of the stable phase and the start of the decay; the end comes by itself."""
    first = max(settings.schedule.warmup_steps, settings.statistics_steps)
    decay = decay_start_step(settings.steps, settings.schedule)
    stable = [Point(name=f"stable {s:.0%}", step=first + round(s * (decay - first))) for s in STABLE_SHARES]
    return (*stable, Point(name="decay start", step=decay)) if decay < settings.steps else tuple(stable)


def change_of(loop: Loop, tried: Candidate, *, number: int) -> Callable[[], None]:
    """What applies the candidate to the weights as they are when it is called."""

    def apply() -> None:
        basis, decision = loop.tools.basis, decision_for(loop, tried)
        deltas = loop.tools.deltas(decision, forecaster_of(basis, decision))
        if tried.is_random:
            deltas = random_deltas(deltas, key=(loop.settings.seed, loop.progress.step, number))
        move(basis, deltas)

    return apply


def decision_for(loop: Loop, tried: Candidate) -> PhaseDecision:
    assert loop.basis is not None
    return PhaseDecision(
        decision_id="anatomy",
        phase=Phase.PREDICT,
        horizon_steps=1,
        num_groups=loop.basis.num_groups,
        num_directions=len(DIRECTIONS),
        coefficients=tried.row * loop.basis.num_groups,
        controls=None,
        forecast=None,
        base_generation=loop.generation,
        base_step=loop.progress.step,
        base_attempt=loop.progress.attempt,
        base_fingerprint="",
        valid_until_step=loop.progress.step,
        reason="anatomy",
        forecaster=tried.forecaster,
    )


class Anatomist(NoDecisions):
    """Links that decide nothing, and try the candidates when the run comes past a point."""

    def __init__(
        self, points: Iterable[Point], candidates: Sequence[Candidate], *, seed: int, to_the_end: bool = False
    ) -> None:
        self.loop: Loop | None = None  # the loop is built with its links, so it comes after
        self.found: list[Difference] = []
        self._due = sorted(points, key=lambda point: point.step)
        self._candidates, self._seed, self._to_the_end = candidates, seed, to_the_end

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        if self._due and step >= self._due[0].step:
            self.dissect(self._due.pop(0).name)
        return None

    def dissect(self, point: str) -> None:
        """All candidates from the state as it is."""
        loop = self.loop
        assert loop is not None, "the loop was not handed over"
        assert loop.basis is not None
        with Crossroads(loop) as here:
            last = here.steps_left if self._to_the_end else 0
            read_at = (*READ_AT, 1, last)
            twin = here.road(nothing, read_at)
            for number, tried in enumerate(self._candidates):
                road = here.road(change_of(loop, tried, number=number), read_at)
                self.found.append(
                    Difference(
                        seed=self._seed,
                        point=point,
                        step=loop.progress.step,
                        direction=tried.direction,
                        size=tried.size,
                        now=_gap(road, twin, 0),
                        plus20=_gap(road, twin, 20),
                        plus50=_gap(road, twin, 50),
                        plus200=_gap(road, twin, 200),
                        at_end=_gap(road, twin, last) if last else math.nan,
                        step_norms=_step_norms(road, twin),
                    )
                )


def _gap(road: dict[int, Reading], twin: dict[int, Reading], steps: int) -> float:
    if steps not in road:
        return math.nan
    found = road[steps].held_out
    return found - twin[steps].held_out if math.isfinite(found) else math.inf  # the jump ended the run


def _step_norms(road: dict[int, Reading], twin: dict[int, Reading]) -> float:
    if 1 not in twin:
        return math.nan
    step_norm = (twin[1].weights_Gm - twin[0].weights_Gm).norm().item()
    return (road[0].weights_Gm - twin[0].weights_Gm).norm().item() / step_norm if step_norm else math.nan


def table_of(found: Iterable[Difference]) -> list[dict[str, object]]:
    """One row per point and candidate, in the order in which they were tried; medians over the seeds."""
    sets: dict[tuple[str, str, str], list[Difference]] = {}
    for one in found:
        sets.setdefault((one.point, one.direction, one.size), []).append(one)
    return [
        {
            "point": point,
            "direction": direction,
            "size": size,
            **{name: _median([getattr(one, name) for one in of]) for name in FIGURES},
            "n": len(of),
        }
        for (point, direction, size), of in sets.items()
    ]


def _median(values: Sequence[float]) -> float | None:
    """None where no run got that far, or most were lost."""
    known = [value for value in values if not math.isnan(value)]
    median = statistics.median(known) if known else math.nan
    return median if math.isfinite(median) else None


def dissect_run(
    settings: RunSettings,
    *,
    seed: int,
    candidates: Sequence[Candidate] | None = None,
    points: Sequence[Point] | None = None,
    to_the_end: bool = False,
    seen: Callable[[Loop], None] = lambda _: None,
) -> list[Difference]:
    """One plain run of the task with that seed, dissected at the points and at its end.

    `seen` is given the finished loop: the run is a plain run of the task.
    """
    settings = replace(settings, trainer=replace(settings.trainer, seed=seed, decision_mode="lockstep"))
    anatomist = Anatomist(
        points_of(settings.trainer) if points is None else points,
        default_candidates() if candidates is None else candidates,
        seed=seed,
        to_the_end=to_the_end,
    )
    anatomist.loop = build_loop(
        prepare_task(settings.trainer),
        settings,
        links=anatomist,
        emit=lambda _: None,
        housekeeping=lambda _: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    anatomist.loop.run()
    anatomist.dissect("end")
    seen(anatomist.loop)
    return anatomist.found
