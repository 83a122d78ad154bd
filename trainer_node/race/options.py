"""What the user asked of `trainer-node race`, checked before anything is written, and the plan that follows.

Also keeps race.json, by which a folder knows its race: going on with other settings is refused, because
results are told apart by arm, config, length and seed alone. Runs nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common.config import dump_settings
from common.errors import SettingsError
from trainer_node.race.arms import with_settings
from trainer_node.race.plan import (
    COARSE_RATIO,
    MAX_SEEDS,
    QUICK_RATIO,
    QUICK_SHARE,
    RacePlan,
    chosen_arms,
)
from trainer_node.race.rules import RULES
from trainer_node.race.tasks import race_settings

RACES_DIR = Path("races")
FILE_NAME = "race.json"
DEFAULT_SEEDS = 10
QUICK_SEEDS, QUICK_TRIALS = 2, 1
MAX_TRIALS = 1_000
MAX_EARLIER_RUNS = 100


@dataclass(frozen=True, kw_only=True)
class RaceOptions:
    """None = not given."""

    task: str
    arms: str | None = None  # names, separated by commas
    seeds: int | None = None
    trials: int | None = None
    rule: str | None = None
    budget_minutes: float | None = None
    workers: int | None = None
    out: Path | None = None
    data: str | None = None
    quick: bool = False
    coarse: bool = False
    audit: bool = False
    fitted_on: int | None = None
    evidence: bool = False
    command: str = ""
    today: str = ""  # ISO

    @property
    def folder(self) -> Path:
        suffix = ".quick" if self.quick else ""
        return self.out or RACES_DIR / f"{self.task}.{self.race_rule}{suffix}"

    @property
    def race_rule(self) -> str:
        return self.rule or ("fitted" if self.fitted_on else "decayed")


def plan_of(options: RaceOptions) -> RacePlan:
    """Raises SettingsError: one line that names the choices."""
    base = race_settings(options.task, _absolute(options.data))
    _check_range("--seeds", options.seeds, 1, MAX_SEEDS)
    _check_range("--trials", options.trials, 1, MAX_TRIALS)
    _check_range("--workers", options.workers, 1, 1024)
    _check_range("--fitted-on", options.fitted_on, 1, MAX_EARLIER_RUNS)
    if options.budget_minutes is not None and not options.budget_minutes > 0:
        raise SettingsError(f"--budget {options.budget_minutes:g}: give minutes above 0")
    if (options.race_rule == "fitted") != bool(options.fitted_on):
        raise SettingsError("rule fitted and --fitted-on N belong together: N earlier runs are fitted on")
    if options.evidence and options.quick:
        raise SettingsError("a quick race is no evidence: leave out --quick or --evidence")
    rule = RULES.get(options.race_rule)  # an unknown one is answered by chosen_arms
    if options.trials is not None and rule is not None and not rule.tunes:
        raise SettingsError(f"rule {rule.name} tunes nothing: leave out --trials")
    arms = tuple(name.strip() for name in (options.arms or "").split(",") if name.strip())
    if options.quick:
        steps = max(1, base.trainer.steps // QUICK_SHARE)
        warmup_steps = min(base.trainer.schedule.warmup_steps, steps)
        base = with_settings(
            base, [("trainer.steps", steps), ("trainer.schedule.warmup_steps", warmup_steps)]
        )
        arms = arms or (rule.quick_arms if rule is not None else ())
    lattice: dict[str, Any] = {}
    if options.quick or options.coarse:
        lattice = {"lattice_ratio": QUICK_RATIO if options.quick else COARSE_RATIO, "bracket": 1}
    return RacePlan(
        task=options.task,
        rule=options.race_rule,
        base=base,
        arms=chosen_arms(options.race_rule, arms),
        seeds=tuple(range(options.seeds or (QUICK_SEEDS if options.quick else DEFAULT_SEEDS))),
        trials=options.trials or (QUICK_TRIALS if options.quick else _trials(options.race_rule)),
        **lattice,
    )


def _trials(rule: str) -> int:
    return RULES[rule].trials if RULES[rule].tunes else 1


def check_folder(options: RaceOptions, plan: RacePlan) -> str:
    """What is to be said about results that are there; "" = nothing.

    Raises SettingsError when the folder holds another race. More seeds, trials or arms are the same race.
    """
    path = options.folder / FILE_NAME
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        raise SettingsError(f"{path}: cannot be read; remove the folder or choose another --out") from None
    here = _identity(options, plan)
    if not isinstance(there, dict) or there.get("race") != here:
        raise SettingsError(
            f"{options.folder} holds a race with other settings (rule, data, length or --fitted-on):"
            " choose another --out"
        )
    if there.get("code") != code_fingerprint():
        return f"{options.folder}: runs that are there were made by another version of the code and are kept"
    return ""


def check_data(options: RaceOptions, data: str) -> None:
    """`data` describes them as they are now. Raises SettingsError when the race began with others: a file
    that was edited has the same name."""
    path = options.folder / FILE_NAME
    former = json.loads(path.read_text(encoding="utf-8")).get("data", data) if path.exists() else data
    if former != data:
        raise SettingsError(
            f"{options.folder} holds a race on other data ({former}; now {data}): choose another --out"
        )


def write_folder(options: RaceOptions, plan: RacePlan, *, data: str = "") -> None:
    """Creates race.json unless it is there. `data` describes them; "" = not known. Raises OSError."""
    path = options.folder / FILE_NAME
    if path.exists():
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    values = {"race": _identity(options, plan), "code": code_fingerprint(), "command": options.command}
    values |= {"data": data} if data else {}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


@functools.cache
def code_fingerprint() -> str:
    """Of the sources of all nodes, as they are installed, or were when this process first asked."""
    root = Path(common.__file__).parent.parent
    digest = hashlib.sha256()
    for package in ("common", "trainer_node", "predictor_node"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _identity(options: RaceOptions, plan: RacePlan) -> dict[str, Any]:
    return {
        "task": plan.task,
        "rule": plan.rule,
        "lattice_ratio": plan.lattice_ratio,
        "fitted_on": options.fitted_on or 0,
        "settings": hashlib.sha256(dump_settings(plan.base).encode()).hexdigest()[:12],
    }


def _absolute(data: str | None) -> str:
    return str(Path(data).expanduser().absolute()) if data else ""


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise SettingsError(f"{name} {value}: must be from {low} to {high}")
