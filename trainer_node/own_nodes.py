"""What a loop of other people's is connected with: server, predictor, monitor, metrics.

ConnectedNodes talks over a server: its own ("embedded://", with predictor and monitor as processes) or
somebody's. InProcessNodes has a predictor in this process, in lockstep: reproducible, for tests and
notebooks. Decides nothing and touches no weights.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

import torch

from common import features
from common.clock import SystemClock
from common.config import dump_settings, settings_from_overrides
from common.embedded import start_server
from common.errors import UserError
from common.messages import HealthSample, Message, RunEnded
from common.settings import RunSettings
from common.streams import TRAINER
from common.trying import keeps_directions, why_never
from trainer_node import run_folder
from trainer_node.assembly import prediction_parts, run_started
from trainer_node.children import Nodes
from trainer_node.connection import Connection
from trainer_node.cycle import Cycle
from trainer_node.groups import ParameterGroup
from trainer_node.housekeeping import ACCOUNT_SECONDS, time_account
from trainer_node.links import DecisionSource
from trainer_node.memory_report import MemoryReports, Report, no_report
from trainer_node.prediction import PredictionParts
from trainer_node.race.in_process import InProcessPredictor, installed_predictor
from trainer_node.run_folder import RunFolder
from trainer_node.sinks import MetricSinks

EMBEDDED, IN_PROCESS = "embedded://", "memory://"
LOOK_AFTER_STEPS = 64


class OwnNodes(Protocol):
    settings: RunSettings
    run: RunFolder
    generation: int
    links: DecisionSource
    report: Report
    page: str

    def emit(self, message: Message) -> None: ...

    def begin(self, loop: Cycle, *, resumed_from: str) -> None:
        """Before the first step. Raises UserError where the folder holds another run."""

    def look_after(self, loop: Cycle) -> None:
        """Between two steps; waits for nothing."""

    def close(self, step: int, reason: str) -> None: ...


def own_settings(
    optimizers: Sequence[torch.optim.Optimizer],
    overrides: Sequence[str],
    steps: int,
    decay_start_step: int | None,
    *,
    is_counted: bool,
) -> RunSettings:
    """The settings of a run whose optimizer and schedule are the loop's. Raises SettingsError."""
    decayed_steps = 0 if decay_start_step is None else max(0, steps - decay_start_step)
    lines = [
        f"trainer.steps={steps}",
        "trainer.batch.sequences=1",  # what a step is cut into is the loop's business
        f"trainer.schedule.name={'wsd' if decayed_steps else 'constant'}",
        f"trainer.schedule.decay_share={decayed_steps / steps}",
        "trainer.schedule.warmup_steps=0",
        f"trainer.decision_mode={'lockstep' if is_counted else 'live'}",
    ]
    settings = settings_from_overrides([*lines, *overrides])
    group = optimizers[0].param_groups[0]
    beta1, beta2 = [float(beta) for beta in group.get("betas", (group.get("momentum", 0.0), 0.0))][:2]
    optimizer = replace(
        settings.trainer.optimizer,
        rate=float(group.get("initial_lr", group["lr"])),
        beta1=beta1,
        beta2=beta2,
        weight_decay=float(group.get("weight_decay", 0.0)),
    )
    return replace(settings, trainer=replace(settings.trainer, optimizer=optimizer))


def nodes_for(redis: str, settings: RunSettings, *, run_id: str, runs_dir: Path) -> OwnNodes:
    """Raises UserError, BusError, EnvironmentFault; then nothing is left running."""
    if not run_id:
        if redis not in (EMBEDDED, IN_PROCESS):
            raise UserError("give run_id: the one that predictor-node and monitor-node serve")
        run_id = _free_run_id(runs_dir)
    run_folder.check_run_id(run_id)
    if redis == IN_PROCESS:
        return InProcessNodes(settings, runs_dir, run_id)
    return ConnectedNodes(redis, settings, runs_dir, run_id)


def _free_run_id(runs_dir: Path) -> str:
    """Several runs of one process may begin within a second."""
    first = run_folder.fresh_run_id("own", datetime.now()) + f"-{os.getpid()}"
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (runs_dir / name).exists())


