"""Folds the messages of a run into one view of it. Pure: no bus, no clock, bounded memory.

The same fold feeds `monitor-node status`, the live page and the monitor's own decisions, so they
cannot disagree. Undone steps (a refused jump, a resume from an older checkpoint) are cut off the
curves; counters count every try. snapshot.py turns the view into a JSON-able dict.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace

from common import features
from common import messages as m
from common.config import settings_from_toml
from common.errors import SettingsError
from common.settings import RunSettings
from common.streams import MONITOR, NODES, STREAMS, TRAINER
from monitor_node import divergence
from monitor_node.checkpoint_checks import CheckpointRow, Found, with_row
from monitor_node.curves import RunCurves
from monitor_node.device import TrainerProcess
from monitor_node.divergence import DivergenceState
from monitor_node.liveness import Watch
from monitor_node.memory_facts import MemoryFacts
from monitor_node.order_log import OrderLog
from monitor_node.pace import WorthBook
from monitor_node.proposal_book import ProposalBook
from monitor_node.provenance import UNKNOWN, Provenance
from monitor_node.series import Curve
from monitor_node.stream_health import StreamBook
from monitor_node.thresholds import LevelState, limits_of, next_level
from monitor_node.timing import TimeBook, account_of

_LOSS = features.INDEX["loss"]
_SLOPE = features.INDEX["loss_slope_64"]
_UNITS_PER_STEP = features.INDEX["log10_units_per_step"]
_LATEST_UNIX_SECONDS = 1e11  # the year 5138
_MAX_METRICS = 128  # names of one node's health
_RATE_STEPS = 24  # heartbeats with progress over which the speed is averaged


@dataclass(frozen=True, kw_only=True, slots=True)
class AlertRow:
    alert: m.Alert
    at_unix_seconds: float


@dataclass(kw_only=True)
class RunView:
    run_id: str
    watch: Watch
    started: m.RunStarted | None = None
    started_at_unix_seconds: float | None = None
    settings: RunSettings = field(default_factory=RunSettings)
    has_settings: bool = False
    ended: m.RunEnded | None = None
    step: int = 0
    attempt: int = 0
    phase: m.Phase | None = None
    loss: float | None = None
    units_per_step: float | None = None
    fall_per_step: float | None = None  # of the training loss outside of probation, nats
    evaluation: m.Evaluation | None = None
    first_held_out_loss: float | None = None
    checkpoints: tuple[CheckpointRow, ...] = ()  # oldest first
    decision: m.PhaseDecision | None = None
    proposals: int = 0  # of jumps and of controls
    verdicts: Counter[m.Verdict] = field(default_factory=Counter)
    lost_steps: int = 0
    sample: m.VramSample | None = None
    level: LevelState = field(default_factory=LevelState)
    guard: MemoryFacts = field(default_factory=MemoryFacts)
    veto: m.PhaseVeto | None = None
    dead_letters: Counter[str] = field(default_factory=Counter)  # by stream
    divergence: DivergenceState = field(default_factory=DivergenceState)
    trainer_process: TrainerProcess | None = None
    health: dict[str, m.HealthSample] = field(default_factory=dict)
    time: TimeBook = field(default_factory=TimeBook)
    worth: WorthBook = field(default_factory=WorthBook)
    curves: RunCurves = field(default_factory=RunCurves)
    jumps: ProposalBook = field(default_factory=ProposalBook)
    alerts: deque[AlertRow] = field(default_factory=lambda: deque(maxlen=24))
    orders: OrderLog = field(default_factory=OrderLog)
    # What no message tells is set by the shell, which may ask the bus and the disk.
    stream_lengths: dict[str, int] = field(default_factory=dict)
    streams: StreamBook = field(default_factory=StreamBook)
    checkpoint_checks: dict[str, Found] = field(default_factory=dict)
    provenance: Provenance = UNKNOWN
    _accepted: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=4096))  # step, horizon
    _progress: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RATE_STEPS))
    _counted_virtual_steps: int = 0
    _told_unix_seconds: float = 0.0  # by the newest envelope
    _told_virtual_steps: int = 0  # by the last evaluation

    def fold(self, message: m.Message, *, sent_unix_seconds: float, at_seconds: float) -> None:
        """Take one message. `at_seconds`: when it arrived, on the monitor's own monotonic clock."""
        if not 0.0 <= sent_unix_seconds <= _LATEST_UNIX_SECONDS:  # an envelope without a time, or a wild one
            sent_unix_seconds = self._told_unix_seconds
        self._told_unix_seconds = sent_unix_seconds
        match message:
            case m.Observation():
                self._fold_observation(message, sent_unix_seconds)
            case m.Heartbeat():
                self._fold_heartbeat(message, sent_unix_seconds, at_seconds)
            case m.Outcome():
                self._fold_outcome(message, sent_unix_seconds)
            case m.PhaseDecision():
                self._fold_decision(message)
            case m.RunStarted():
                self._fold_started(message, sent_unix_seconds)
            case m.RunEnded():
                self.ended, self.step = message, message.step
                self.watch.run_ended = True
            case m.Evaluation():
                self.evaluation = message
                if self.first_held_out_loss is None:
                    self.first_held_out_loss = message.loss
                self.curves.held_out.add(message.step, message.loss)
                self._told_virtual_steps = message.virtual_steps
            case m.CheckpointWritten():
                row = CheckpointRow(written=message, at_unix_seconds=sent_unix_seconds, at_seconds=at_seconds)
                self.checkpoints = with_row(self.checkpoints, row)
            case m.VramSample():
                self._fold_sample(message, sent_unix_seconds)
                self.guard.fold_sample(message, at_seconds)
            case m.Alert():
                self.alerts.append(AlertRow(alert=message, at_unix_seconds=sent_unix_seconds))
            case m.HealthSample():
                self._fold_health(message)
            case _:
                self._fold_order_or_fault(message, sent_unix_seconds, at_seconds)

    @property
    def held_out(self) -> Curve:
        return self.curves.held_out

    @property
    def virtual_steps(self) -> int:
        """Of the jumps that were kept. A resumed run on a new server has its first jumps from the
        trainer's word only."""
        return max(self._counted_virtual_steps, self._told_virtual_steps)

    @property
    def steps_per_second(self) -> float | None:
        """Kept steps per second of the trainer's own clock; None before there is any progress."""
        if len(self._progress) < 2:
            return None
        (first_seconds, first_step), (last_seconds, last_step) = self._progress[0], self._progress[-1]
        if last_step <= first_step or last_seconds <= first_seconds:
            return None
        return (last_step - first_step) / (last_seconds - first_seconds)

    def _fold_started(self, message: m.RunStarted, sent_unix_seconds: float) -> None:
        self.started, self.started_at_unix_seconds = message, sent_unix_seconds
        self.ended, self.watch.run_ended = None, False
        try:
            self.settings = settings_from_toml(message.settings_toml)
            self.has_settings = True
            self.watch.silent_seconds = self.settings.monitor.silent_seconds
        except SettingsError as error:
            self._warn("settings_unreadable", f"settings of the run: {error}", sent_unix_seconds)
        if message.feature_version != features.VERSION:
            text = f"features are version {message.feature_version}, this monitor reads {features.VERSION}"
            text += ": loss and speed stay unknown; install one version"
            self._warn("feature_version", text, sent_unix_seconds)
        self._undo_above(message.first_step)
        self.jumps.started(message.generation)
        self.curves.controls.started(message.generation)
        self._told_virtual_steps = 0
        self.step = message.first_step
        self.guard.trainer_started()

    def _fold_observation(self, message: m.Observation, sent_unix_seconds: float) -> None:
        if message.attempt > self.attempt and message.step <= self.step:
            self._undo_above(message.step - 1)  # the trainer rolled back to a checkpoint
        self.step, self.attempt, self.phase = message.step, message.attempt, message.phase
        self.curves.stepped(message.step, message.phase, sent_unix_seconds)
        known = self.started is None or self.started.feature_version == features.VERSION
        if known and len(message.features) == len(features.NAMES):
            self.loss = message.features[_LOSS]
            self.divergence, _ = divergence.observed(
                self.divergence,
                step=message.step,
                phase=message.phase,
                loss=self.loss,
                gradient_norm=math.hypot(*message.gradient_norms),
            )
            if message.phase is not m.Phase.CORRECT:
                self.fall_per_step = -message.features[_SLOPE]
            self.units_per_step = 10.0 ** min(message.features[_UNITS_PER_STEP], 18.0)
            self.curves.train.add(message.step, self.loss)
            self.curves.used(message.step, self.units_per_step)
            self.curves.controls.observed(message.step, message.features)

    def _fold_heartbeat(self, message: m.Heartbeat, sent_unix_seconds: float, at_seconds: float) -> None:
        self.watch.heard(message, at_seconds=at_seconds)
        if message.node != TRAINER:
            return
        self.trainer_process = TrainerProcess.of(message, sent_unix_seconds)
        trainer = self.settings.trainer
        undone_steps = max(trainer.window_steps, trainer.controls.trial_steps)
        if self._progress and message.step < self._progress[-1][1] - undone_steps:
            self._progress.clear()  # a resume, not a refused jump or the twin of a trial
        if not self._progress or message.step != self._progress[-1][1]:
            self._progress.append((sent_unix_seconds, message.step))

    def _fold_decision(self, message: m.PhaseDecision) -> None:
        self.decision = message
        self.divergence = divergence.decided(self.divergence, message)
        self.jumps.decided(message)
        self.curves.controls.decided(message)
        if message.horizon_steps > 0 or message.phase is m.Phase.PREDICT:
            self.proposals += 1

    def _fold_outcome(self, message: m.Outcome, sent_unix_seconds: float) -> None:
        self.verdicts[message.verdict] += 1
        self.lost_steps += message.lost_steps
        goes_back = message.lost_steps > 0 and message.attempt > self.attempt
        self.attempt = message.attempt
        self.divergence, _ = divergence.settled(
            self.divergence, message, probation_steps=self.settings.trainer.probation_steps
        )
        # The verdict alone does not say: FAILED may be either, REFUSED too. Beside a twin the run has gone
        # back before: its steps are of this attempt already.
        if goes_back:
            self._undo_above(message.base_step)
            is_kept = message.verdict is m.Verdict.ACCEPTED  # the trial: those of its twin are undone
            self.step = message.base_step + (message.probation_steps if is_kept else 0)
        if message.verdict is m.Verdict.ACCEPTED:
            self._accepted.append((message.base_step, message.horizon_steps))
            self._counted_virtual_steps += message.horizon_steps
        self.jumps.settled(message, sent_unix_seconds)
        self.curves.settled(message)
        self.worth.add(message, self.fall_per_step)

    def _fold_sample(self, message: m.VramSample, sent_unix_seconds: float) -> None:
        self.sample = message
        limits = limits_of(self.settings.monitor, message.total_bytes)
        self.level = next_level(
            self.level, used_bytes=message.used_bytes, limits=limits, now_seconds=sent_unix_seconds
        )
        if message.used_bytes is not None:
            self.curves.memory.add(int(sent_unix_seconds), message.used_bytes)

    def _fold_health(self, message: m.HealthSample) -> None:
        """A sample says what it knows at its occasion: what it leaves out stands as it was."""
        before = self.health.get(message.node)
        if before is None and len(self.health) >= len(NODES):
            return
        metrics = {metric.name: metric for metric in (before.metrics if before else ())}
        for metric in message.metrics:
            if metric.name in metrics or len(metrics) < _MAX_METRICS:
                metrics[metric.name] = metric
        self.health[message.node] = replace(message, metrics=tuple(metrics.values()))
        account = account_of(message) if message.node == TRAINER else None
        if account is not None:
            self.time.add(account)

    def _fold_order_or_fault(self, message: m.Message, sent_unix_seconds: float, at_seconds: float) -> None:
        match message:
            case m.PhaseVeto():
                self.veto = message if message.active else None
            case m.MemoryOrder() | m.CheckpointRequest() | m.StopRequest():
                self.orders.asked(message, sent_unix_seconds)
                self.guard.fold_order(message, at_seconds)
            case m.MemoryReport():
                self.guard.fold_report(message)
                self.curves.holders.add(int(sent_unix_seconds), message)
            case m.OrderDone():
                self.guard.fold_done(message)
                self.orders.answered(message, sent_unix_seconds)
            case m.NodeLost():
                text = f"{message.node} has been silent for {message.silent_seconds:.1f} s"
                self._warn("node_lost", text, sent_unix_seconds, severity="error", step=message.last_step)
            case m.DeadLetter():
                self.dead_letters[message.stream if message.stream in STREAMS else ""] += 1
                text = f"{message.kind} {message.entry_id} on {message.stream} was given up: {message.error}"
                self._warn("dead_letter", text, sent_unix_seconds, severity="error", step=self.step)

    def _undo_above(self, step: int) -> None:
        """Cut off steps that a restore or a resume has undone."""
        self.curves.cut_above(step)
        self.worth.undo_from(step)
        while self._accepted and self._accepted[-1][0] >= step:
            self._counted_virtual_steps -= self._accepted.pop()[1]

    def _warn(
        self, kind: str, text: str, at_unix_seconds: float, *, severity: str = "warning", step: int = 0
    ) -> None:
        alert = m.Alert(node=MONITOR, severity=severity, kind=kind, text=text, step=step)
        self.alerts.append(AlertRow(alert=alert, at_unix_seconds=at_unix_seconds))
