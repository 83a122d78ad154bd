"""`up`: one private server, predictor, monitor and trainer, each a process of its own, looked after.

The parent trains nothing. Children run in sessions of their own, so that Ctrl-C reaches only the
parent, which lets the trainer write its emergency checkpoint first. Each child holds the end of a pipe
from the parent: if the parent is killed, all of them stop by themselves. A predictor or monitor that
dies is started again; the server is looked after by its keeper (common/embedded_keeper.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from common.embedded import EmbeddedServer, start_server
from common.settings import RunSettings
from trainer_node import run_folder
from trainer_node.run_folder import RunFolder

POLL_SECONDS = 0.1
PAGE_START_SECONDS = 20.0
NODE_STOP_SECONDS = 15.0
TRAINER_STOP_SECONDS = 120.0  # an emergency checkpoint of a large model takes a while
RESTART_PAUSES_SECONDS = (0.2, 1.0, 3.0, 10.0)


def start_run(settings: RunSettings, *, run_id: str, runs_dir: Path) -> int:
    """A fresh run. Returns the trainer's exit code; raises UserError before anything is written."""
    from trainer_node.assembly import prepare_task

    run_folder.check_run_id(run_id)
    if run_folder.RunFolder(runs_dir / run_id).is_used:
        run_folder.create(runs_dir, run_id, settings)  # raises, before the data are prepared
    click.echo("preparing the data ...", err=True)
    task = prepare_task(settings.trainer)  # checks settings and data, and fills the token cache
    run = run_folder.create(runs_dir, run_id, settings)
    click.echo(f"task   {task.description}", err=True)
    del task
    return _run_nodes(run, settings)


def resume_run(path: Path) -> int:
    run, settings = run_folder.open_existing(path)
    folder, reasons = run_folder.newest_checkpoint(run, with_predictor=settings.predictor.enabled)
    for reason in reasons:
        click.echo(f"passed over: {reason}", err=True)
    click.echo(f"resume from {folder.name}", err=True)
    return _run_nodes(run, settings)


def _run_nodes(run: RunFolder, settings: RunSettings) -> int:
    stop = threading.Event()
    click.echo(f"run    {run.path}", err=True)
    with start_server() as server, _signals_set(stop):
        nodes = Nodes(run, settings, server)
        try:
            nodes.start()
            _show_page(nodes, run, settings)
            code = nodes.wait(stop)
        finally:
            nodes.stop()
    _show_end(run, code)
    return code


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
    server: EmbeddedServer
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
        for child in (*self.helpers, self.trainer):
            self._start(child)

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
                for child in self.helpers:
                    self._revive(child)
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
        environment = {**os.environ, "HPT_REDIS_URL": self.server.url, "PYTHONUNBUFFERED": "1"}
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


def _show_page(nodes: Nodes, run: RunFolder, settings: RunSettings) -> None:
    """Say where the live page is, once the monitor has a port. A missing page is no reason to stop."""
    if not settings.monitor.http:
        return
    deadline = time.monotonic() + PAGE_START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if address := nodes.page_address.read_text(encoding="utf-8").strip():
                click.echo(f"page   {address}", err=True)
                return
        trainer, monitor = nodes.trainer.process, nodes.helpers[0].process
        if trainer is not None and trainer.poll() is not None:
            return
        if monitor is not None and monitor.poll() is not None:
            break
        time.sleep(POLL_SECONDS)
    click.echo(f"page   not available; see {run.logs / 'monitor.log'}", err=True)


def _show_end(run: RunFolder, code: int) -> None:
    from trainer_node.summary import summary_lines

    if code != 0 or not run.summary.is_file():
        if run.trainer_checkpoints.is_dir():
            click.echo(f"go on with: trainer-node resume {run.path}", err=True)
        return
    for line in summary_lines(run.summary, run.path):
        click.echo(line)


@contextlib.contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a gentle stop; a second SIGINT is Python's own."""

    def ask(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
