"""The trainer process: joins the loop to bus, run folder and terminal, and takes them apart again.

Order matters: settings and data are checked first, then the server is reached, then the run folder is
opened, so that a mistake leaves nothing behind. On SIGTERM, Ctrl-C or a lost parent the run comes to
rest, writes an emergency checkpoint and says how to go on. Under torchrun every rank runs this: all of them
train, rank 0 alone has the bus, the run folder and the terminal.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import sealed_folder
from common.clock import SystemClock
from common.errors import EnvironmentFault, Fenced, HybridError, UserError
from common.messages import PhaseDecision, RunEnded
from common.recording import messages_of, read_recording
from common.settings import RunSettings
from common.streams import DECISIONS
from trainer_node import checkpoint, run_folder
from trainer_node.assembly import build_loop, choose_device, prepare_task
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_buffer import make_buffer
from trainer_node.connection import Connection
from trainer_node.display import Display
from trainer_node.housekeeping import Housekeeping
from trainer_node.links import DecisionSource, RecordedDecisions
from trainer_node.loop import Loop
from trainer_node.memory_report import MemoryReports
from trainer_node.other_rank import OtherRank
from trainer_node.out_of_memory import MemoryExhausted
from trainer_node.parallel import on_ranks
from trainer_node.provenance import provenance, write_provenance
from trainer_node.ranks import Ranks, ranks_of_environment, told_plainly
from trainer_node.read_out import check_read_out
from trainer_node.run_folder import RunFolder, newest_checkpoint
from trainer_node.shared_checkpoints import AnyCheckpoints, SharedCheckpoints
from trainer_node.shared_decisions import SharedDecisions
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
    with ExitStack() as open_things:
        ranks = open_things.enter_context(_ranks(job))
        is_first = ranks.rank == 0
        start_from, passed_over = _same_start(job, ranks)
        task = _task(job, ranks)
        made_with = provenance() if is_first else {}  # before the first message: the code as it is now
        node = _connect(job, ranks, open_things, stop, start_from)
        links, is_told_to_stop = _links(node, recorded, ranks, stop)
        if start_from is None and is_first:
            run_folder.create(job.run.path.parent, job.run.run_id, job.settings, again=job.resume)
        ranks.any(False)  # the other ranks park tensors in that folder
        checkpoints = _checkpoints(job, node, task)
        open_things.callback(checkpoints.close)
        housekeeping = Housekeeping(node.emit, checkpoints)

        def between_steps(loop: Loop) -> None:
            housekeeping(loop)
            node.step = loop.progress.step
            node.repeat_start_if_lost()
            loop.stop_requested = loop.stop_requested or is_told_to_stop()

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
        resumed_from = start_from.name if start_from else ""
        if isinstance(node, Connection):
            write_provenance(made_with, job.run.path)
            _begin(job, node, loop, open_things, held_out=housekeeping.last_loss, resumed_from=resumed_from)
        for reason in passed_over:
            node.alarm(f"passed over: {reason}", kind="checkpoint_passed_over", severity="warning")
        loop.ledger.start()
        if start_from is None:
            housekeeping.begin(loop)
        exhausted: MemoryExhausted | None = None
        try:
            with told_plainly():
                loop.run()
        except MemoryExhausted as error:
            exhausted = error  # the state is that before the step that did not fit: it is saved
        if not ranks.any(node.fenced is not None):  # else the folder is the newer trainer's
            _end(job, node, loop, housekeeping, made_with)
    return _ended(ranks, node.fenced, exhausted or _fault_of(housekeeping, checkpoints))


def _ended(ranks: Ranks, fenced: Fenced | None, fault: HybridError | None) -> int:
    """0, raised faults apart. Where a newer trainer has the run torchrun must not start this one again."""
    if fenced is not None and ranks.size > 1:
        print(f"trainer-node: {fenced}", file=sys.stderr, flush=True)
        return 0
    if fenced is not None or fault is not None:
        raise fenced or fault  # type: ignore[misc]
    return 0


def _ranks(job: TrainerJob) -> AbstractContextManager[Ranks]:
    trainer = job.settings.trainer
    return ranks_of_environment(trainer.parallel.kind, on_gpu=choose_device(trainer).type == "cuda")


def _task(job: TrainerJob, ranks: Ranks) -> Task:
    """Rank 0 first: it writes the cache of tokens that the others read."""
    if ranks.rank > 0:
        ranks.any(False)
    task = prepare_task(job.settings.trainer)
    if ranks.rank == 0:
        ranks.any(False)
    return on_ranks(task, job.settings.trainer, ranks)


def _checkpoints(job: TrainerJob, node: Connection | OtherRank, task: Task) -> AnyCheckpoints:
    settings, root, ranks = job.settings.trainer.checkpoint, job.run.trainer_checkpoints, task.split.ranks
    kept = None
    if ranks.rank == 0:
        kept = Checkpoints(
            root, keep=settings.keep, on_failure=node.alarm,
            buffer=make_buffer(settings.staging, task.device), has_process=True,
        )  # fmt: skip
    return kept if kept is not None and ranks.size == 1 else SharedCheckpoints(kept, root, ranks)


def _fault_of(housekeeping: Housekeeping, checkpoints: AnyCheckpoints) -> HybridError | None:
    if housekeeping.fault:
        return UserError(housekeeping.fault)
    if checkpoints.last_failed:
        return EnvironmentFault(
            "the last checkpoint could not be saved: what came after the one before is lost"
        )
    return None


def _connect(
    job: TrainerJob, ranks: Ranks, open_things: ExitStack, stop: threading.Event, start_from: Path | None
) -> Connection | OtherRank:
    """Of one generation on all ranks."""
    generation, step = sealed_folder.age_key(start_from.name)[:2] if start_from else (0, 0)
    node: Connection | OtherRank = OtherRank(step=step)
    if ranks.rank == 0:
        node = Connection(
            job.run, job.settings, job.redis_url, open_things, stop, step=step, saved_generation=generation
        )
    node.generation = int(ranks.broadcast(str(node.generation).encode()))
    return node


def _links(
    node: Connection | OtherRank, recorded: list[PhaseDecision] | None, ranks: Ranks, stop: threading.Event
) -> tuple[DecisionSource, Callable[[], bool]]:
    """Where decisions come from, and whether the run was told to stop: the same on all ranks."""
    mine: DecisionSource | None = None
    if isinstance(node, Connection):
        recording = RecordedDecisions(recorded or [], generation=node.generation)
        mine = node.open_inbox() if recorded is None else recording
    if ranks.size == 1 and mine is not None:
        return mine, stop.is_set
    shared = SharedDecisions(mine, ranks, is_told_to_stop=stop.is_set)
    return shared, lambda: shared.stop_agreed


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
    job: TrainerJob,
    node: Connection | OtherRank,
    loop: Loop,
    housekeeping: Housekeeping,
    made_with: dict[str, Any],
) -> None:
    """The last checkpoint, the last word, the summary."""
    status = "finished" if loop.is_over else "stopped"
    housekeeping.end(loop, emergency=status == "stopped")
    if loop.task.split.ranks.rank > 0:
        return
    node.emit(RunEnded(step=loop.progress.step, reason=status))
    summary = build_summary(
        loop, housekeeping, run_id=job.run.run_id, status=status, late=node.late, made_with=made_with
    )
    write_summary(job.run.summary, summary)


def _same_start(job: TrainerJob, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """Where rank 0 finds that all go on; only it is told what was passed over."""
    found, passed_over = _checkpoint_to_resume(job) if ranks.rank == 0 else (None, [])
    name = ranks.broadcast(found.name.encode() if found is not None else b"").decode()
    return (job.run.trainer_checkpoints / name if name else None), passed_over


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
