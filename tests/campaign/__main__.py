"""The fault campaign: `python -m tests.campaign [--minutes N] [--seed S] [--out DIR]`.

Attacks whole runs of real processes until the time is up and says what became of them. Exit code 1 when a
promise was broken; the folders of the runs then stay for whoever looks into them.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click

from tests.campaign import table
from tests.campaign.campaign import LIVE, LOCKSTEP, Round, RoundPlan, differs_from_twin, play_round
from tests.campaign.plan import SENTINEL, SINGLE, faults, rules_of

STEPS = 3000
SENTINEL_EVERY = 4  # rounds: a pair can fail over only once, so these have few faults
SENTINEL_FAULTS = 3
LIVE_EVERY = 3


@click.command()
@click.option(
    "--minutes", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Then no new run."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the plan.")
@click.option("--steps", type=click.IntRange(200), default=STEPS, show_default=True, help="Of one run.")
@click.option(
    "--faults", "max_faults", type=click.IntRange(1), default=30, show_default=True, help="Of a run."
)
@click.option("--out", type=click.Path(path_type=Path), help="Where runs and report.json go.")
def main(minutes: float, seed: int, steps: int, max_faults: int, out: Path | None) -> None:
    """Attack runs for N minutes; print what was done, survived and lost."""
    began, date = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    folder = out or Path(tempfile.mkdtemp(prefix="hpt-campaign-"))
    plans = {kind: faults(seed, rules_of(kind, quick=False)) for kind in (SINGLE, SENTINEL)}
    rounds: list[Round] = []
    while len(rounds) < 2 or time.monotonic() - began < 60.0 * minutes:
        number = len(rounds)
        kind = SENTINEL if number and number % SENTINEL_EVERY == 0 else SINGLE
        settings = LIVE if number and number % LIVE_EVERY == 0 else LOCKSTEP
        mode = "live" if settings is LIVE else "lockstep"
        click.echo(f"run {number}: {f'{kind}, {mode}' if number else 'undisturbed'}", err=True)
        plan = RoundPlan(
            folder=folder / f"run-{number}", faults=plans[kind] if number else iter(()), steps=steps,
            kind=kind, seed=seed + number, settings=settings, say=lambda line: click.echo(line, err=True),
        )  # fmt: skip
        played = play_round(plan, SENTINEL_FAULTS if kind == SENTINEL else max_faults)
        twin = rounds[0] if rounds else played
        played = replace(played, violations=(*played.violations, *differs_from_twin(played, twin)))
        rounds.append(played)
        for text in played.violations:
            click.echo(f"VIOLATION {text}", err=True)
    command = f"python -m tests.campaign {shlex.join(sys.argv[1:])}"
    found = table.report(rounds, seed=seed, command=command, date=date, seconds=time.monotonic() - began)
    (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    click.echo(table.text(found))
    click.echo(f"everything is in {folder}", err=True)
    raise click.exceptions.Exit(1 if found["violations"] else 0)


if __name__ == "__main__":
    main()
