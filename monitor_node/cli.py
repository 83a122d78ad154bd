"""Commands of the monitor node. Only this file knows click."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import click

from common.bus import Bus
from common.clock import SystemClock
from common.command import redis_option, run_command, warn_of_secret_in_arguments
from common.errors import UserError
from common.log import NodeLog
from common.open_bus import open_bus, url_or_environment
from common.parent import stop_on_signals, stop_when_parent_goes
from common.settings import MonitorSettings
from common.streams import MONITOR, NODES


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hybrid-predict-trainer")
def cli() -> None:
    """Watch a run: memory, nodes, predictions and their outcomes; a live page; a recording.

    \b
    Examples:
      monitor-node serve --redis redis://localhost:6379 --run-id first
      monitor-node status --redis redis://localhost:6379 --run-id first
      monitor-node record --redis redis://localhost:6379 --run-id first --out first.hpt
      monitor-node top --redis redis://localhost:6379 --run-id first
      monitor-node compare runs
      monitor-node acl --out users.acl
    """


def _bus_options(command: Any) -> Any:
    run_id = click.option("--run-id", required=True, metavar="ID", help="The run to watch.")
    return redis_option(run_id(command))


def _opened(redis_url: str | None, run_id: str) -> Bus:
    address = url_or_environment(redis_url, os.environ)
    if address.startswith("embedded://"):
        raise UserError("embedded:// starts a server of its own, without any run; give the run's address")
    return open_bus(address, run_id)


@cli.command()
@_bus_options
@click.option(
    "--http",
    default=MonitorSettings().http,
    show_default=True,
    metavar="HOST:PORT",
    help="Address of the live page; port 0 = any free one; empty = no page.",
)
@click.option(
    "--record", "record_file", type=click.Path(path_type=Path), help="Record the run into this file."
)
@click.option(
    "--address-file",
    type=click.Path(path_type=Path),
    help="Write the page's address into this file.",
)
@click.option(
    "--device",
    metavar="auto|cpu|cuda|fake:SCRIPT",
    help="Whose memory to watch; default: the run's. fake:demo plays every level without a GPU.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="Whoever has this token may act on the page; default: HPT_PAGE_TOKEN, else nobody may.",
)
@click.option("--webhook", metavar="URL", help="Post each new alert there as JSON; default: HPT_WEBHOOK.")
@click.option("--stop-with-parent", is_flag=True, hidden=True)
def serve(
    redis_url: str | None, run_id: str, http: str, record_file: Path | None, address_file: Path | None,
    device: str | None, token_file: Path | None, webhook: str | None, stop_with_parent: bool,
) -> None:  # fmt: skip
    """Watch a run until Ctrl-C: sample memory, give orders, serve the live page.

    \b
    Examples:
      monitor-node serve --redis redis://localhost:6379 --run-id first --http 127.0.0.1:8080
      monitor-node serve --redis unix:///tmp/redis.sock --run-id first --record first.hpt
      monitor-node serve --redis redis://localhost:6379 --run-id first --device fake:demo
      monitor-node serve --redis redis://localhost:6379 --run-id first --token-file page.token
    """
    from monitor_node.actions import is_readable_by_others, read_token
    from monitor_node.device_choice import DeviceChoice
    from monitor_node.serve import PageAddress, Surroundings
    from monitor_node.serve import serve as serve_run
    from monitor_node.web import split_address
    from monitor_node.webhook import WEBHOOK_VARIABLE, checked_url

    choose_device = DeviceChoice(device)
    token = read_token(token_file, os.environ)
    if token_file is not None and is_readable_by_others(token_file):
        click.echo(f"warning: others on this machine can read {token_file}; `chmod 600` it", err=True)
    webhook_url = webhook or os.environ.get(WEBHOOK_VARIABLE) or None
    if webhook_url is not None:
        checked_url(webhook_url)
    if webhook:
        warn_of_secret_in_arguments("the address in --webhook", WEBHOOK_VARIABLE)
    page = None
    if http:
        host, port = split_address(http)
        page = PageAddress(host=host, port=port, file=address_file)
    _opened(redis_url, run_id).close()  # a wrong address is the user's error, before a port is taken
    stop = threading.Event()
    stop_on_signals(stop)
    if stop_with_parent:
        stop_when_parent_goes(stop)
    around = Surroundings(clock=SystemClock(), log=NodeLog(MONITOR, run_id), choose_device=choose_device)
    serve_run(
        lambda: _opened(redis_url, run_id), run_id, stop, around,
        page=page, record_file=record_file, token=token, webhook_url=webhook_url,
    )  # fmt: skip


@cli.command()
@_bus_options
@click.option("--out", "out_file", required=True, type=click.Path(path_type=Path), help="File to write.")
def record(redis_url: str | None, run_id: str, out_file: Path) -> None:
    """Record a run into one file until it ends, or until Ctrl-C.

    A file that an earlier recorder of this run left unfinished is gone on with.

    \b
    Example:
      monitor-node record --redis redis://localhost:6379 --run-id first --out first.hpt
    """
    from monitor_node.record import record_run

    stop = threading.Event()
    stop_on_signals(stop)
    with contextlib.closing(_opened(redis_url, run_id)) as bus:
        entries = record_run(bus, run_id, out_file, stop, SystemClock(), NodeLog(MONITOR, run_id))
    click.echo(f"{out_file}: {entries} entries", err=True)


@cli.command()
@_bus_options
@click.option("--json", "is_json", is_flag=True, help="As JSON: there is no other form.")
@click.option(
    "--run-dir",
    "run_folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The run's folder: adds commit, changes and versions, and reads whether checkpoints are whole.",
)
def status(redis_url: str | None, run_id: str, is_json: bool, run_folder: Path | None) -> None:
    """Print all that the page shows of a run as one JSON object; exit 1 when there is no such run.

    \b
    Examples:
      monitor-node status --redis redis://localhost:6379 --run-id first | jq .progress
      monitor-node status --redis redis://localhost:6379 --run-id first --run-dir runs/first
    """
    from monitor_node.serve import read_run
    from monitor_node.snapshot import as_dict

    clock = SystemClock()
    with contextlib.closing(_opened(redis_url, run_id)) as bus:
        view = read_run(bus, run_id, clock, run_folder=run_folder)
    click.echo(json.dumps(as_dict(view, now_seconds=clock.monotonic()), indent=2, allow_nan=False))


@cli.command()
@_bus_options
def top(redis_url: str | None, run_id: str) -> None:
    """Watch a run in this terminal, for ssh; q or Ctrl-C leaves. Exit 1 when there is no such run.

    Without a terminal, or where TERM=dumb, it prints one screen. NO_COLOR is respected.

    \b
    Example:
      monitor-node top --redis redis://localhost:6379 --run-id first
    """
    from monitor_node.top import top as show

    stop = threading.Event()
    stop_on_signals(stop)
    with contextlib.closing(_opened(redis_url, run_id)) as bus:
        show(bus, run_id, SystemClock(), stop)


@cli.command()
@click.argument("runs_dir", type=click.Path(path_type=Path))
@click.option(
    "--http",
    default="127.0.0.1:8081",
    show_default=True,
    metavar="HOST:PORT",
    help="Address of the page; port 0 = any free one.",
)
def compare(runs_dir: Path, http: str) -> None:
    """Compare the runs of a folder on one page until Ctrl-C: curves, a table, CSV. Only reads files.

    \b
    Example:
      monitor-node compare runs
    """
    from monitor_node.runs_server import ComparePage
    from monitor_node.web import split_address

    host, port = split_address(http)
    stop = threading.Event()
    stop_on_signals(stop)
    with ComparePage(runs_dir, host=host, port=port) as page:
        click.echo(f"page   {page.url}/compare")
        stop.wait()


@cli.command()
@click.option(
    "--run-id",
    "run_pattern",
    default="*",
    show_default=True,
    metavar="PATTERN",
    help="Runs that the users may use; * and ? stand for any letters.",
)
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([*NODES, "page"]),
    help="Only this user; may be repeated. Default: all four.",
)
@click.option(
    "--out",
    "out_file",
    type=click.Path(path_type=Path),
    help="Write the ACL file there, for its owner only; default: print it.",
)
@click.option(
    "--passwords",
    "password_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write each password to DIR/ROLE, for HPT_REDIS_PASSWORD_FILE; default: print them once.",
)
def acl(
    run_pattern: str, roles: tuple[str, ...], out_file: Path | None, password_folder: Path | None
) -> None:  # fmt: skip
    """Make a Redis ACL file: a user for each node with the rights it needs and no more; `page` only reads.

    Needs Redis 7.0 or newer, or Valkey. Nothing is overwritten; the ACL file holds hashes, no password.

    \b
    Examples:
      monitor-node acl --out users.acl
      monitor-node acl --run-id 'nano-*' --out users.acl --passwords secrets
    """
    from monitor_node.acl import ROLES
    from monitor_node.acl_files import make_users

    for line in make_users(run_pattern, roles or ROLES, out_file=out_file, password_folder=password_folder):
        click.echo(line, err=True)


def main() -> None:
    run_command(cli, "monitor-node")