class _RunOnDisk:
    """The run folder, from its opening to the first metric."""

    def __init__(self, settings: RunSettings, runs_dir: Path, run_id: str) -> None:
        self.settings = settings
        self._was_used = RunFolder(runs_dir / run_id).is_used
        self.run = run_folder.create(runs_dir.absolute(), run_id, settings, again=True)
        self._open = ExitStack()

    def prediction_parts(
        self,
        groups: list[ParameterGroup],
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
    ) -> PredictionParts | None:
        if not keeps_directions(self.settings):
            return None
        return prediction_parts(groups, optimizers, self.settings.trainer, device, self.run.path)

    def _open_metrics(
        self, *, is_resumed: bool, on_failure: Callable[[str], None]
    ) -> Callable[[Message], None]:
        if self._was_used and not is_resumed:
            raise UserError(f"{self.run.path} holds a run already: give another run_id, or load its state")
        sinks = MetricSinks(self.run.metrics, self.run.tensorboard, on_failure)
        self._open.callback(sinks.close)
        return sinks.put


class InProcessNodes(_RunOnDisk):
    def __init__(self, settings: RunSettings, runs_dir: Path, run_id: str) -> None:
        super().__init__(settings, runs_dir, run_id)
        self.generation = run_folder.last_generation(self.run) + 1
        predictor = installed_predictor(self.run.predictor_checkpoints)
        self._predictor = InProcessPredictor(predictor, SystemClock())
        self.links: DecisionSource = self._predictor
        self.report: Report = no_report
        self.page = ""
        self._listeners: list[Callable[[Message], None]] = [self._predictor.emit]

    def emit(self, message: Message) -> None:
        for listener in self._listeners:
            listener(message)

    def begin(self, loop: Cycle, *, resumed_from: str) -> None:
        put = self._open_metrics(is_resumed=bool(resumed_from), on_failure=_say)
        run_folder.remember_generation(self.run, self.generation)
        self._listeners.append(put)
        self.emit(_started(loop, self.run, self.settings, resumed_from))

    def look_after(self, loop: Cycle) -> None:
        """There is nothing to look after."""

    def close(self, step: int, reason: str) -> None:
        self.emit(RunEnded(step=step, reason=reason))
        self._open.close()


class ConnectedNodes(_RunOnDisk):
    def __init__(self, redis: str, settings: RunSettings, runs_dir: Path, run_id: str) -> None:
        super().__init__(settings, runs_dir, run_id)
        self.page = ""
        self._children: Nodes | None = None
        self._next_look_step = 0
        self._next_account_seconds = 0.0
        with ExitStack() as undo:
            undo.callback(self._open.close)
            if redis == EMBEDDED:
                server = self._open.enter_context(start_server())
                redis = server.url
                self._children = Nodes(self.run, settings, redis)
                self._open.callback(self._children.stop)
                self._children.start_helpers()
            self._connection = Connection(self.run, settings, redis, self._open, threading.Event())
            self.links: DecisionSource = self._connection.open_inbox()
            undo.pop_all()
        self.generation = self._connection.generation
        self.report: Report = MemoryReports(self.emit)

    def emit(self, message: Message) -> None:
        self._connection.emit(message)

    def begin(self, loop: Cycle, *, resumed_from: str) -> None:
        put = self._open_metrics(is_resumed=bool(resumed_from), on_failure=self._connection.alarm)
        self._connection.begin(loop, resumed_from=resumed_from, listeners=[put])
        _say(f"run {self.run.path}")
        if why := why_never(self.settings):
            _say(f"plain training, observed: {why}")
        if self.settings.trainer.decision_mode == "lockstep" and self.settings.predictor.enabled:
            self._connection.wait_for_predictor()

    def look_after(self, loop: Cycle) -> None:
        self._connection.step = loop.progress.step
        if loop.ledger.total_seconds >= self._next_account_seconds:
            self._next_account_seconds = loop.ledger.total_seconds + ACCOUNT_SECONDS
            account = time_account(loop.ledger, self.generation)
            self.emit(HealthSample(node=TRAINER, step=loop.progress.step, metrics=account))
        if loop.progress.step < self._next_look_step:
            return
        self._next_look_step = loop.progress.step + LOOK_AFTER_STEPS
        self._connection.repeat_start_if_lost()
        if self._children is not None:
            self._children.revive_helpers()
            self._look_for_page(self._children.page_address)

    def _look_for_page(self, address: Path) -> None:
        with contextlib.suppress(OSError):
            found = address.read_text(encoding="utf-8").strip()
            if found and found != self.page:
                self.page = found
                _say(f"live page {found}")

    def close(self, step: int, reason: str) -> None:
        self.emit(RunEnded(step=step, reason=reason))
        self._open.close()


def _started(loop: Cycle, run: RunFolder, settings: RunSettings, resumed_from: str) -> Message:
    return run_started(
        loop,
        run_id=run.run_id,
        settings_toml=dump_settings(settings),
        resumed_from=resumed_from,
        feature_version=features.VERSION,
    )


def _say(text: str) -> None:
    print(f"hybrid: {text}", file=sys.stderr, flush=True)
