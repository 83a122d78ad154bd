"""The pictures of a race, as PNG. Here: ratios and curves; those of our own arms alone: plots_ours.py.

Computes no figure. A picture whose data are not there yet is not drawn. How they look: look.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainer_node.race.figures import ArmFigures, RaceFigures
from trainer_node.race.look import (
    DASHES,
    INK,
    PIXELS_PER_POINT,
    RULE,
    SOFT,
    Canvas,
    canvas,
    colour_of,
)
from trainer_node.race.plots_ours import draw_calibration, draw_timeline
from trainer_node.race.rules import headline_arm
from trainer_node.race.run_result import CurvePoint
from trainer_node.race.words import ends, factor

Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
AXES: dict[str, tuple[str, Callable[[CurvePoint], float]]] = {
    "steps": ("kept steps of the task's batch", lambda point: point.steps),
    "seconds": ("seconds, predictor included", lambda point: point.trainer_seconds + point.predictor_seconds),
    "passes": ("forward-equivalents (step 3, check 1)", lambda point: point.passes),
}


def draw_all(out_dir: Path, figures: RaceFigures) -> dict[str, Path]:
    """Every picture that the results allow, by name, in the order of a report.

    Raises SettingsError if matplotlib is not installed, OSError if a file cannot be written.
    """
    drawn = {}
    for name, draw in (
        ("ratio", draw_ratios),
        *((f"loss-{axis}", _curves_over(axis)) for axis in AXES),
        ("timeline", draw_timeline),
        ("calibration", draw_calibration),
    ):
        path = out_dir / f"{name}.png"
        with canvas() as on:
            if draw(on, figures):
                on.figure.savefig(path, dpi=100 * PIXELS_PER_POINT)
                drawn[name] = path
            else:
                path.unlink(missing_ok=True)  # of an earlier report on other results
    return drawn


def draw_ratios(on: Canvas, figures: RaceFigures) -> bool:
    """Forest plot: median and interval of the ratio per arm, a line at 1, the fastest on top."""
    arms = [arm for arm in figures.arms if arm.ratio.pairs and arm.arm != figures.race.reference_arm]
    arms.sort(key=lambda arm: arm.ratio.median)
    if not arms:
        return False
    ends = [end for arm in arms for end in (arm.ratio.median, arm.ratio.low95, arm.ratio.high95)]
    finite = [end for end in ends if 0 < end < math.inf]
    low, high = min([0.9, *finite]) / 1.04, max([1.1, *finite]) * 1.04
    axes = on.axes(8.6, 1.35 + 0.36 * len(arms))
    axes.axvline(1, color=INK, linewidth=1)
    for row, arm in enumerate(arms):
        _draw_ratio(axes, row, arm, low, high)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _plain_ticks(axes, low, high)
    axes.set_yticks(range(len(arms)), [arm.arm for arm in arms])
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.tick_params(axis="y", length=0, labelcolor=INK, pad=9)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"times as fast as {figures.race.reference_arm}, time to the target")
    axes.set_title(f"{figures.race.task}, {figures.race.rule}: median over seeds and 95 % interval")
    return True


def _draw_ratio(axes: Any, row: int, arm: ArmFigures, low: float, high: float) -> None:
    """An arrow where the median lies beyond the axis; hollow where the arm is ours with a part taken out."""
    ratio, colour = arm.ratio, colour_of(arm.arm)
    ends = np.clip([ratio.low95, ratio.high95], low, high)
    axes.plot(ends, [row, row], color=colour, linewidth=3, alpha=0.5, solid_capstyle="butt")
    marker = "<" if ratio.median < low else ">" if ratio.median > high else "o"
    fill = "white" if arm.arm in DASHES else colour
    at = np.clip(ratio.median, low, high)
    axes.plot(at, row, marker, color=colour, markerfacecolor=fill, markersize=7, clip_on=False)
    words = _ratio_words(arm)
    axes.text(1.02, row, words, transform=axes.get_yaxis_transform(), va="center", fontsize=9)


def _ratio_words(arm: ArmFigures) -> str:
    words = [] if arm.ratio.median == 0 else [factor(arm.ratio.median)]
    if words and arm.ratio.pairs > 1:
        words.append(ends(arm.ratio))
    if arm.misses:
        words.append(f"missed {arm.misses}/{len(arm.crossings)}")
    return "   ".join(words)


def _plain_ticks(axes: Any, low: float, high: float) -> None:
    """Round factors, about half a dozen of them."""
    for steps in (
        np.arange(0.5, 2.01, 0.05),
        np.arange(0.5, 2.01, 0.1),
        np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3]),
        np.array([0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10]),
        10.0 ** np.arange(-6, 7),
    ):
        ticks = [float(step) for step in steps if low <= step <= high]
        covers = low >= steps[0] / 1.2 and high <= steps[-1] * 1.2
        if covers and len(ticks) <= 10:
            break
    axes.set_xticks(ticks, [f"{tick:.4g}×" for tick in ticks])
    axes.set_xticks([], minor=True)


def _curves_over(axis: str) -> Callable[[Canvas, RaceFigures], bool]:
    label, cost = AXES[axis]

    def draw(on: Canvas, figures: RaceFigures) -> bool:
        found = [(arm.arm, median_curve(figures, arm, cost)) for arm in figures.arms]
        curves = {arm: curve for arm, curve in found if curve is not None}
        if not curves:
            return False
        axes = on.axes(8.6, 5.0)
        reference, target = figures.race.reference_arm, figures.race.target
        for arm, curve in curves.items():
            _draw_curve(
                axes, arm, curve, arm in (headline_arm(figures.race.arms, figures.race.rule), reference)
            )
        if target is not None:
            axes.axhline(target, color=SOFT, linewidth=1)
            axes.text(0.008, target, "target", transform=axes.get_yaxis_transform(), va="bottom")
        first = curves.get(reference, next(iter(curves.values())))
        # Arms at a constant rate run for longer: what lies far beyond the reference is in the table.
        axes.set_xlim(0, min(max(curve[0][-1] for curve in curves.values()), 1.5 * first[0][-1]))
        axes.set_ylim(*_loss_limits(first[1], curves, target))
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss")
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        _legend_from_worst_to_best(axes, curves)
        axes.set_title(f"{figures.race.task}: held-out loss, median over seeds (band: all seeds)")
        return True

    return draw


def _draw_curve(axes: Any, arm: str, curve: Curve, leads: bool) -> None:
    cost_P, median_P, low_P, high_P = curve
    look = {"color": colour_of(arm), "linestyle": DASHES.get(arm, "-"), "label": arm}
    if leads:
        axes.fill_between(cost_P, low_P, high_P, color=look["color"], alpha=0.14, linewidth=0)
    axes.plot(cost_P, median_P, linewidth=2.4 if leads else 1.3, zorder=3 if leads else 2, **look)


def _legend_from_worst_to_best(axes: Any, curves: dict[str, Curve]) -> None:
    """In the order of the lines' right ends, from top to bottom."""
    handles, labels = axes.get_legend_handles_labels()
    pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: -curves[pair[1]][1][-1])
    axes.legend(
        [handle for handle, _ in pairs],
        [label for _, label in pairs],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=9,
        handlelength=2.6,
    )


