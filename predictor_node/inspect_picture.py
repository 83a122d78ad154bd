"""The saved state of the learned policy as one PNG: arms, rewards, calibration, forecasts.

Reads what inspect.py reads. matplotlib (extra `race`) is imported only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import EnvironmentFault, UserError
from predictor_node.bandit import REST
from predictor_node.calibration import LEVEL, MIN_SCORES
from predictor_node.inspect import ArmRow, CalibrationRow, arm_rows, calibration_rows, decisions_of

GOOD, BAD, QUIET, INK = "#2a6f97", "#c1440e", "#9aa0a6", "#2b2b2b"


def draw(state: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: arms, rewards, calibration, forecasts against what happened.

    Raises UserError without matplotlib, CheckpointError, EnvironmentFault when it cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        cure = "pip install 'hybrid-predict-trainer[race]'"
        raise UserError(f"a picture needs matplotlib: {cure}") from None
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    decisions = decisions_of(state)
    _draw_arms(axes[0, 0], arm_rows(state))
    _draw_rewards(axes[0, 1], decisions)
    _draw_calibration(axes[1, 0], calibration_rows(state))
    _draw_forecasts(axes[1, 1], decisions)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_color(INK)
    try:
        figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be written: {error.strerror}") from None


def _draw_arms(panel: Any, rows: Sequence[ArmRow]) -> None:
    panel.set_title("Estimated reward of each arm (± optimism)", loc="left")
    if not rows:
        _say(panel, "no arms yet")
        return
    places = range(len(rows))
    colours = [GOOD if row.estimate > 0.0 else QUIET if row.name == REST else BAD for row in rows]
    panel.barh(places, [row.estimate for row in rows], color=colours, height=0.6)
    panel.errorbar([row.estimate for row in rows], places, xerr=[row.width for row in rows], fmt="none",
                   ecolor=INK, elinewidth=1, capsize=2)  # fmt: skip
    panel.set_yticks(places, [f"{row.name}  ({row.pulls}×)" for row in rows])
    panel.invert_yaxis()
    panel.axvline(0.0, color=INK, linewidth=0.8)
    panel.set_xlabel("reward at the last context; pulls in brackets")


def _draw_rewards(panel: Any, decisions: Sequence[Mapping[str, Any]]) -> None:
    panel.set_title("Rewards of the last decisions", loc="left")
    settled = [decision for decision in decisions if decision["reward"] is not None]
    if not settled:
        _say(panel, "no jump was settled yet")
        return
    for label, colour, kept in (
        ("kept", GOOD, [d for d in settled if d["verdict"] == "accepted"]),
        ("undone", BAD, [d for d in settled if d["verdict"] in ("refused", "ruined")]),
        ("rest", QUIET, [d for d in settled if d["verdict"] not in ("accepted", "refused", "ruined")]),
    ):
        if kept:
            panel.scatter(
                [d["step"] for d in kept], [d["reward"] for d in kept], color=colour, label=label, s=28
            )
    panel.axhline(0.0, color=INK, linewidth=0.8)
    panel.set_ylim(-1.08, 1.08)
    panel.set_xlabel("step")
    panel.set_ylabel("reward")
    panel.legend(frameon=False)


def _draw_calibration(panel: Any, rows: Sequence[CalibrationRow]) -> None:
    panel.set_title(f"Calibration: how often the {LEVEL:.0%} interval held", loc="left")
    if not rows:
        _say(panel, "no forecast has met the truth yet")
        return
    places = range(len(rows))
    colours = [GOOD if row.count >= MIN_SCORES else QUIET for row in rows]
    panel.bar(places, [100.0 * (row.coverage or 0.0) for row in rows], color=colours, width=0.6)
    for place, row in zip(places, rows, strict=True):
        panel.annotate(
            f"×{row.factor:.2f}\nn = {row.count}", (place, 2.0), ha="center", color="white", fontsize=9
        )
    panel.axhspan(70.0, 90.0, color=QUIET, alpha=0.25, linewidth=0, zorder=0)
    panel.axhline(100.0 * LEVEL, color=INK, linewidth=0.8, linestyle="--")
    panel.set_xticks(places, [row.key for row in rows])
    panel.set_ylim(0.0, 105.0)
    panel.set_xlabel(f"horizon in steps; × = factor on the spread; grey = fewer than {MIN_SCORES}")
    panel.set_ylabel("%")


def _draw_forecasts(panel: Any, decisions: Sequence[Mapping[str, Any]]) -> None:
    panel.set_title("Loss: forecast and what happened", loc="left")
    pairs = [d for d in decisions if d["forecast"] is not None and d["happened"] is not None]
    if not pairs:
        _say(panel, "no pair yet")
        return
    steps = [d["step"] for d in pairs]
    panel.vlines(
        steps, [d["forecast"] for d in pairs], [d["happened"] for d in pairs], color=QUIET, linewidth=1
    )
    panel.scatter(
        steps, [d["forecast"] for d in pairs], facecolors="none", edgecolors=INK, s=26, label="forecast"
    )
    panel.scatter(steps, [d["happened"] for d in pairs], color=GOOD, s=16, label="happened")
    panel.set_xlabel("step of the decision")
    panel.set_ylabel("nats")
    panel.legend(frameon=False)


def _say(panel: Any, text: str) -> None:
    panel.text(0.5, 0.5, text, ha="center", va="center", transform=panel.transAxes, color=QUIET)
    panel.set_xticks([])
    panel.set_yticks([])
