"""Committed results: docs/evidence/<task>.<rule>.json, one per finished race, read strictly.

`<rule>` is `fitted` for as many earlier runs as the goal is stated for, and `fitted-N` for another number.
A file is written by a race (`write_report` puts it beside report.json; copy it to docs/evidence), never
typed. Figures are finite or null; null with `misses` above zero is "never", and a ratio is null where
neither side or only the arm reached the target. `python -m trainer_node.race.evidence` renders
docs/evidence.md from all files (evidence_page.py); a test fails when the two differ.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from common.errors import HybridError, SettingsError
from trainer_node.race.arm_table import ARMS, GROUPS
from trainer_node.race.figures import ArmFigures, RaceFigures
from trainer_node.race.rules import RULES as RACE_RULES
from trainer_node.race.rules import headline_arm
from trainer_node.race.words import JUMPING_ARM

RULES = tuple(RACE_RULES)
FOLDER = Path("docs/evidence")
PAGE = Path("docs/evidence.md")
GOAL_FITTED_ON = 4  # earlier runs


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmEvidence:
    config: Mapping[str, Any]
    passes_median: float | None
    seconds_median: float | None  # predictor on the trainer's core
    ratio_median: float | None  # seconds of the reference / seconds of this arm, per seed
    ratio_low95: float | None
    ratio_high95: float | None
    final_quality_median: float | None  # held-out loss after base_steps
    misses: int  # seeds that never reached the target
    # From here on a file may leave keys out.
    seconds_free_core_median: float | None = None
    ratio_free_core_median: float | None = None
    ratio_passes_median: float | None = None
    final_quality_equal_passes_median: float | None = None  # for the passes of base_steps plain steps
    sign_test_p: float | None = None
    plain_arm: str = ""  # the same optimizer without the method
    reading: str = ""
    at_most: int = 0
    cosine_median: float | None = None
    coverage_80: float | None = None
    forecasts: int = 0
    verdicts: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairEvidence:
    """seconds of `versus` / seconds of `arm`, per seed."""

    arm: str
    versus: str
    ratio_median: float | None
    ratio_low95: float | None
    ratio_high95: float | None
    wins: int
    losses: int
    sign_test_p: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    task: str
    rule: str  # one of RULES
    target: float
    seeds: tuple[int, ...]
    trials: int
    machine: str
    date: str
    command: str
    base_steps: int
    arms: Mapping[str, ArmEvidence]
    # From here on a file may leave keys out.
    reference_arm: str = ""
    headline_arm: str = ""
    pairs: tuple[PairEvidence, ...] = ()  # the headline arm and the one that jumps against all others; parts
    missing: tuple[str, ...] = ()
    in_distribution: tuple[str, ...] = ()
    fitted_on: int = 0  # earlier runs; 0: none, or as many as the goal is stated for
    notes: tuple[str, ...] = ()

    @property
    def is_as_the_goal(self) -> bool:
        """Fitted on as many runs as the goal is stated for, if at all."""
        return self.fitted_on in (0, GOAL_FITTED_ON)

    @property
    def full_rule(self) -> str:
        return self.rule if self.is_as_the_goal else f"{self.rule}-{self.fitted_on}"

    @property
    def file_name(self) -> str:
        return f"{self.task}.{self.full_rule}.json"

    def against(self, versus: str, *, arm: str = "") -> PairEvidence | None:
        """The headline arm, or `arm`, against another one."""
        arm = arm or self.headline_arm
        return next((pair for pair in self.pairs if (pair.arm, pair.versus) == (arm, versus)), None)


def evidence_of(figures: RaceFigures) -> Evidence:
    """Raises ValueError while the target is unknown."""
    race = figures.race
    if race.target is None:
        raise ValueError("a race without a target is no evidence")
    ours = headline_arm(race.arms, race.rule)
    told = {(part.arm, part.versus) for part in RACE_RULES[race.rule].parts}
    told |= {(arm, plain) for arm in GROUPS.get(ours, ()) for plain in race.arms}
    return Evidence(
        task=race.task,
        rule=race.rule,
        target=race.target,
        seeds=race.seeds,
        trials=race.trials,
        machine=race.machine,
        date=race.date,
        command=race.command,
        base_steps=race.base_steps,
        arms={arm.arm: _arm_evidence(arm) for arm in figures.arms},
        reference_arm=race.reference_arm,
        headline_arm=ours,
        pairs=tuple(
            PairEvidence(
                arm=pair.arm,
                versus=pair.versus,
                ratio_median=_finite(pair.ratio.median),
                ratio_low95=_finite(pair.ratio.low95),
                ratio_high95=_finite(pair.ratio.high95),
                wins=pair.ratio.wins,
                losses=pair.ratio.losses,
                sign_test_p=pair.ratio.sign_p,
            )
            for pair in figures.pairs
            if pair.arm in (ours, JUMPING_ARM) or (pair.arm, pair.versus) in told
        ),
        missing=figures.missing,
        notes=race.remarks,
        in_distribution=race.in_distribution,
        fitted_on=race.fitted_on,
    )


def _arm_evidence(arm: ArmFigures) -> ArmEvidence:
    return ArmEvidence(
        config=dict(arm.config),
        passes_median=_finite(arm.cost_median("passes")),
        seconds_median=_finite(arm.cost_median("seconds")),
        seconds_free_core_median=_finite(arm.cost_median("trainer_seconds")),
        ratio_median=_finite(arm.ratio.median),
        ratio_low95=_finite(arm.ratio.low95),
        ratio_high95=_finite(arm.ratio.high95),
        ratio_free_core_median=_finite(arm.ratio_free_core.median),
        ratio_passes_median=_finite(arm.ratio_passes.median),
        final_quality_median=_finite(arm.final_quality_median),
        final_quality_equal_passes_median=_finite(arm.final_quality_equal_passes_median),
        misses=arm.misses,
        sign_test_p=arm.ratio.sign_p,
        plain_arm=ARMS[arm.arm].wraps if arm.arm in ARMS else "",
        reading=arm.reading,
        at_most=arm.at_most,
        cosine_median=_finite(arm.cosine_median),
        coverage_80=arm.calibration.covered_80 if arm.calibration else None,
        forecasts=arm.calibration.points if arm.calibration else 0,
        verdicts=dict(arm.verdicts),
        peak_bytes=arm.peak_bytes,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(folder: Path, evidence: Evidence) -> Path:
    """Byte for byte the same for equal evidence. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / evidence.file_name
    text = json.dumps(dataclasses.asdict(evidence), indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read(path: Path) -> Evidence:
    """Raises SettingsError, one line, for anything that is not evidence."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        evidence: Evidence = _parsed(Evidence, values, "evidence")
        _check(evidence)
    except (ValueError, OSError) as error:
        raise SettingsError(f"{path}: {error}; write it with the race, not by hand") from None
    if evidence.file_name != path.name:
        raise SettingsError(
            f"{path}: holds {evidence.task}, {evidence.full_rule}: name it {evidence.file_name}"
        )
    return evidence


def read_all(folder: Path) -> list[Evidence]:
    """Sorted by file name; audits (`<task>.audit.json`) are not evidence of a race."""
    paths = sorted(folder.glob("*.json"))
    return [read(path) for path in paths if not path.name.endswith(".audit.json")]


def _parsed(kind: type, values: Any, where: str) -> Any:
    """JSON -> dataclass by its annotations. Raises ValueError naming the place."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not an object")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"{where} has the unknown key '{unknown[0]}'")
    required = {
        name
        for name, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    if absent := sorted(required - values.keys()):
        raise ValueError(f"{where} lacks the key '{absent[0]}'")
    hints = get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _parsed(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(parts[0], item, where) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any or (origin is UnionType and value is None):
        return value
    wanted = float if origin is UnionType else hint
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float and is_number:
        return float(value)
    if wanted in (int, str) and type(value) is wanted:
        return value
    raise ValueError(f"{where} is {value!r}, not {getattr(wanted, '__name__', wanted)}")


def _check(evidence: Evidence) -> None:
    """What types cannot say. Raises ValueError."""
    if evidence.rule not in RULES:
        raise ValueError(f"evidence.rule is '{evidence.rule}'; rules: {', '.join(RULES)}")
    if not evidence.seeds or len(set(evidence.seeds)) != len(evidence.seeds):
        raise ValueError("evidence.seeds is empty or names a seed twice")
    named = {evidence.headline_arm, evidence.reference_arm, *(p.versus for p in evidence.pairs)} - {""}
    strangers = sorted(named - evidence.arms.keys() - GROUPS.keys())
    if strangers and not evidence.missing:
        raise ValueError(f"evidence.arms lacks '{strangers[0]}'")
    for name, arm in evidence.arms.items():
        if not 0 <= arm.misses <= len(evidence.seeds):
            raise ValueError(f"evidence.arms.{name}.misses is {arm.misses} of {len(evidence.seeds)} seeds")
        if arm.seconds_median is None and not arm.misses and not evidence.missing:
            raise ValueError(f"evidence.arms.{name} has no seconds and no misses that would explain it")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def main(arguments: list[str]) -> int:
    """`python -m trainer_node.race.evidence` in the repository's root writes docs/evidence.md."""
    from trainer_node.race.evidence_page import render

    if arguments:
        print("python -m trainer_node.race.evidence takes no arguments", file=sys.stderr)
        return 2
    try:
        text = render(FOLDER)
    except HybridError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE} written from {len(list(FOLDER.glob('*.json')))} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
