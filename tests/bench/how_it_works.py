"""The figures and numbers of docs/how-it-works.md, from one real run: `python -m tests.bench.how_it_works`.

One run of the learned policy in lockstep, predictor in the same process, one thread. At every proposal the road
without the jump is taken too (race/twin.py), which the run itself does not notice. Draws two pictures and
prints what it did, and how often the judge is wrong on synthetic curves. Asserts nothing.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from common import features
from common.clock import SystemClock
from common.config import dump_settings, load_settings
from common.messages import Message, Observation, Outcome, Phase, PhaseDecision, Verdict
from common.settings import RunSettings
from predictor_node.calibration import NORMAL_FACTOR
from predictor_node.node import Predictor, in_memory_predictor
from tests.trainer.test_judge import BATCH_NOISE, CYCLES, GUARD_NOISE, RUNS, share_refused
from trainer_node.assembly import build_loop, prepare_task, run_started
from trainer_node.loop import Loop
from trainer_node.race.in_process import InProcessPredictor
from trainer_node.race.twin import Crossroads, nothing

LOSS = features.INDEX["loss"]
OVERRIDES = (
    "trainer.decision_mode=lockstep",
    "trainer.checkpoint.snapshot=memory",
    "predictor.policy=learned",
)
HAPPENED_STEPS = 8  # as predictor_node/pending.py
KEPT, UNDONE, PLAIN = "#2a8f4f", "#c43c39", "#3b6ea5"
COLOURS = {Verdict.ACCEPTED: KEPT, Verdict.REFUSED: UNDONE, Verdict.RUINED: "#7a1f1d"}
KINDS = {"head": "o", "pull_back": "s", "forecaster": "^"}


@dataclass
class Seen:
    """All that was told and measured. Guard losses by (attempt, step); twins by decision id."""

    steps: list[Observation] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    decisions: dict[str, PhaseDecision] = field(default_factory=dict)
    guard: dict[tuple[int, int], float] = field(default_factory=dict)
    twins: dict[str, list[float]] = field(default_factory=dict)
    budget: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)  # by decision id

    def decision_of(self, outcome: Outcome) -> PhaseDecision:
        return self.decisions[outcome.decision_id]

    @property
    def jumps(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.verdict in COLOURS]


class Watcher(InProcessPredictor):
    """Passes everything on; reads the guard loss after every step and takes the other road at proposals."""

    def __init__(self, predictor: Predictor, seen: Seen) -> None:
        super().__init__(predictor, SystemClock())
        self._core, self._seen = predictor, seen
        self.loop: Loop | None = None

    def emit(self, message: Message) -> None:
        super().emit(message)
        seen = self._seen
        if isinstance(message, Observation):
            seen.steps.append(message)
            if self.loop is not None:
                seen.guard[message.attempt, message.step] = self.loop.guard_loss()
        elif isinstance(message, Outcome):
            seen.outcomes.append(message)
            self._look_at_the_policy(message)

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        decision = super().wait_decision(step=step, attempt=attempt, seconds=seconds)
        if decision is not None:
            self._seen.decisions[decision.decision_id] = decision
            if decision.phase is Phase.PREDICT and self.loop is not None:
                with Crossroads(self.loop) as here:
                    stops = range(self.loop.rules.probation_steps + 1)
                    road = here.road(nothing, list(stops))
                self._seen.twins[decision.decision_id] = [road[stop].guard for stop in stops if stop in road]
        return decision

    def _look_at_the_policy(self, outcome: Outcome) -> None:
        policy = self._core.learned.policy
        assert policy is not None
        values: Any = policy.values
        self._seen.budget.append((outcome.base_step, values["budget"]))
        for entry in values["decisions"]:
            if entry["reward"] is not None:
                self._seen.rewards[entry["decision_id"]] = entry["reward"]


def live(settings: RunSettings) -> tuple[Seen, Loop]:
    task, seen = prepare_task(settings.trainer), Seen()
    watcher = Watcher(in_memory_predictor(), seen)
    loop = build_loop(
        task,
        settings,
        links=watcher,
        emit=watcher.emit,
        housekeeping=lambda loop: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    watcher.emit(
        run_started(
            loop,
            run_id="how-it-works",
            settings_toml=dump_settings(settings),
            resumed_from="",
            feature_version=features.VERSION,
        )
    )
    watcher.loop = loop
    loop.run()
    return seen, loop


# ---- the whole run ---------------------------------------------------------------------------


def draw_run(seen: Seen, settings: RunSettings, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(11, 5.2), layout="constrained")
    probation = settings.trainer.probation_steps
    shade_phases(axes, seen)
    undone = {step.attempt for step in seen.steps} - {seen.steps[-1].attempt}
    kept = {step.step: step.features[LOSS] for step in seen.steps}
    axes.plot(list(kept), list(kept.values()), color="#b9c4cf", linewidth=0.7, label="training loss, one batch")
    smooth = smoothed(list(kept.values()))
    axes.plot(list(kept), smooth, color="#22313f", linewidth=1.3, label=f"mean of {HAPPENED_STEPS} steps")
    for decision in seen.decisions.values():
        forecast = decision.forecast
        if forecast is None or decision.base_attempt in undone and decision.horizon_steps:
            pass
        if forecast is not None:
            axes.errorbar(
                decision.base_step + probation,
                forecast.loss_without,
                yerr=NORMAL_FACTOR * forecast.spread,
                fmt="_",
                color=PLAIN,
                linewidth=1.0,
                capsize=2,
            )
    top = max(smooth)
    for jump in seen.jumps:
        axes.plot(jump.base_step, top * 1.35, marker="v", color=COLOURS[jump.verdict], markersize=6)
    axes.set(yscale="log", xlabel="real step that is kept", ylabel="nats")
    axes.set_xlim(0, seen.steps[-1].step)
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(handles=handles, loc="lower left")
    figure.savefig(path, dpi=110)


def shade_phases(axes: Axes, seen: Seen) -> None:
    warm = [step.step for step in seen.steps if step.phase is Phase.WARMUP]
    axes.axvspan(0, max(warm), color="#eeeeee", linewidth=0)
    for jump in seen.jumps:
        end = jump.base_step + max(1, jump.probation_steps)
        axes.axvspan(jump.base_step, end, color=COLOURS[jump.verdict], alpha=0.13, linewidth=0)


def smoothed(losses: list[float]) -> list[float]:
    count = HAPPENED_STEPS
    return [sum(losses[max(0, i + 1 - count) : i + 1]) / min(count, i + 1) for i in range(len(losses))]


def report(seen: Seen, loop: Loop) -> None:
    print("arms", Counter(seen.decision_of(o).arm for o in seen.jumps))
    print("verdicts", Counter(o.verdict.value for o in seen.outcomes))
    print("reasons", Counter(d.reason for d in seen.decisions.values()))
    for o in seen.jumps:
        d = seen.decision_of(o)
        twin = seen.twins[o.decision_id][-1]
        print(o.base_step, d.arm, o.verdict.value, f"before {o.loss_before:.4f} after {o.loss_after:.4f} end {o.loss_end:.4f} forecast {o.loss_forecast:.4f} +- {o.loss_spread:.4f} twin {twin:.4f} reward {seen.rewards.get(o.decision_id)} cos {o.delta_cosine:.2f}")


if __name__ == "__main__":
    import sys
    preset = sys.argv[1]
    torch.set_num_threads(1)
    t = time.process_time()
    settings = load_settings(preset=preset, overrides=[*OVERRIDES, *sys.argv[2:]])
    seen, loop = live(settings)
    print(preset, len(seen.steps), "steps", time.process_time() - t, "cpu s", loop.progress.step)
    report(seen, loop)
    draw_run(seen, settings, Path("/tmp/run.png"))
