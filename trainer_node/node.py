"""The trainer process: joins the loop to bus, run folder and terminal, and takes them apart again.

Order matters: settings and data are checked first, then the server is reached, then the run folder is
opened, so that a mistake leaves nothing behind. On SIGTERM, Ctrl-C or a lost parent the run comes to
rest, writes an emergency checkpoint and says how to go on.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from common import features, sealed_folder
from common.bus import Bus, EntryId
from common.clock import SystemClock
from common.config import dump_settings
from common.errors import EnvironmentFault, Fenced, HybridError, UserError
from common.heartbeat import Heartbeats, NodeStatus
from common.messages import Alert, Message, Metric, PhaseDecision, RunEnded, RunStarted
from common.open_bus import open_bus
from common.outbox import Outbox
from common.publisher import Publisher
from common.recording import messages_of, read_recording
from common.settings import RunSettings
from common.streams import DECISIONS, HISTORY, TRAINER, notes_of
from trainer_node import checkpoint, run_folder
from trainer_node.assembly import build_loop, prepare_task, run_started
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_buffer import make_buffer
from trainer_node.display import Display
from trainer_node.housekeeping import Housekeeping
from trainer_node.inbox import Inbox
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

OUTBOX_ENTRIES = 20_000  # about 30 MB; at 10 steps a second, half an hour without a server
PREDICTOR_START_SECONDS = 60.0
LAST_WORDS_SECONDS = 5.0


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
        node = _Connection(job, open_things, stop, start_from)
        links = node.links(recorded)
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
        node.begin(
            loop,
            task,
            held_out=housekeeping.last_loss,
            resumed_from=start_from.name if start_from else "",
        )
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
            node.end(loop, housekeeping)
    fault = node.fenced or exhausted or _fault_of(housekeeping, checkpoints)
    if fault is not None:
        raise fault
    return 0


def _checkpoints(job: TrainerJob, node: _Connection, task: Task) -> Checkpoints:
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


class _Connection:
    """Bus, metrics and terminal of one trainer process."""

    def __init__(
        self, job: TrainerJob, open_things: ExitStack, stop: threading.Event, start_from: Path | None
    ) -> None:
        self._job, self._open, self._stop = job, open_things, stop
        self.step = sealed_folder.age_key(start_from.name)[1] if start_from else 0
        self.fenced: Fenced | None = None
        self._made_with = provenance()
        self._inbox: Inbox | None = None
        self._started: RunStarted | None = None
        self._resets = 0
        self._clock = SystemClock()
        self._bus = self._open_bus()
        self.generation = self._bus.next_generation(TRAINER, at_least=self._newest_generation(start_from) + 1)
        publisher = Publisher(
            self._bus, writer=TRAINER, generation=self.generation, clock=self._clock, rng=random.Random()
        )
        self._outbox = Outbox(publisher, capacity=OUTBOX_ENTRIES, on_fenced=self._on_fenced)
        self._listeners: list[Callable[[Message], None]] = [self._outbox.put]

    def links(self, recorded: list[PhaseDecision] | None) -> DecisionSource:
        if recorded is not None:
            return RecordedDecisions(recorded, generation=self.generation)
        monitor = self._job.settings.monitor
        self._inbox = Inbox(
            self._open_bus(),
            generation=self.generation,
            silent_seconds=monitor.silent_seconds,
            stop=self._stop,
            clock=self._clock,
            rng=random.Random(),
            asked_by=lambda: EntryId(self.generation, self._outbox.next_sequences.get(HISTORY, 1) - 1),
        )
        self._open.callback(self._inbox.close)
        return self._inbox

    def _newest_generation(self, start_from: Path | None) -> int:
        """That anybody knows of: a server may have lost its counter, a start may have left no checkpoint."""
        written = max(self._bus.last_id(stream).generation for stream in (HISTORY, notes_of(TRAINER)))
        saved = sealed_folder.age_key(start_from.name)[0] if start_from else 0
        return max(written, saved, run_folder.last_generation(self._job.run))

    def begin(self, loop: Loop, task: Task, *, held_out: float, resumed_from: str) -> None:
        """From here on things are written: metrics, event files, messages."""
        settings = self._job.settings
        sinks = MetricSinks(self._job.run.metrics, self._job.run.tensorboard, self.alarm)
        display = Display(
            total_steps=settings.trainer.steps,
            first_step=loop.progress.step,
            units_per_step=task.units_per_step,
            unit=task.unit,
        )
        display.start_from(loop.ledger.verdicts, loop.ledger.virtual_steps, held_out)
        self._open.callback(display.close)
        run_folder.remember_generation(self._job.run, self.generation)
        write_provenance(self._made_with, self._job.run.path)
        if task.tokenizer_path is not None:
            shutil.copyfile(task.tokenizer_path, self._job.run.tokenizer)
        self._open.callback(sinks.close)
        self._listeners += [sinks.put, display.put]
        self._open.callback(self._say_last_words)
        self._started = run_started(
            loop,
            run_id=self._job.run.run_id,
            settings_toml=dump_settings(settings),
            resumed_from=resumed_from,
            feature_version=features.VERSION,
        )
        self.emit(self._started)
        heartbeats = Heartbeats(
            self._outbox,
            node=TRAINER,
            generation=self.generation,
            seconds=settings.monitor.heartbeat_seconds,
            clock=self._clock,
            status=self._status,
        )
        self._open.callback(heartbeats.close)
        if settings.trainer.decision_mode == "lockstep" and self._inbox and settings.predictor.enabled:
            self._wait_for_predictor(self._inbox)

    def _say_last_words(self) -> None:
        """What the server never got is lost with this process: people are told, in terminal and metrics."""
        if not self._outbox.close(LAST_WORDS_SECONDS) and self.fenced is None:
            self.alarm(f"{self._outbox.counters().queued} entries never reached a server", kind="unpublished")

    def _status(self) -> NodeStatus:
        outbox = self._outbox.counters()
        counts = (
            ("outbox_queued", outbox.queued, "entries"),
            ("outbox_dropped_observations", outbox.dropped_observations, "entries"),
            ("outbox_dropped_notes", outbox.dropped_notes, "entries"),
            ("late_decisions", self.late, "decisions"),
        )
        metrics = tuple(Metric(name=name, value=value, unit=unit) for name, value, unit in counts)
        state = "stopping" if self._stop.is_set() else "running"
        return NodeStatus(state=state, step=self.step, counters=metrics)

    def repeat_start_if_lost(self) -> None:
        """A server that lost or trimmed its data no longer says which run this is: say it again."""
        resets = self._inbox.resets + self._inbox.trims if self._inbox else 0
        if resets > self._resets and self._started is not None:
            self._resets = resets
            self.emit(replace(self._started, first_step=self.step))

    def emit(self, message: Message) -> None:
        for listener in self._listeners:
            listener(message)

    def alarm(self, text: str, *, kind: str = "trainer_fault", severity: str = "error") -> None:
        self.emit(Alert(node=TRAINER, severity=severity, kind=kind, text=text, step=self.step))

    @property
    def late(self) -> int:
        return self._inbox.stale if self._inbox else 0

    def end(self, loop: Loop, housekeeping: Housekeeping) -> None:
        """The last checkpoint, the last word, the summary."""
        status = "finished" if loop.progress.step >= self._job.settings.trainer.steps else "stopped"
        housekeeping.end(loop, emergency=status == "stopped")
        self.emit(RunEnded(step=loop.progress.step, reason=status))
        summary = build_summary(
            loop, housekeeping, run_id=self._job.run.run_id, status=status, late=self.late,
            made_with=self._made_with,
        )  # fmt: skip
        write_summary(self._job.run.summary, summary)

    def _wait_for_predictor(self, inbox: Inbox) -> None:
        if not inbox.wait_for_predictor(PREDICTOR_START_SECONDS):
            raise EnvironmentFault(
                f"no predictor answered within {PREDICTOR_START_SECONDS:.0f} s and decision_mode is lockstep;"
                " start `predictor-node serve`, or set trainer.decision_mode = live"
            )

    def _open_bus(self) -> Bus:
        bus = open_bus(self._job.redis_url, self._job.run.run_id)
        self._open.callback(bus.close)
        return bus

    def _on_fenced(self, error: Fenced) -> None:
        self.fenced = error
        self._stop.set()


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
