"""The figures of docs/how-it-works.md, from one real run: `python -m tests.bench.how_it_works [--out DIR]`.

With OMP_NUM_THREADS=1, about 15 s. Draws two pictures, prints every jump, and how often the judge is wrong on
synthetic curves. Asserts nothing. The run itself: how_it_works_run.py.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common import features
from common.config import load_settings
from common.messages import Outcome, Phase, Verdict
from common.settings import RunSettings
from predictor_node.calibration import NORMAL_FACTOR
from tests.bench.how_it_works_run import Seen, live
from tests.trainer.test_judge import BATCH_NOISE, CYCLES, GUARD_NOISE, RUNS, share_refused
from trainer_node.race.machine import machine

LOSS = features.INDEX["loss"]
OVERRIDES = (
    "trainer.steps=600",
    "trainer.seed=1",
    "trainer.model.width=128",
    "trainer.batch.sequences=256",
    "trainer.schedule.decay_share=0.2",
    "trainer.decision_mode=lockstep",
    "trainer.checkpoint.snapshot=memory",
    "predictor.policy=learned",
    "predictor.temper=aggressive",
)
OUT = Path(__file__).resolve().parents[2] / "docs" / "how-it-works"
HAPPENED_STEPS = 8  # as predictor_node/pending.py
KEPT, UNDONE, PLAIN = "#2a8f4f", "#c43c39", "#3b6ea5"
COLOURS = {Verdict.ACCEPTED: KEPT, Verdict.REFUSED: UNDONE, Verdict.RUINED: "#7a1f1d"}
INK, PALE = "#22313f", "#b9c4cf"


# ---- the whole run ---------------------------------------------------------------------------


def draw_run(seen: Seen, settings: RunSettings, path: Path) -> None:
    """The loss with its phases, jumps by verdict, and forecasts of the road without a jump."""
    figure, (whole, part) = pyplot.subplots(
        2, figsize=(11, 7.4), layout="constrained", gridspec_kw={"height_ratios": [1.0, 1.7]}
    )
    last_jump = max((jump.base_step for jump in seen.jumps), default=0)
    for axes in (whole, part):
        draw_loss(axes, seen)
        axes.set_ylabel("training loss, nats")
    whole.set_yscale("log")
    first, last = settings.trainer.statistics_steps + 16, last_jump + 60
    shown = [step.features[LOSS] for step in seen.steps if first <= step.step <= last]
    low, high = min(shown), max(shown)
    part.set(xlim=(first, last), ylim=(low - 0.35 * (high - low), high + 0.15 * (high - low)))
    whole.set_xlim(0, settings.trainer.steps)
    whole.set_title(
        "the whole run: a few jumps while trying is affordable, then arm 0", fontsize=10, loc="left"
    )
    part.set_title("the part with jumps, and the predictor's forecasts", fontsize=10, loc="left")
    part.set_xlabel("real step that is kept")
    draw_forecasts(part, seen, settings.trainer.probation_steps)
    for jump in seen.jumps:
        part.annotate(
            seen.arm_of(jump),
            (jump.base_step + 0.5, high),
            color=COLOURS[jump.verdict],
            fontsize=8,
        )
    part.legend(handles=legend_of_the_run(), loc="lower left", fontsize=8, ncols=2)
    figure.savefig(path, dpi=100)


def draw_loss(axes: Axes, seen: Seen) -> None:
    """The run as it was kept: where CORRECT was undone, the steps that were taken again."""
    kept = {step.step: step.features[LOSS] for step in seen.steps}
    axes.plot(list(kept), list(kept.values()), color=PALE, linewidth=0.7)
    axes.plot(list(kept), smoothed(list(kept.values())), color=INK, linewidth=1.3)
    axes.axvspan(0, sum(step.phase is Phase.WARMUP for step in seen.steps), color="#eeeeee", linewidth=0)
    for jump in seen.jumps:
        colour, end = COLOURS[jump.verdict], jump.base_step + max(1, jump.probation_steps)
        axes.axvspan(jump.base_step, end, color=colour, alpha=0.15, linewidth=0)
        axes.axvline(jump.base_step, color=colour, linewidth=1.2)


def draw_forecasts(axes: Axes, seen: Seen, probation_steps: int) -> None:
    for decision in seen.decisions.values():
        forecast = decision.forecast
        if forecast is None:
            continue
        end = decision.base_step + probation_steps
        axes.errorbar(
            end - (1.5 if decision.horizon_steps else 0.0),  # a step that is undone is forecast twice
            forecast.loss_without,
            yerr=NORMAL_FACTOR * forecast.spread,
            fmt="o",
            markersize=3.5,
            color=PLAIN,
            linewidth=1.2,
            capsize=3,
        )


def legend_of_the_run() -> list[Line2D | Patch]:
    return [
        Line2D([], [], color=INK, label=f"training loss, mean of {HAPPENED_STEPS} steps (pale: one batch)"),
        Line2D([], [], color=PLAIN, marker="o", label="forecast without a jump, calibrated 80 % interval"),
        Patch(color="#eeeeee", label="WARMUP"),
        Patch(color=KEPT, alpha=0.3, label="jump (line) and CORRECT, kept"),
        Patch(color="white", label="FULL (white)"),
        Patch(color=UNDONE, alpha=0.3, label="jump (line) undone; the curve is the steps taken again"),
    ]


def smoothed(losses: list[float]) -> list[float]:
    count = HAPPENED_STEPS
    return [sum(losses[max(0, i + 1 - count) : i + 1]) / min(count, i + 1) for i in range(len(losses))]


# ---- jumps in detail, and the budget ---------------------------------------------------------


def draw_jumps(seen: Seen, settings: RunSettings, path: Path) -> None:
    figure, panels = pyplot.subplots(1, 3, figsize=(13.5, 4.6), layout="constrained")
    kept = [jump for jump in seen.jumps if jump.verdict is Verdict.ACCEPTED]
    undone = [jump for jump in seen.jumps if jump.verdict is Verdict.REFUSED]
    by_gain = sorted(kept, key=lambda jump: jump.loss_end - seen.twins[jump.decision_id][-1])
    shown = [*by_gain[:1], *(undone[:1] or by_gain[1:][-1:])]
    for axes, jump in zip(panels, shown, strict=False):
        draw_jump(axes, seen, jump, settings)
    draw_budget(panels[2], seen)
    figure.savefig(path, dpi=100)


def draw_jump(axes: Axes, seen: Seen, jump: Outcome, settings: RunSettings) -> None:
    """The guard loss around one jump, the twin that did not jump, and the judge's forecast with its limit."""
    base, attempt = jump.base_step, seen.decisions[jump.decision_id].base_attempt
    steps = range(jump.probation_steps + 1)
    before = range(-settings.trainer.window_steps, 0)
    window = [seen.guard_at(base + offset, attempt) for offset in before]
    axes.plot([*before, 0], [*window, jump.loss_before], color=INK, label="before the jump")
    tried = [jump.loss_after, *(seen.guard[attempt, base + step] for step in steps[1:])]
    colour = COLOURS[jump.verdict]
    axes.plot([0, 0], [jump.loss_before, jump.loss_after], color=colour, linestyle=":")
    axes.plot(steps, tried, color=colour, marker="o", markersize=3, label="jump and CORRECT")
    twin = seen.twins[jump.decision_id]
    axes.plot(range(len(twin)), twin, color=PLAIN, linestyle="--", label="the road not taken")
    limit = jump.loss_forecast + settings.trainer.verify.tolerance * jump.loss_spread
    end = jump.probation_steps
    axes.plot([0, end], [jump.loss_before, jump.loss_forecast], color="#888888", linewidth=1)
    axes.errorbar(
        end + 0.6,
        jump.loss_forecast,
        yerr=jump.loss_spread,
        fmt="D",
        color="#888888",
        markersize=4,
        capsize=4,
        label="judge's forecast, one spread",
    )
    axes.axhline(limit, color="#888888", linewidth=0.8, linestyle=":")
    axes.annotate("limit", (before[0], limit), fontsize=8, va="bottom", color="#666666")
    axes.set(xlabel=f"steps since step {base}", ylabel="guard loss, nats")
    axes.set_title(f"{seen.arm_of(jump)}: {jump.verdict.value}", fontsize=10, loc="left", color=colour)
    axes.legend(fontsize=8, loc="best")


