"""Child processes of one run: monitor, predictor and trainer, started with one server's address.

Children run in sessions of their own, so that Ctrl-C reaches only the parent. Each holds the end of a pipe
from the parent: if the parent is killed, all of them stop by themselves. A monitor or predictor that dies
is started again. Trains nothing and says little: what people read is up.py's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from common.settings import RunSettings
from trainer_node.run_folder import RunFolder

POLL_SECONDS = 0.1
NODE_STOP_SECONDS = 15.0
TRAINER_STOP_SECONDS = 120.0  # an emergency checkpoint of a large model takes a while
RESTART_PAUSES_SECONDS = (0.2, 1.0, 3.0, 10.0)


@dataclass
class Child:
    name: str
    arguments: list[str]
    log: Path | None  # None: the terminal
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    restart_at_seconds: float = 0.0


@dataclass
class Nodes:
    """The child processes of one run."""

    run: RunFolder
    settings: RunSettings
    redis_url: str  # holds the password: it travels in the environment only
    trainer: Child = field(init=False)
    helpers: list[Child] = field(init=False)
    page_address: Path = field(init=False)

    def __post_init__(self) -> None:
        run, run_id = self.run, self.run.run_id
        self.page_address = run.path / "page.address"
        self.page_address.unlink(missing_ok=True)
        common = ["--run-id", run_id, "--stop-with-parent"]
        monitor = ["-m", "monitor_node", "serve", *common, "--record", str(run.recording)]
        if self.settings.monitor.http:
            monitor += ["--http", self.settings.monitor.http, "--address-file", str(self.page_address)]
        if self.settings.monitor.device:
            monitor += ["--device", self.settings.monitor.device]
        beat = ["--heartbeat-seconds", str(self.settings.monitor.heartbeat_seconds)]
        predictor = ["-m", "predictor_node", "serve", *common, *beat]
        predictor += ["--state-dir", str(run.predictor_checkpoints)]
        self.helpers = [Child("monitor", monitor, run.logs / "monitor.log")]
        if self.settings.predictor.enabled:
            self.helpers.append(Child("predictor", predictor, run.logs / "predictor.log"))
        trainer = ["-m", "trainer_node", "train", *common, "--resume", "--config", str(run.config)]
        self.trainer = Child("trainer", [*trainer, "--runs-dir", str(run.path.parent)], None)

    def start(self) -> None:
        self.start_helpers()
        self._start(self.trainer)

    def start_helpers(self) -> None:
        """Monitor and predictor alone: who calls is the trainer."""
        for child in self.helpers:
            self._start(child)

    def revive_helpers(self) -> None:
        """Start those again that have died. Never blocks."""
        for child in self.helpers:
            self._revive(child)

    def wait(self, stop: threading.Event) -> int:
        """Until the trainer ends. Starts helpers again that die; a first stop is passed on gently."""
        process = self.trainer.process
        assert process is not None
        asked = False
        while process.poll() is None:
            if stop.is_set() and not asked:
                asked = True
                click.echo("stopping: the trainer writes a checkpoint ...", err=True)
                process.send_signal(signal.SIGTERM)
            if not asked:
                self.revive_helpers()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
        return process.returncode if process.returncode >= 0 else 1

    def stop(self) -> None:
        """End all children: the trainer first, then those that listen to it."""
        for child in (self.trainer, *reversed(self.helpers)):
            seconds = TRAINER_STOP_SECONDS if child is self.trainer else NODE_STOP_SECONDS
            process = child.process
            if process is None:
                continue
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.page_address.unlink(missing_ok=True)

    def _start(self, child: Child) -> None:
        # The address holds the password: it travels in the environment, not on the command line.
        environment = {**os.environ, "HPT_REDIS_URL": self.redis_url, "PYTHONUNBUFFERED": "1"}
        with contextlib.ExitStack() as files:
            log = files.enter_context(child.log.open("ab")) if child.log is not None else None
            child.process = subprocess.Popen(
                [sys.executable, *child.arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _revive(self, child: Child) -> None:
        if child.process is None or child.process.poll() is None:
            return
        now = time.monotonic()
        if not child.restart_at_seconds:
            pause = RESTART_PAUSES_SECONDS[min(child.restarts, len(RESTART_PAUSES_SECONDS) - 1)]
            child.restart_at_seconds = now + pause
            if child.restarts < len(RESTART_PAUSES_SECONDS):  # then it has been said often enough
                click.echo(f"the {child.name} ended ({_why(child)}); training goes on", err=True)
        elif now >= child.restart_at_seconds:
            child.restarts += 1
            child.restart_at_seconds = 0.0
            self._start(child)


def _why(child: Child) -> str:
    """The exit code, and the last words of its log if they are for people."""
    assert child.process is not None
    code = f"code {child.process.returncode}"
    with contextlib.suppress(OSError, IndexError):
        if child.log is not None and (
            line := child.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1]
        ).startswith(f"{child.name}-node: "):
            return f"{code}: {line.partition(': ')[2]}"
    return code
