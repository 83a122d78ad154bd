"""The body of `trainer-node race`: takes the waves of the plan to the workers and the results to the report.

    options, plan -> [earlier runs, fit] -> wave after wave -> report.json, table, plots, page

A stop (Ctrl-C, the budget, a crash) leaves results.jsonl, and the same command goes on from it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import click
import psutil

from common.errors import EnvironmentFault
from trainer_node.race import earlier_runs
from trainer_node.race.arms import ARMS, run_settings
from trainer_node.race.options import RaceOptions, check_data, check_folder, plan_of, write_folder
from trainer_node.race.plan import RacePlan
from trainer_node.race.record import record_of
from trainer_node.race.results import FILE_NAME as RESULTS_NAME
from trainer_node.race.results import Results, open_results, read_results
from trainer_node.race.run_result import RunKey
from trainer_node.race.show import RaceDisplay
from trainer_node.race.waves import Standing, Wave
from trainer_node.race.words import JUMPING_ARM
from trainer_node.race.workers import Failed, Runner, RunOrder, Workers, make_run

INTERRUPTED = 130
AUDITED_ARM = JUMPING_ARM
AUDIT_SEEDS = 3  # unless --seeds says otherwise: an audit of a run costs several times that run


@dataclass
class _Race:
    options: RaceOptions
    plan: RacePlan
    runner: Runner
    deadline_seconds: float
    failed: dict[str, str] = field(default_factory=dict)  # why, by identity
    predictor_state: Path | None = None

    def has_time(self) -> bool:
        return time.monotonic() < self.deadline_seconds


def race(options: RaceOptions, *, runner: Runner = make_run) -> int:
    """Exit code. Raises UserError before anything is written, EnvironmentFault when no run succeeds."""
    plan = plan_of(options)
    note = check_folder(options, plan)
    if options.audit:
        return _audit(options, plan)
    fit = earlier_runs.installed_fit() if options.fitted_on else None
    minutes = options.budget_minutes
    deadline_seconds = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    ours = _Race(options, plan, runner, deadline_seconds)
    data = _check_data(plan) if runner is make_run else ""
    if data:
        check_data(options, data)
    try:
        write_folder(options, plan, data=data)
    except OSError as error:
        raise EnvironmentFault(f"{options.folder}: cannot be written: {error.strerror}") from None
    with open_results(options.folder) as results:
        display = RaceDisplay()
        for line in filter(None, (note, results.note)):
            display.say(line)
        try:
            with _stop_by_signal(), Workers(_worker_count(options, plan), runner) as workers:
                if fit is not None:
                    _fit(ours, fit, workers, display)
                _run_waves(ours, results, workers, display)
            code = 0
        except KeyboardInterrupt:
            display.say("stopped; the same command goes on from here")
            code = INTERRUPTED
        finally:
            display.close()
        _report(ours, results)
        return code


def _run_waves(ours: _Race, results: Results, workers: Workers, display: RaceDisplay) -> None:
    while (wave := _standing(ours, results).next_wave()) is not None and ours.has_time():
        display.begin(wave, _standing(ours, results).steps_ahead())
        orders = [_order(ours, key) for key in wave.keys]
        alone = wave.phase == "time"  # two runs share caches and memory: docs/lab-log.md has what that does
        if alone and ours.runner is make_run:
            orders = _by_seed(orders)
        for order, answer in workers.run(orders, may_start=ours.has_time, one_at_a_time=alone):
            if isinstance(answer, Failed):
                for failed in (order, *order.together):
                    _note_failure(ours, failed.key, answer, display)
            else:
                for result in answer if isinstance(answer, list) else [answer]:
                    results.append(result)
                    display.ended(result.key)
        if ours.failed and not results.by_identity:  # the machine's fault, or ours: more would not help
            reason = next(iter(ours.failed.values()))
            raise EnvironmentFault(f"no run succeeded: {reason}; see {_failures(ours)}")
    standing = _standing(ours, results)
    if standing.next_wave() is None and standing.target() is None:
        display.say("no target can be set: half of the runs of the plain arm failed or diverged")
    elif standing.next_wave() is not None:
        display.say(
            f"the budget of {ours.options.budget_minutes:g} minutes is spent; the same command goes on"
        )


def _by_seed(orders: list[RunOrder]) -> list[RunOrder]:
    """All arms of a seed take turns (together.py). Who goes first changes from seed to seed: of two equal
    runs the place in the round alone makes 1 to 2 % (lab log, 2026-11-22)."""
    seeds: dict[int, list[RunOrder]] = {}
    for order in orders:
        seeds.setdefault(order.key.seed, []).append(order)
    rounds = [_turned(arms, place) for place, arms in enumerate(seeds.values())]
    return [replace(first, together=tuple(rest)) for first, *rest in rounds]


def _turned(orders: list[RunOrder], place: int) -> list[RunOrder]:
    place %= len(orders)
    return orders[place:] + orders[:place]


def _standing(ours: _Race, results: Results) -> Standing:
    return Standing(ours.plan, results.by_identity, ours.failed.keys())


def _order(ours: _Race, key: RunKey) -> RunOrder:
    return RunOrder(
        key=key,
        base=ours.plan.base,
        eval_every_steps=ours.plan.eval_every_steps(key.purpose),
        predictor_state=ours.predictor_state if ARMS[key.arm].is_ours else None,
    )


def _fit(ours: _Race, fit: earlier_runs.Fit, workers: Workers, display: RaceDisplay) -> None:
    """Earlier runs and the state fitted on them; what is there already is taken as it is."""
    folder = ours.options.folder / "earlier"
    folder.mkdir(exist_ok=True)
    orders = earlier_runs.earlier_orders(ours.plan, ours.options.fitted_on or 0, folder)
    state = ours.options.folder / "fitted"
    missing = [order for order in orders if order.recording is not None and not order.recording.exists()]
    if missing:
        wave = Wave(phase="earlier", keys=tuple(order.key for order in missing))
        display.begin(wave, sum(key.planned_steps for key in wave.keys))
    for order, answer in workers.run(missing):
        if isinstance(answer, Failed):
            raise EnvironmentFault(f"an earlier run failed: {answer.reason}; the same command tries again")
        display.ended(order.key)
    if not state.exists():
        display.say(f"fitting the predictor on {len(orders)} earlier runs ...")
        partial = state.with_name("fitted.partial")
        fit([order.recording for order in orders if order.recording is not None], partial)
        partial.replace(state)
    ours.predictor_state = state.absolute()


def _note_failure(ours: _Race, key: RunKey, answer: Failed, display: RaceDisplay) -> None:
    line = f"failed: {key.identity}: {answer.reason}"
    ours.failed[key.identity] = answer.reason
    display.say(line)
    with contextlib.suppress(OSError), _failures(ours).open("a", encoding="utf-8") as log:
        log.write(f"{line}\n{answer.details}\n")


def _failures(ours: _Race) -> Path:
    return ours.options.folder / "failures.log"


def _failures_by_arm(failed: Mapping[str, str]) -> list[str]:
    counts = Counter((identity.split("/")[1], reason) for identity, reason in failed.items())
    return [f"{arm}: {count} failed runs: {reason}" for (arm, reason), count in counts.items()]


def _report(ours: _Race, results: Results) -> None:
    from trainer_node.race import evidence, report

    runs = list(results.by_identity.values())
    if not runs:
        return
    notes = _failures_by_arm(ours.failed)
    record = record_of(ours.options, _standing(ours, results), notes, runs)
    written = report.write_report(ours.options.folder, record, runs)
    click.echo(written.text)
    for note in written.notes:
        click.echo(note, err=True)
    click.echo(f"page  {written.page}", err=True)
    if ours.options.evidence and record.target is not None and not record.incomplete:
        path = evidence.write(evidence.FOLDER, evidence.evidence_of(written.figures))
        click.echo(f"evidence  {path}; render with python -m trainer_node.race.evidence", err=True)
    elif ours.options.evidence:
        click.echo("no evidence was written: the race is not finished", err=True)


def _audit(options: RaceOptions, plan: RacePlan) -> int:
    """Our arm as it raced: with its tuned settings if a race of this task is there, else the preset's."""
    from trainer_node.race.audit import audit_task

    _check_data(plan)
    arm = ARMS[AUDITED_ARM]
    standing = Standing(plan, read_results(options.folder / RESULTS_NAME)[0])
    config = standing.tuned(arm) if arm.name in plan.arms else None
    click.echo(f"settings  {'tuned' if config is not None else 'of the preset'}", err=True)
    settings = run_settings(arm, plan.base, config or (), steps=plan.base_steps, seed=0)
    seeds = plan.seeds if options.seeds is not None else plan.seeds[:AUDIT_SEEDS]
    lines = audit_task(settings, options.folder, seeds=seeds, task=plan.task, command=options.command)
    for line in lines:
        click.echo(line)
    if options.evidence:
        from trainer_node.race.evidence import FOLDER

        kept = FOLDER / f"{plan.task}.audit.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.folder / "audit.json", kept)
        click.echo(f"evidence  {kept}; render with python -m trainer_node.race.evidence", err=True)
    return 0


def _check_data(plan: RacePlan) -> str:
    """What they are, in words. Raises DataError or EnvironmentFault now, and fills the token cache before
    workers ask for it."""
    from trainer_node.assembly import prepare_task

    description = prepare_task(plan.base.trainer).description
    click.echo(f"task   {description}", err=True)
    return description


def _worker_count(options: RaceOptions, plan: RacePlan) -> int:
    """Physical cores that are ours to use; a GPU is not shared."""
    if options.workers is not None:
        return options.workers
    if plan.base.trainer.device == "cuda":
        return 1
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, usable))


@contextlib.contextmanager
def _stop_by_signal() -> Iterator[None]:
    """SIGTERM stops like Ctrl-C. Signals belong to the main thread: elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