def draw_budget(axes: Axes, seen: Seen) -> None:
    steps = [step for step, _ in seen.budget]
    allowance = [b["share"] * max(b["spent_passes"], b["planned_passes"]) for _, b in seen.budget]
    factor = seen.budget[-1][1]["worst_factor"]
    axes.plot(
        steps, [factor * a for a in allowance], color=UNDONE, linestyle=":", label="limit of the worst case"
    )
    axes.plot(steps, allowance, color=INK, linestyle=":", label="allowance")
    for name, colour in (("net_passes", INK), ("expected_passes", PLAIN)):
        values = [b[name] for _, b in seen.budget]
        axes.step(steps, values, where="post", color=colour, label=name.replace("_passes", " cost"))
    former = 0.0
    for jump in seen.jumps:
        net = next(b["net_passes"] for step, b in reversed(seen.budget) if step <= jump.base_step)
        reward = seen.rewards.get(jump.decision_id, 0.0)
        kept = jump.verdict is Verdict.ACCEPTED
        axes.plot(jump.base_step, net, "o", color=COLOURS[jump.verdict])
        axes.annotate(
            f"{seen.arm_of(jump)} {reward:+.2f}",
            (jump.base_step, net),
            xytext=(-6 if kept else 5, 4 if net >= former else -11),
            textcoords="offset points",
            ha="right" if kept and net >= former else "left",
            fontsize=7.5,
        )
        former = net
    last_jump = max((jump.base_step for jump in seen.jumps), default=0)
    axes.set(xlabel="real step", ylabel="forward-equivalents", xlim=(0, last_jump + 110))
    axes.set_ylim(top=1.35 * factor * max(allowance))
    axes.set_title("what trying cost, with the reward of each jump", fontsize=10, loc="left")
    axes.legend(fontsize=8, loc="upper left")


