"""Commands of the trainer node. Only this file knows click; heavy imports wait until they are needed."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from common.command import redis_option, run_command
from common.config import dump_settings, load_settings, preset_names, setting_rows
from common.control_checks import usable
from common.errors import SettingsError
from common.parent import stop_on_signals, stop_when_parent_goes
from common.settings import RunSettings
from trainer_node.race.rules import RULES as RACE_RULES


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hybrid-predict-trainer")
def cli() -> None:
    """Train a network while another process predicts the run.

    \b
    Examples:
      trainer-node up                            train a small GPT on real text, all nodes
      trainer-node up --data ~/src --steps 2000  learn from a folder of code
      trainer-node presets                       ready-made settings
      trainer-node resume runs/<run_id>          go on after a crash or Ctrl-C
      trainer-node race digits --quick           is it faster? a race against other optimizers
    """


def _settings_options(command: Any) -> Any:
    options = [
        click.option("--preset", metavar="NAME", help="Ready-made settings; default: nano."),
        click.option(
            "--config", "config_file", type=click.Path(path_type=Path), help="A TOML run file, not a preset.",
        ),
        click.option("--data", metavar="PATH", help="File, folder or git repository to learn from."),
        click.option("--steps", type=int, metavar="N", help="Real optimizer steps."),
        click.option("--seed", type=int, metavar="N", help="Of weights, data order and samples."),
        click.option("--run-id", metavar="ID", help="Name of the run; default: preset and time."),
        click.option(
            "--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True,
            help="Where run folders live.",
        ),
        click.option(
            "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE",
            help="Change one setting; may be repeated.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


_dry_run = click.option(
    "--dry-run", is_flag=True, help="Print what the run would hold and say, in bytes; run nothing."
)


def _show_plan(settings: RunSettings) -> None:
    from trainer_node.dry_run import plan_lines

    click.echo("\n".join(plan_lines(settings)))


def _resolve(
    preset: str | None, config_file: Path | None, data: str | None, steps: int | None, seed: int | None,
    overrides: tuple[str, ...],
) -> RunSettings:  # fmt: skip
    extra = list(overrides)
    if data is not None:
        extra.append("trainer.data.path=" + _toml_string(str(Path(data).expanduser().absolute())))
    if steps is not None:
        extra.append(f"trainer.steps={steps}")
    if seed is not None:
        extra.append(f"trainer.seed={seed}")
    return usable(load_settings(preset=preset, file=config_file, overrides=extra))


def _toml_string(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise SettingsError(f"{text!r}: control characters cannot be part of a path here")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _run_id(run_id: str | None, preset: str | None, config_file: Path | None) -> str:
    from trainer_node.run_folder import check_run_id, fresh_run_id

    prefix = config_file.stem if config_file is not None else preset or "nano"
    chosen = run_id if run_id is not None else fresh_run_id(prefix, datetime.now())
    check_run_id(chosen)
    return chosen


@cli.command()
@_settings_options
@_dry_run
def up(
    preset: str | None, config_file: Path | None, data: str | None, steps: int | None, seed: int | None,
    run_id: str | None, runs_dir: Path, overrides: tuple[str, ...], dry_run: bool,
) -> None:  # fmt: skip
    """Run everything: private server, predictor, monitor with a live page, trainer.

    \b
    Examples:
      trainer-node up
      trainer-node up --preset digits
      trainer-node up --data book.txt --steps 500 --set trainer.optimizer.rate=0.002
      trainer-node up --set predictor.enabled=false     plain training, observed
      trainer-node up --set monitor.device=fake:demo    see the memory guard at work without a GPU
      trainer-node up --preset gpt2-small --dry-run     what it would hold, on any machine
    """
    settings = _resolve(preset, config_file, data, steps, seed, overrides)
    if dry_run:
        return _show_plan(settings)
    from trainer_node.up import start_run

    chosen_id, is_named = _run_id(run_id, preset, config_file), run_id is not None
    raise click.exceptions.Exit(start_run(settings, run_id=chosen_id, runs_dir=runs_dir, is_named=is_named))


@cli.command()
@redis_option
@_settings_options
@click.option(
    "--decisions", "decisions_file", type=click.Path(path_type=Path),
    help="Repeat the decisions of this recording; no predictor is needed.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint if there is one.")
@_dry_run
@click.option("--stop-with-parent", is_flag=True, hidden=True)
def train(
    redis_url: str | None, preset: str | None, config_file: Path | None, data: str | None, steps: int | None,
    seed: int | None, run_id: str | None, runs_dir: Path, overrides: tuple[str, ...],
    decisions_file: Path | None, resume: bool, dry_run: bool, stop_with_parent: bool,
) -> None:  # fmt: skip
    """Run the trainer alone, on a server that is there already.

    \b
    Examples:
      trainer-node train --redis redis://localhost:6379 --run-id first
      trainer-node train --redis unix:///tmp/redis.sock --run-id again --decisions runs/first/recording.hpt
    """
    _share_cores_politely()
    settings = _resolve(preset, config_file, data, steps, seed, overrides)
    if dry_run:
        return _show_plan(settings)
    chosen_id = _run_id(run_id, preset, config_file)
    stop = threading.Event()
    stop_on_signals(stop)
    if stop_with_parent:
        stop_when_parent_goes(stop)
    from trainer_node import run_folder
    from trainer_node.node import TrainerJob, run_trainer

    run = run_folder.RunFolder(runs_dir / chosen_id)
    if resume and run.config.is_file():
        run, settings = run_folder.open_existing(run.path)
    job = TrainerJob(
        run=run, settings=settings, redis_url=redis_url, decisions_file=decisions_file, resume=resume
    )
    raise click.exceptions.Exit(run_trainer(job, stop))


def _share_cores_politely() -> None:
    """Before torch is loaded: let idle OpenMP threads sleep soon instead of spinning.

    Measured on 2 cores, `nano`, seconds a step alone / beside an equal process (2026-11-20): libgomp's
    default 0.122 / over 2.4, 3000 turns 0.120 / 0.39, passive waiting 0.175 / 0.43.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