def median_curve(figures: RaceFigures, arm: ArmFigures, cost: Callable[[CurvePoint], float]) -> Curve | None:
    """(cost, median, lowest, highest loss), each (P,), reading by reading, of the runs nearest to T0.

    Diverged runs are left out; None without any other.
    """
    runs = [run for run in figures.runs[arm.arm] if not run.diverged]
    if not runs:
        return None
    lengths = sorted({run.key.planned_steps for run in runs})
    nearest = min(lengths, key=lambda length: (abs(length - figures.race.base_steps), length))
    runs = [run for run in runs if run.key.planned_steps == nearest]
    points = [run.curve for run in runs]
    count = min(map(len, points))
    raw = arm.reading == "raw"
    loss_SP = np.array([[p.loss if raw else p.read_loss for p in curve[:count]] for curve in points])
    cost_SP = np.array([[cost(p) for p in curve[:count]] for curve in points])
    return np.median(cost_SP, axis=0), np.median(loss_SP, axis=0), loss_SP.min(axis=0), loss_SP.max(axis=0)


def _loss_limits(first_P: np.ndarray, curves: dict[str, Curve], target: float | None) -> tuple[float, float]:
    """From what the reference has after a tenth of its run, to just below the lowest loss."""
    ends = [float(curve[1][-1]) for curve in curves.values()] + ([] if target is None else [target])
    high = float(first_P[len(first_P) // 10])
    low = min(ends)
    pad = 0.04 * max(high - low, 1e-3)
    return low - pad, max(high, low + pad)