# ---- numbers ---------------------------------------------------------------------------------


def report(seen: Seen) -> None:
    print("what decisions said:", dict(Counter(d.reason.split(",")[0] for d in seen.decisions.values())))
    print("step  arm            verdict    before  after   end     forecast  spread  road not taken  reward")
    for jump in seen.jumps:
        print(
            f"{jump.base_step:4d}  {seen.arm_of(jump):13s}  {jump.verdict.value:9s}"
            f"  {jump.loss_before:.4f}  {jump.loss_after:.4f}  {jump.loss_end:.4f}"
            f"  {jump.loss_forecast:.4f}    {jump.loss_spread:.4f}  {seen.twins[jump.decision_id][-1]:.4f}"
            f"          {seen.rewards.get(jump.decision_id, float('nan')):+.2f}"
        )


def report_judge() -> None:
    print(
        f"share of jumps refused, {RUNS} synthetic runs x {CYCLES} jumps, noise {BATCH_NOISE} nats of"
        f" a batch, {GUARD_NOISE} of the guard loss"
    )
    for probation_steps in (8, 16):
        for harm in (0.0, 0.02, 0.05, 0.1):
            share = share_refused(probation_steps, harm=harm)
            print(f"  probation {probation_steps:2d} steps, lasting harm {harm:.2f} nats: {share:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="race-regression")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    matplotlib.use("Agg")
    settings = load_settings(preset=options.preset, overrides=[*OVERRIDES, *options.set])
    started = time.process_time()
    seen, loop = live(settings)
    seconds = time.process_time() - started
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}, Python {platform.python_version()}")
    print(f"{loop.progress.step} steps kept, {len(seen.steps)} taken, {seconds:.0f} s of CPU, twins included")
    report(seen)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_run(seen, settings, options.out / "run.png")
    draw_jumps(seen, settings, options.out / "jumps.png")
    print(f"drawn: {options.out}/run.png, {options.out}/jumps.png")
    report_judge()


if __name__ == "__main__":
    main()
