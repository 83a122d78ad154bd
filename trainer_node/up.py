"""`up`: one private server, predictor, monitor and trainer, each a process of its own, looked after.

The parent trains nothing: on Ctrl-C it lets the trainer write its emergency checkpoint first. The children
are children.py's; the server is looked after by its keeper (common/embedded_keeper.py).
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click

from common.control_checks import plan_words
from common.embedded import start_server
from common.settings import RunSettings
from trainer_node import run_folder
from trainer_node.children import POLL_SECONDS, Nodes
from trainer_node.run_folder import RunFolder

PAGE_START_SECONDS = 20.0


def start_run(settings: RunSettings, *, run_id: str, runs_dir: Path, is_named: bool = True) -> int:
    """A fresh run. Returns the trainer's exit code; raises UserError before anything is written.

    Not `is_named`: nobody chose the id, and where it is taken the run gets the next one.
    """
    from trainer_node.assembly import prepare_task
    from trainer_node.dry_run import plan_line

    run_folder.check_run_id(run_id)
    if is_named and run_folder.RunFolder(runs_dir / run_id).is_used:
        run_folder.create(runs_dir, run_id, settings)  # raises, before the data are prepared
    plan = plan_line(settings)  # raises for settings that no run can have
    click.echo("preparing the data ...", err=True)
    task = prepare_task(settings.trainer)  # checks settings and data, and fills the token cache
    create = run_folder.create if is_named else run_folder.create_next
    run = create(runs_dir, run_id, settings)
    click.echo(f"task   {task.description}", err=True)
    click.echo(f"memory {plan}", err=True)
    if words := plan_words(settings):
        click.echo(f"plan   {words}", err=True)
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
        nodes = Nodes(run, settings, server.url)
        try:
            nodes.start()
            _show_page(nodes, run, settings)
            code = nodes.wait(stop)
        finally:
            nodes.stop()
    _show_end(run, code)
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
