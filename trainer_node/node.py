"""The trainer process: joins the loop to bus, run folder and terminal, and takes them apart again.

Order matters: settings and data are checked first, then the server is reached, then the run folder is
opened, so that a mistake leaves nothing behind. On SIGTERM, Ctrl-C or a lost parent the run comes to
rest, writes an emergency checkpoint and says how to go on.
"""

from __future__ import annotations

import shutil
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import sealed_folder
from common.clock import SystemClock
from common.errors import EnvironmentFault, HybridError, UserError
from common.messages import PhaseDecision, RunEnded
from common.recording import messages_of, read_recording
from common.settings import RunSettings
from common.streams import DECISIONS
from trainer_node import checkpoint, run_folder
from trainer_node.assembly import build_loop, prepare_task
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_buffer import make_buffer
from trainer_node.connection import Connection
from trainer_node.display import Display
from trainer_node.housekeeping import Housekeeping
from trainer_node.links import DecisionSource, RecordedDecisions
from trainer_node.loop import Loop
from trainer_node.memory_report import MemoryReports
from trainer_node.out_of_memory import MemoryExhausted
from trainer_node.provenance import provenance, write_provenance
from trainer_node.read_out import check_read_out
from trainer_node.run_folder import RunFolder, newest_checkpoint
from trainer_node.sinks import MetricSinks
from trainer_node.summary import build_summary, write_summary
from trainer_node.tasks import Task


@dataclass(frozen=True, kw_only=True)
class TrainerJob:
    run: RunFolder
    settings: RunSettings
    redis_url: str | None
    decisions_file: Path | None = None  # repeat the decisions of this recording, without a predictor
    resume: bool = False


def run_trainer(job: TrainerJob, stop: threading.Event) -> int:
    """Train until done or told to stop. Returns the exit code; raises HybridError for known faults."""
    check_read_out(job.settings)
    recorded = _recorded_decisions(job.decisions_file)
    start_from, passed_over = _checkpoint_to_resume(job)
    task = prepare_task(job.settings.trainer)
    with ExitStack() as open_things:
        made_with = provenance()  # before the first message: the code as it is now
        node = _connect(job, open_things, stop, start_from)
        links = _links(node, recorded)
        if start_from is None:
            run_folder.create(job.run.path.parent, job.run.run_id, job.settings, again=job.resume)
        checkpoints = _checkpoints(job, node, task)
        open_things.callback(checkpoints.close)
        housekeeping = Housekeeping(node.emit, checkpoints)

        def between_steps(loop: Loop) -> None:
            housekeeping(loop)
            node.step = loop.progress.step
            node.repeat_start_if_lost()
            loop.stop_requested = loop.stop_requested or stop.is_set()

        loop = build_loop(
            task,
            job.settings,
            links=links,
            emit=node.emit,
            housekeeping=between_steps,
            clock=SystemClock(),
            generation=node.generation,
            snapshot_folder=job.run.path,
            report=MemoryReports(node.emit),
        )
        if start_from is not None:
            housekeeping.load(checkpoint.load(start_from, loop))
        write_provenance(made_with, job.run.path)
        resumed_from = start_from.name if start_from else ""
        _begin(job, node, loop, open_things, held_out=housekeeping.last_loss, resumed_from=resumed_from)
        for reason in passed_over:
            node.alarm(f"passed over: {reason}", kind="checkpoint_passed_over", severity="warning")
        loop.ledger.start()
        if start_from is None:
            housekeeping.begin(loop)
        exhausted: MemoryExhausted | None = None
        try:
            loop.run()
        except MemoryExhausted as error:
            exhausted = error  # the state is that before the step that did not fit: it is saved
        if node.fenced is None:  # else the folder is the newer trainer's
            _end(job, node, loop, housekeeping, made_with)
    fault = node.fenced or exhausted or _fault_of(housekeeping, checkpoints)
    if fault is not None:
        raise fault
    return 0


def _checkpoints(job: TrainerJob, node: Connection, task: Task) -> Checkpoints:
    settings = job.settings.trainer.checkpoint
    return Checkpoints(
        job.run.trainer_checkpoints, keep=settings.keep, on_failure=node.alarm,
        buffer=make_buffer(settings.staging, task.device), has_process=True,
    )  # fmt: skip


def _fault_of(housekeeping: Housekeeping, checkpoints: Checkpoints) -> HybridError | None:
    if housekeeping.fault:
        return UserError(housekeeping.fault)
    if checkpoints.last_failed:
        return EnvironmentFault(
            "the last checkpoint could not be saved: what came after the one before is lost"
        )
    return None


def _connect(
    job: TrainerJob, open_things: ExitStack, stop: threading.Event, start_from: Path | None
) -> Connection:
    generation, step = sealed_folder.age_key(start_from.name)[:2] if start_from else (0, 0)
    return Connection(
        job.run, job.settings, job.redis_url, open_things, stop, step=step, saved_generation=generation
    )


def _links(node: Connection, recorded: list[PhaseDecision] | None) -> DecisionSource:
    if recorded is None:
        return node.open_inbox()
    return RecordedDecisions(recorded, generation=node.generation)


def _begin(
    job: TrainerJob,
    node: Connection,
    loop: Loop,
    open_things: ExitStack,
    *,
    held_out: float,
    resumed_from: str,
) -> None:
    """From here on things are written: metrics, event files, messages."""
    settings, task = job.settings, loop.task
    sinks = MetricSinks(job.run.metrics, job.run.tensorboard, node.alarm)
    display = Display(
        total_steps=settings.trainer.steps,
        first_step=loop.progress.step,
        units_per_step=task.units_per_step,
        unit=task.unit,
    )
    display.start_from(loop.ledger.verdicts, loop.ledger.virtual_steps, held_out)
    open_things.callback(display.close)
    if task.tokenizer_path is not None:
        shutil.copyfile(task.tokenizer_path, job.run.tokenizer)
    open_things.callback(sinks.close)
    node.begin(loop, resumed_from=resumed_from, listeners=(sinks.put, display.put))
    if settings.trainer.decision_mode == "lockstep" and settings.predictor.enabled:
        node.wait_for_predictor()


def _end(
    job: TrainerJob, node: Connection, loop: Loop, housekeeping: Housekeeping, made_with: dict[str, Any]
) -> None:
    """The last checkpoint, the last word, the summary."""
    status = "finished" if loop.progress.step >= job.settings.trainer.steps else "stopped"
    housekeeping.end(loop, emergency=status == "stopped")
    node.emit(RunEnded(step=loop.progress.step, reason=status))
    summary = build_summary(
        loop, housekeeping, run_id=job.run.run_id, status=status, late=node.late, made_with=made_with
    )
    write_summary(job.run.summary, summary)


def _checkpoint_to_resume(job: TrainerJob) -> tuple[Path | None, list[str]]:
    """Where to go on, and why not from newer ones; None: a fresh run. Raises UserError without `resume`."""
    if not job.run.is_used:
        return None, []
    if not job.resume:
        raise UserError(f"{job.run.path} holds a run already: choose another --run-id or add --resume")
    if not sealed_folder.folders(job.run.trainer_checkpoints):
        return None, []
    return newest_checkpoint(job.run, with_predictor=job.settings.predictor.enabled)


def _recorded_decisions(file: Path | None) -> list[PhaseDecision] | None:
    if file is None:
        return None
    recording = read_recording(file)
    return [m for m in messages_of(recording, DECISIONS) if isinstance(m, PhaseDecision)]
