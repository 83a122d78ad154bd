"""The saved state of the learned policy in words, for `predictor-node inspect RUN_DIR`.

Pure functions of one dict, whose parts may be missing or empty (a run that has just begun):

    {"bandit": LinUCB.state(), "calibration": Calibration.state(), "budget": ExplorationBudget.state(),
     "residuals": Residuals.state(), "decisions": [the newest 50, oldest first, each
        {"step": int, "arm": str, "verdict": str, "reward": float | None,
         "forecast": float | None, "happened": float | None}],          losses in nats
     "pilot": Pilot.state(), where a control is on}

Knows no folders. The same as a picture: inspect_picture.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.errors import CheckpointError
from predictor_node.bandit import REST, LinUCB
from predictor_node.calibration import LEVEL, Calibration
from predictor_node.inspect_controls import control_words
from predictor_node.residuals import CAPACITY

SHOWN_DECISIONS = 10


class ArmRow(NamedTuple):
    name: str
    pulls: int
    mean_reward: float | None  # None before the first pull
    estimate: float  # at the last context
    width: float


class CalibrationRow(NamedTuple):
    key: str
    count: int
    coverage: float | None
    factor: float


def words(state: Mapping[str, Any]) -> str:
    """A page for people, without a final newline. Raises CheckpointError on a damaged state."""
    paragraphs = (
        _arm_words(arm_rows(state)),
        _calibration_words(calibration_rows(state)),
        _budget_words(state.get("budget")),
        f"Residuals: {residual_count(state)} of at most {CAPACITY} forecasts with what happened.",
        _decision_words(state.get("decisions", ())),
        *([control_words(state["pilot"])] if state.get("pilot") else []),
    )
    return "\n\n".join(paragraphs)


def arm_rows(state: Mapping[str, Any]) -> list[ArmRow]:
    """In the order of the arms; empty without a bandit."""
    if not state.get("bandit"):
        return []
    bandit = LinUCB.from_state(state["bandit"])
    # Before the first update: the constant context, where every estimate is the arm's prior.
    context = bandit.last_context or (1.0, *[0.0] * (bandit.dimension - 1))
    return [
        ArmRow(
            name=arm,
            pulls=bandit.pulls[arm],
            mean_reward=bandit.reward_sums[arm] / bandit.pulls[arm] if bandit.pulls[arm] else None,
            estimate=mean,
            width=width,
        )
        for arm, (mean, width) in bandit.score(context).items()
    ]


def calibration_rows(state: Mapping[str, Any]) -> list[CalibrationRow]:
    """By key; empty before the first forecast was settled."""
    calibration = Calibration()
    calibration.load(state.get("calibration") or {})
    keys = sorted(state.get("calibration") or {}, key=_leading_number)
    return [
        CalibrationRow(key, calibration.count(key), calibration.coverage(key), calibration.factor(key))
        for key in keys
    ]


def residual_count(state: Mapping[str, Any]) -> int:
    return min(int((state.get("residuals") or {}).get("count", 0)), CAPACITY)


def decisions_of(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Oldest first. Raises CheckpointError where a field is missing."""
    names = ("step", "arm", "verdict", "reward", "forecast", "happened")
    decisions = list(state.get("decisions", ()))
    if not all(isinstance(decision, Mapping) and all(name in decision for name in names)
               for decision in decisions):  # fmt: skip
        raise CheckpointError(f"damaged decisions in the predictor's state: each needs {', '.join(names)}")
    return decisions


def _leading_number(key: str) -> tuple[int, str]:
    digits = "".join(character if character.isdigit() else " " for character in key).split()
    return (int(digits[0]) if digits else -1, key)


def _arm_words(rows: Sequence[ArmRow]) -> str:
    if not rows:
        return "Arms: none yet, nothing was decided."
    name_width = max(len("arm"), *(len(row.name) for row in rows))
    lines = [f"{'arm':<{name_width}}  pulls  mean reward  estimate at the last context"]
    for row in rows:
        mean = "-" if row.mean_reward is None else f"{row.mean_reward:+.2f}"
        estimate = f"{row.estimate:+.2f} ± {row.width:.2f}" if row.name != REST else "0 by definition"
        lines.append(f"{row.name:<{name_width}}  {row.pulls:>5}  {mean:>11}  {estimate}")
    lines.append(
        "A reward of +0.10: a cycle with the jump made 10 % more progress a second than one without."
    )
    best = max(rows, key=lambda row: row.estimate + row.width)
    if best.estimate + best.width > 0.0:
        lines.append(f"Most promising: {best.name}, at best {best.estimate + best.width:+.2f}.")
    else:
        lines.append("No jump promises more than it costs: the predictor rests.")
    return "\n".join(lines)


def _calibration_words(rows: Sequence[CalibrationRow]) -> str:
    if not rows:
        return "Calibration: no forecast has met the truth yet."
    lines = [f"Calibration: the {LEVEL:.0%} interval of the loss forecast, by horizon in steps"]
    lines += [
        f"  {row.key:<6} held {row.coverage or 0.0:4.0%} of {row.count} times; ± {row.factor:.2f} spreads"
        for row in rows
    ]
    return "\n".join(lines)


def _budget_words(budget: Mapping[str, float] | None) -> str:
    if not budget:
        return "Budget: none."
    allowance = budget["share"] * max(budget["spent_passes"], budget["planned_passes"])
    net = budget["net_passes"]
    balance = f"have cost {net:.0f} more than they gained" if net >= 0.0 else f"have gained {-net:.0f} net"
    left = max(0.0, allowance - max(net, budget["expected_passes"]))
    return (
        f"Budget: jumps may cost {allowance:.0f} forward-equivalents ({budget['share']:.1%}); they"
        f" {balance}; {left:.0f} are left for trying."
    )


def _decision_words(decisions: Sequence[Mapping[str, Any]]) -> str:
    kept = decisions_of({"decisions": decisions})[-SHOWN_DECISIONS:]
    if not kept:
        return "Decisions: none yet."
    lines = [
        "Last decisions (losses in nats)",
        "    step  arm               verdict    reward  forecast  happened",
    ]
    lines += [
        f"{decision['step']:>8}  {decision['arm'] or '-':<16}  {decision['verdict']:<9}"
        f"  {_number(decision['reward'], '+.2f'):>6}  {_number(decision['forecast'], '.4f'):>8}"
        f"  {_number(decision['happened'], '.4f'):>8}"
        for decision in kept
    ]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
