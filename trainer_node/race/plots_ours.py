"""Pictures of what only our arms have: the phases and jumps of one run, and the calibration of forecasts.

Each `draw_*` returns False, and draws nothing, when the results have no such data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer_node.race.figures import RaceFigures
from trainer_node.race.look import DASHES, INK, KEPT, PHASES, RULE, SOFT, UNDONE, Canvas, colour_of
from trainer_node.race.rules import headline_arm
from trainer_node.race.run_result import PhaseSpan, RunResult

COVERAGE_GOAL = (0.7, 0.9)  # of the 80 % interval


def draw_timeline(on: Canvas, figures: RaceFigures) -> bool:
    """One run of ours: what it did at which step, and every jump with its verdict."""
    run = _run_with_phases(figures)
    if run is None:
        return False
    top, lanes = on.axes(8.6, 4.2, rows=(2.2, 1.0), sharex=True)
    top.plot([p.kept_steps for p in run.curve], [p.read_loss for p in run.curve], color=INK, linewidth=1.5)
    losses = [p.read_loss for p in run.curve[len(run.curve) // 10 :]]
    top.set_ylim(min(losses) - 0.03 * (max(losses) - min(losses)), max(losses))
    top.set_ylabel("held-out loss")
    top.grid(axis="y", color=RULE, linewidth=0.8)
    top.set_title(f"{run.key.arm} on {run.key.task}, seed {run.key.seed}: phases and jumps")
    for span, kept in _lanes(run.phases):
        if span.phase == "predict":
            lanes.plot(span.first_step, 2, **_mark(span.verdict), markersize=6, clip_on=False)
        else:
            lanes.broken_barh(
                [(span.first_step - 1, span.last_step - span.first_step + 1)],
                (0.66 if kept else -0.34, 0.68),
                color=PHASES.get(span.phase, SOFT),
                linewidth=0,
            )
    lanes.set_yticks([2, 1, 0], ["jumps", "kept steps", "undone steps"])
    lanes.tick_params(axis="y", length=0, labelcolor=INK)
    lanes.set_ylim(-0.6, 2.5)
    lanes.set_xlim(0, run.final.kept_steps)
    lanes.set_xlabel("real steps")
    lanes.spines["left"].set_visible(False)
    _timeline_legend(on.figure, run.phases)
    return True


def _mark(verdict: str) -> dict[str, str]:
    """Shape and colour say the same thing twice."""
    kept = verdict == "accepted"
    return {"marker": "^" if kept else "v", "color": KEPT if kept else UNDONE, "linestyle": ""}


def _run_with_phases(figures: RaceFigures) -> RunResult | None:
    """Of the headline arm if it has jumps, else of any arm that has: the first seed, nearest to T0."""
    first = headline_arm(figures.race.arms, figures.race.rule)
    for arm in sorted(figures.runs, key=lambda name: (name != first, not name.startswith("ours"), name)):
        runs = [run for run in figures.runs[arm] if any(span.phase == "predict" for span in run.phases)]
        if runs:
            distance = figures.race.base_steps
            return min(runs, key=lambda run: (run.key.seed, abs(run.key.planned_steps - distance)))
    return None


def _lanes(phases: Sequence[PhaseSpan]) -> list[tuple[PhaseSpan, bool]]:
    """(span, whether its steps were kept): a probation is undone with the jump before it.

    Two probations in a row are a trial of controls and its twin: one of them is undone.
    """
    lanes, jump = [], ""
    for place, span in enumerate(phases):
        after = phases[place + 1].phase if place + 1 < len(phases) else ""
        before = phases[place - 1].phase if place else ""
        kept_with = ("refused",) if before == "correct" else ("accepted",) if after == "correct" else None
        lanes.append((span, span.phase != "correct" or jump in (kept_with or ("", "accepted"))))
        jump = span.verdict if span.phase == "predict" else jump if span.phase == "correct" else ""
    return lanes


def _timeline_legend(figure: Any, phases: Sequence[PhaseSpan]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    seen = {span.phase for span in phases}
    verdicts = [span.verdict for span in phases if span.phase == "predict"]
    kept = verdicts.count("accepted")
    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in PHASES.items() if name in seen]
    handles.append(Line2D([], [], **_mark("accepted"), label=f"jump kept ({kept})"))
    handles.append(Line2D([], [], **_mark(""), label=f"jump undone ({len(verdicts) - kept})"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, handlelength=1.2
    )


def draw_calibration(on: Canvas, figures: RaceFigures) -> bool:
    """Share of losses within the central 10 %, ... 90 % of their forecast, against what was promised."""
    arms = [(arm, arm.calibration) for arm in figures.arms if arm.calibration is not None]
    if not arms:
        return False
    leading = headline_arm(figures.race.arms, figures.race.rule)
    axes = on.axes(5.6, 5.2)
    promised = np.arange(0.1, 0.95, 0.1)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1)
    axes.plot([0.8, 0.8], COVERAGE_GOAL, color=SOFT, linewidth=9, alpha=0.3, solid_capstyle="butt")
    axes.text(0.8, COVERAGE_GOAL[1] + 0.01, "goal", color=SOFT, fontsize=9, ha="center")
    for arm, found in sorted(arms, key=lambda pair: pair[0].arm != leading):
        leads = arm.arm == leading
        axes.plot(
            promised,
            found.by_level,
            color=colour_of(arm.arm),
            linestyle=DASHES.get(arm.arm, "-"),
            linewidth=2.4 if leads else 1.3,
            marker="o",
            markersize=5 if leads else 3,
            zorder=3 if leads else 2,
            label=f"{arm.arm} ({found.points:,} forecasts)",
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    ticks = np.arange(0, 1.01, 0.2)
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("interval of the loss forecast")
    axes.set_ylabel("losses that fell within it")
    axes.legend(loc="upper left", fontsize=9)
    axes.set_title(f"{figures.race.task}: do forecasts know how sure they are?")
    return True