def resume(run_dir: Path) -> None:
    """Go on with a run that was stopped or killed, from its newest whole checkpoint.

    \b
    Example:
      trainer-node resume runs/nano-20261120-101500
    """
    from trainer_node.up import resume_run

    raise click.exceptions.Exit(resume_run(run_dir))


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--tokens", "max_tokens", type=click.IntRange(1, 100_000), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(0.0, 100.0), default=0.8, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=50, show_default=True, help="0 = all tokens.")
@click.option("--seed", type=int, default=0, show_default=True)
def sample(run_dir: Path, prompt: str, max_tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Continue a text with the model of a run.

    \b
    Example:
      trainer-node sample runs/nano-20261120-101500 --prompt "def main("
    """
    from trainer_node.sample_run import sample_run

    click.echo(
        sample_run(
            run_dir, prompt=prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
        )
    )


@cli.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the presets, or print one with all its settings.

    \b
    Examples:
      trainer-node presets
      trainer-node presets nano > my.toml
    """
    if name is not None:
        click.echo(dump_settings(load_settings(preset=name)), nl=False)
        return
    for known in preset_names():
        settings = load_settings(preset=known).trainer
        click.echo(
            f"{known:<12} {settings.task}, {settings.steps} steps, {settings.optimizer.name},"
            f" {settings.precision}, device {settings.device}"
        )


@cli.command("settings")
def list_settings() -> None:
    """List every setting: key, default, meaning.

    \b
    Example:
      trainer-node settings | grep optimizer
    """
    for name, default, meaning in setting_rows():
        click.echo(f"{name:<38} {default:<18} {meaning}")


@cli.command()
@click.argument("task", required=False)
@click.option("--arms", metavar="A,B", help="Default: all that belong to the rule; see --list.")
@click.option("--seeds", type=int, metavar="N", help="Initial weights and batches; default: 10.")
@click.option("--trials", type=int, metavar="N", help="Of tuning, for every arm alike; default: 8 or 16.")
@click.option("--rule", type=click.Choice(list(RACE_RULES)), help="Default: decayed; see --list.")
@click.option("--budget", "budget_minutes", type=float, metavar="MIN", help="Start no run after that.")
@click.option("--workers", type=int, metavar="N", help="Processes; default: physical cores.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: races/<task>.<rule>.")
@click.option("--data", metavar="PATH", help="Text to learn from.")
@click.option("--quick", is_flag=True, help="A smoke race: three arms, two seeds, short runs.")
@click.option("--coarse", is_flag=True, help="Lengths 10 % apart: a third of the runs, wider intervals.")
@click.option("--audit", is_flag=True, help="Judge the guard by the road not taken, instead of racing.")
@click.option("--fitted-on", type=int, metavar="N", help="First fit the predictor on N earlier runs.")
@click.option("--evidence", is_flag=True, help="Write docs/evidence/<task>.<rule>.json at the end.")
@click.option("--list", "show_list", is_flag=True, help="Tasks and arms with their meaning.")
def race(task: str | None, show_list: bool, **options: Any) -> None:
    """Race optimizers, ours among them, to the same held-out loss; goes on where it stopped.

    \b
    Examples:
      trainer-node race --list
      trainer-node race digits --quick
      trainer-node race text --data book.txt --arms adamw-decay,ours --seeds 5 --budget 60
      trainer-node race python --rule whole-stack --arms adamw-cosine,muon-decay,ours-muon --coarse
    """
    if show_list:
        from trainer_node.race.show import list_lines

        click.echo("\n".join(list_lines()))
        return
    if task is None:
        raise click.UsageError("name a task; `trainer-node race --list` shows them")
    from trainer_node.race.options import RaceOptions
    from trainer_node.race.race import race as run_race

    command = shlex.join(["trainer-node", *sys.argv[1:]])
    today = datetime.now().date().isoformat()
    raise click.exceptions.Exit(run_race(RaceOptions(task=task, command=command, today=today, **options)))


def main() -> None:
    run_command(cli.main, "trainer-node")
