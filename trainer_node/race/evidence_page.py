"""Renders docs/evidence.md from docs/evidence: claims, every result, audits. Every word is generated."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import SettingsError
from trainer_node.race.arm_table import GROUPS
from trainer_node.race.audit_table import audit_lines
from trainer_node.race.claims import (
    constant_rules,
    forecasts_mean_something,
    honest_rules,
    no_harm,
    pair_words,
    table,
)
from trainer_node.race.claims_controls import (
    controls_do_no_harm,
    hands_free,
    ramp,
    untuned,
    whole_stack,
)
from trainer_node.race.evidence import ArmEvidence, Evidence, read_all
from trainer_node.race.rules import RULES
from trainer_node.race.words import JUMPING_ARM

_INTRODUCTION = """# Evidence

Rendered from the files of `docs/evidence/` by `python -m trainer_node.race.evidence`; never typed, and a
test fails when page and files differ. Each file is one race: `trainer-node race TASK` writes it.

Speed is seconds of the reference / seconds of the arm until a held-out loss is reached: time of the one
core that trainer and predictor share, which on an idle machine is wall-clock (on a GPU: wall-clock), the
predictor's learning, checks and undone steps included; the median of the ratios of equal seeds, with its 95 %
bootstrap interval. A run that never gets there is infinitely slow. `p` is an exact two-sided sign test over
the seeds, not corrected for the number of arms; "on a spare core" leaves out the predictor's seconds; the
final loss is the held-out one after T0 steps.

Rules:

"""
HEAD = _INTRODUCTION + "\n".join(f"- `{rule.name}`: {rule.meaning}" for rule in RULES.values())
NOTHING = "No evidence has been committed yet: nothing is claimed."


def render(folder: Path) -> str:
    """The whole page. Raises SettingsError for a file that is not evidence."""
    files = read_all(folder)
    parts = [HEAD, *_claims(files), *(_result(evidence) for evidence in files), *_audits(folder)]
    if not files:
        parts.insert(1, NOTHING)
    return "\n\n".join(parts) + "\n"


def _claims(files: list[Evidence]) -> list[str]:
    if not files:
        return []
    chapters = (
        ("1. No harm", no_harm),
        ("2. Forecasts mean something", forecasts_mean_something),
        ("3. Constant-rate rules", constant_rules),
        ("4. Honest rules", honest_rules),
        ("5. The whole stack", whole_stack),
        ("6. Against those who do not tune", untuned),
        ("7. Hands-free", hands_free),
        ("8. Ramp", ramp),
        ("9. No harm with every control on", controls_do_no_harm),
    )
    return ["## What it shows", *(f"### {title}\n\n" + "\n".join(said(files)) for title, said in chapters)]


def _result(evidence: Evidence) -> str:
    arms = sorted(evidence.arms.items(), key=lambda item: (-(item[1].ratio_median or 0.0), item[0]))
    head = ("arm", "speed", "95 %", "p", "seconds", "on a spare core", "passes", "final loss", "missed")
    lines = [
        f"## {evidence.task}, {evidence.full_rule}",
        "",
        f"Target {evidence.target:.5g}, T0 = {evidence.base_steps:,} steps, {len(evidence.seeds)} seeds,"
        f" {evidence.trials} trials, reference {evidence.reference_arm or 'not stated'}."
        f" {evidence.machine}, {evidence.date}.",
        "",
        f"`{evidence.command}`",
        *table(head, [_cells(evidence, name, arm) for name, arm in arms]),
    ]
    lines += _pooled(evidence)
    if evidence.in_distribution:
        lines += ["", f"Fitted on earlier runs of this very task: {', '.join(evidence.in_distribution)}."]
    if evidence.missing:
        lines += ["", "**Unfinished**: " + "; ".join(evidence.missing) + "."]
    lines += [f"\n{note}" for note in evidence.notes]
    lines += [f"\n{name}: {note}" for name, arm in arms for note in arm.notes]
    return "\n".join(lines)


def _pooled(evidence: Evidence) -> list[str]:
    """The line of a headline that is a group of arms: no row of the table has its number."""
    pair = evidence.against(evidence.reference_arm)
    if evidence.headline_arm not in GROUPS or pair is None:
        return []
    arms = ", ".join(GROUPS[evidence.headline_arm])
    return ["", f"**{evidence.headline_arm}** (over {arms} and all seeds): {pair_words(pair)}."]


def _cells(evidence: Evidence, name: str, arm: ArmEvidence) -> tuple[str, ...]:
    bold = f"**{name}**" if name == evidence.headline_arm else name
    missed = f"{arm.misses} of {len(evidence.seeds)}" if arm.misses else ""
    if name == evidence.reference_arm:
        compared = ("1", "", "")
    else:
        ends = (_number(arm.ratio_low95, "∞"), _number(arm.ratio_high95, "∞"))
        interval = " – ".join(ends) if arm.ratio_median else ""
        p = "" if arm.sign_test_p is None else f"{arm.sign_test_p:.3f}"
        compared = ("missed" if arm.ratio_median == 0 else _number(arm.ratio_median), interval, p)
    never = "never" if arm.misses else "–"
    return (
        bold,
        *compared,
        _short(arm.seconds_median, never),
        _short(arm.seconds_free_core_median, never),
        _short(arm.passes_median, never),
        _short(arm.final_quality_median),
        missed,
    )


def _number(value: float | None, otherwise: str = "–") -> str:
    return otherwise if value is None else f"{value:.3f}"


def _short(value: float | None, otherwise: str = "–") -> str:
    if value is None:
        return otherwise
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _audits(folder: Path) -> list[str]:
    parts = []
    for path in sorted(folder.glob("*.audit.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            lines = audit_lines(values)
            facts = f"{values['machine']}, {values['date']}.\n\n`{values['command']}`"
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{path}: not an audit ({error}); write it with race --audit") from None
        body = "\n".join(lines)
        parts.append(f"### {path.name.removesuffix('.audit.json')}\n\n{facts}\n\n```\n{body}\n```")
    if not parts:
        return []
    intro = (
        f"At every jump of {JUMPING_ARM} a twin without it was trained from the same state on the same"
        " batches. A gain is the held-out loss of the twin minus that of the jump, in nats: above zero the"
        " jump was good. The table is of jumps tried beside a plain run, and has the difference the other way"
        " round, jump minus twin: below zero it was good."
    )
    return ["## Audit: the road not taken", intro, *parts]
