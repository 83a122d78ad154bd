"""Commands of the predictor node. Only this file knows click.

`serve` runs the process, `replay` reads a recording, `fit` learns from recordings, `inspect` tells what was
learned. Exit codes: 0 good, 1 a failure of the environment or of `--check`, 2 the user's mistake.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import click

from common import sealed_folder
from common.clock import SystemClock
from common.command import redis_option, run_command
from common.errors import CheckpointError, RecordingError, SettingsError
from common.log import NodeLog
from common.messages import Phase
from common.open_bus import open_bus
from common.parent import stop_on_signals, stop_when_parent_goes
from common.recording import read_recording
from common.settings import MonitorSettings
from common.streams import PREDICTOR
from predictor_node.replay import Replayed, line_of, replay
from predictor_node.serve import Surroundings, serve
from predictor_node.state import FolderStore, MemoryStore, read_state


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hybrid-predict-trainer")
def cli() -> None:
    """Predict a training run: read its history, propose jumps.

    \b
    Examples:
      predictor-node serve --redis redis://localhost:6379 --run-id first
      predictor-node replay runs/first/recording.hpt --check
      predictor-node fit runs/*/recording.hpt --out job.hps
      predictor-node inspect runs/first
    """
    # Before torch is loaded. One thread: decisions must be the same bits whatever the machine's cores, and
    # the trainer needs them more.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@cli.command("serve")
@redis_option
@click.option("--run-id", required=True, metavar="ID", help="The run to serve.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep what was learned here, e.g. runs/ID/checkpoints/predictor; default: in memory only.",
)
@click.option(
    "--heartbeat-seconds",
    type=click.FloatRange(0.05, 60.0),
    default=MonitorSettings().heartbeat_seconds,
    show_default=True,
    help="Between signs of life.",
)
@click.option("--stop-with-parent", is_flag=True, hidden=True)
def serve_command(
    redis_url: str | None,
    run_id: str,
    state_dir: Path | None,
    heartbeat_seconds: float,
    stop_with_parent: bool,
) -> None:
    """Answer the decision points of one run until it ends.

    May be started before or after the trainer, and again after a crash: it goes on behind the
    newest state in --state-dir. While the server is away it waits. SIGTERM and Ctrl-C end it.

    \b
    Examples:
      predictor-node serve --redis redis://localhost:6379 --run-id first
      HPT_REDIS_URL=unix:///tmp/redis.sock predictor-node serve --run-id first --state-dir states
    """
    if (redis_url or "").startswith("embedded:"):
        raise SettingsError("embedded:// is a private server: nobody else could reach it; give its address")
    stop = threading.Event()
    stop_on_signals(stop)
    if stop_with_parent:
        stop_when_parent_goes(stop)
    around = Surroundings(
        clock=SystemClock(),
        rng=random.Random(),
        log=NodeLog(PREDICTOR, run_id),
        heartbeat_seconds=heartbeat_seconds,
        stays_after_end=stop_with_parent,
    )
    store = FolderStore(state_dir) if state_dir else MemoryStore()
    bus = open_bus(redis_url, run_id)
    try:
        serve(bus, run_id, store, stop, around)
    finally:
        bus.close()


@cli.command("replay")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Only compare; exit 1 with the first difference.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Predictor states, for a resume from what was not recorded; default: checkpoints/predictor"
    " beside FILE.",
)
def replay_command(file: Path, check: bool, state_dir: Path | None) -> None:
    """Make the decisions of a recorded run again.

    \b
    Examples:
      predictor-node replay runs/first/recording.hpt
      predictor-node replay runs/first/recording.hpt --check
    """
    recording = read_recording(file)
    beside = file.parent / "checkpoints" / "predictor"
    state_dir = state_dir or (beside if beside.is_dir() else None)
    try:
        replayed = replay(recording.entries, is_sealed=recording.sealed, state_dir=state_dir)
    except RecordingError as error:
        raise RecordingError(f"{file}: {error}") from None
    if not check:
        _show(replayed)
    for note in replayed.notes:
        click.echo(f"note: {note}", err=True)
    if replayed.gap:
        click.echo(f"{file}: {replayed.gap}", err=True)
    elif replayed.difference:
        click.echo(replayed.difference)
    else:
        click.echo(f"{len(replayed.decisions)} decisions reproduced byte for byte{_aside(replayed)}")
    raise click.exceptions.Exit(1 if replayed.gap or replayed.difference else 0)


@cli.command("fit")
@click.argument("recordings", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("predictor.hps"), show_default=True,
    metavar="FILE", help="Where the state goes.",
)  # fmt: skip
@click.option(
    "--updates", type=click.IntRange(0, 1_000_000), default=400, show_default=True,
    help="Of the networks, after all recordings were read.",
)  # fmt: skip
def fit_command(recordings: tuple[Path, ...], out: Path, updates: int) -> None:
    """Learn from recorded runs, oldest first, so that the next run of the job starts warm.

    \b
    Examples:
      predictor-node fit runs/*/recording.hpt --out job.hps
      trainer-node up --set predictor.policy=learned --set predictor.state=job.hps
    """
    from predictor_node.fit import fit

    fitted = fit(recordings, out, updates=updates, progress=lambda line: click.echo(line, err=True))
    click.echo(
        f"{out}: learned from {fitted.runs} runs, {fitted.steps} steps, {fitted.jumps} jumps;"
        f" use it with --set predictor.policy=learned --set predictor.state={out}"
    )


@cli.command("inspect")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), metavar="PNG", help="Draw it as well.")
def inspect_command(run_dir: Path, plot: Path | None) -> None:
    """What the learned policy of a run, or a fitted state, believes: arms, rewards, calibration.

    \b
    Examples:
      predictor-node inspect runs/first
      predictor-node inspect job.hps --plot job.png
    """
    from predictor_node.inspect import words

    state = _policy_state(run_dir)
    click.echo(words(state))
    if plot is not None:
        from predictor_node.inspect_picture import draw

        draw(state, plot)
        click.echo(f"picture: {plot}", err=True)


def _policy_state(path: Path) -> dict[str, object]:
    """Of a run folder's newest checkpoint, or of a fitted state. Raises CheckpointError."""
    from predictor_node.warm_start import read_warm_start

    if path.is_file():
        return dict(read_warm_start(path).values)
    folders = sealed_folder.folders(path / "checkpoints" / "predictor")
    if not folders:
        raise CheckpointError(f"{path}: holds no state of a predictor (checkpoints/predictor)")
    policy = read_state(folders[0]).learned.policy
    if policy is not None and policy.values.get("policy") == "resting":
        raise CheckpointError(f"{path}: this run is too short to try a jump: its predictor learned nothing")
    if policy is None or (policy.values.get("policy") != "learned" and "pilot" not in policy.values):
        raise CheckpointError(f"{path}: this run had a fixed policy: there is nothing it believes")
    return dict(policy.values)


def _show(replayed: Replayed) -> None:
    for decision in replayed.decisions:
        click.echo(line_of(decision))
    proposals = [decision for decision in replayed.decisions if decision.phase is Phase.PREDICT]
    virtual_steps = sum(decision.horizon_steps for decision in proposals)
    rests = len(replayed.decisions) - len(proposals)
    click.echo(f"{len(proposals)} proposals over {virtual_steps} virtual steps, {rests} rests")


def _aside(replayed: Replayed) -> str:
    parts = []
    if replayed.duplicates:
        parts.append(f"{replayed.duplicates} recorded twice")
    if replayed.unrecorded:
        parts.append(f"{replayed.unrecorded} not recorded before a crash")
    return f" ({', '.join(parts)})" if parts else ""


def main() -> None:
    run_command(cli, "predictor-node")
