"""Turns a race into files: report.json, table.txt, evidence, pictures and index.html. Computes no figure.

Works on a race that is not finished: whatever can be said is said, and what is missing is named.
report.json is strict JSON with sorted keys; an infinite or unknown figure is null, and `misses` says
which of the two. `schema` rises when a key changes its meaning.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import EnvironmentFault, SettingsError
from trainer_node.race import evidence, page, plots
from trainer_node.race.arms import ARMS
from trainer_node.race.figures import ArmFigures, RaceFigures, race_figures
from trainer_node.race.plan import RaceRecord
from trainer_node.race.run_result import RunResult
from trainer_node.race.timing import retimed
from trainer_node.race.words import ends, factor, headline, reservations

REPORT_SCHEMA = 1
COSTS = {"seconds": "seconds", "seconds_free_core": "trainer_seconds", "passes": "passes", "steps": "steps"}
COLUMNS = ("arm", "speed", "95 %", "won", "p", "seconds", "passes", "loss at T0", "missed", "read")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    figures: RaceFigures
    text: str  # for the terminal, as in table.txt
    page: Path  # index.html
    notes: tuple[str, ...]  # what could not be done, one line each with the cure


def write_report(out_dir: Path, race: RaceRecord, results: Iterable[RunResult]) -> Report:
    """Writes everything into `out_dir`, over what is there. Raises EnvironmentFault if it cannot."""
    read_mid_run = frozenset(arm for arm in race.arms if arm in ARMS and ARMS[arm].rule == "constant")
    figures = race_figures(race, retimed(results), read_mid_run=read_mid_run)
    text = table_text(figures)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "report.json").write_text(strict_json(report_values(figures)), encoding="utf-8")
        (out_dir / "table.txt").write_text(text + "\n", encoding="utf-8")
        if figures.arms and race.target is not None:
            evidence.write(out_dir, evidence.evidence_of(figures))
        pictures, notes = _pictures(out_dir, figures)
        index = out_dir / "index.html"
        index.write_text(page.page_html(figures, table_rows(figures), pictures, notes), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{out_dir}: the report cannot be written: {error.strerror}") from None
    return Report(figures=figures, text=text, page=index, notes=notes)


def _pictures(out_dir: Path, figures: RaceFigures) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Without matplotlib the numbers are still worth having."""
    try:
        return plots.draw_all(out_dir, figures), ()
    except SettingsError as error:
        return {}, (str(error),)


def report_values(figures: RaceFigures) -> dict[str, Any]:
    """The whole report as plain values; floats may be infinite or NaN (see strict_json)."""
    race = dataclasses.asdict(figures.race)
    race["tuned"] = {arm: dict(config) for arm, config in sorted(figures.race.tuned.items())}
    return {
        "schema": REPORT_SCHEMA,
        "headline": headline(figures),
        "reservations": reservations(figures),
        "race": race,
        "missing": list(figures.missing),
        "arms": {arm.arm: _arm_values(arm) for arm in figures.arms},
        "pairs": [
            {"arm": pair.arm, "versus": pair.versus, **dataclasses.asdict(pair.ratio)}
            for pair in figures.pairs
        ],
    }


def _arm_values(arm: ArmFigures) -> dict[str, Any]:
    values = dataclasses.asdict(arm)
    values["config"] = dict(arm.config)
    values["crossings"] = {str(seed): dataclasses.asdict(c) for seed, c in sorted(arm.crossings.items())}
    values |= {f"{name}_median": arm.cost_median(of) for name, of in COSTS.items()}
    return {**values, "misses": arm.misses, "at_most": arm.at_most}


def strict_json(values: Mapping[str, Any]) -> str:
    """Sorted, indented, ends in a newline; non-finite numbers become null."""
    return json.dumps(_finite(values), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_rows(figures: RaceFigures) -> list[tuple[str, ...]]:
    """Cells of COLUMNS, the fastest arm first; the reference has no interval against itself."""

    def order(arm: ArmFigures) -> tuple[bool, float, str]:
        unknown = math.isnan(arm.ratio.median)
        return (unknown, 0.0 if unknown else -arm.ratio.median, arm.arm)

    return [_cells(figures, arm) for arm in sorted(figures.arms, key=order)]


def _cells(figures: RaceFigures, arm: ArmFigures) -> tuple[str, ...]:
    ratio = arm.ratio
    is_reference = arm.arm == figures.race.reference_arm
    compared = ratio.pairs > 1 and ratio.median > 0 and not is_reference
    return (
        arm.arm,
        "reference" if is_reference else "missed" if ratio.median == 0 else factor(ratio.median),
        ends(ratio) if compared else "",
        f"{ratio.wins}/{ratio.pairs}" if compared else "",
        f"{ratio.sign_p:.3f}" if compared else "",
        number(arm.cost_median("seconds")),
        number(arm.cost_median("passes")),
        number(arm.final_quality_median),
        f"{arm.misses}/{len(arm.crossings)}" if arm.misses else "",
        arm.reading,
    )


def number(value: float) -> str:
    """Four digits; what is unknown or never happened has a sign of its own."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table_text(figures: RaceFigures) -> str:
    """Headline, table, reservations and what is missing, for a terminal."""
    rows = [COLUMNS, *table_rows(figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    left = {0, len(COLUMNS) - 1}
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "─" * max(len(line) for line in lines)
    missing = ["missing:", *(f"  {line}" for line in figures.missing)] if figures.missing else []
    said = [headline(figures), *(f"- {line}" for line in reservations(figures))]
    return "\n".join([lines[0], rule, *lines[1:], rule, *said, *missing])
