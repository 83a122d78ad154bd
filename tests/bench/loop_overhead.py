"""What the instrumented loop costs beside a bare one: `python -m tests.bench.loop_overhead`.

A small GPT whose step takes about 15 ms on one thread, window 16, all decisions resting. Two figures: the
wall-clock ratio of the two loops, run in turns (noisy on a busy machine), and the sum of the parts,
each timed alone: observation, norms, averages, closing a window. Prints; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.clock import SystemClock
from common.config import load_settings
from common.messages import Message
from common.schedule import rate_factor
from common.settings import RunSettings
from trainer_node.assembly import build_loop, prepare_task
from trainer_node.fingerprint import fingerprint
from trainer_node.groups import parameter_groups
from trainer_node.links import NoDecisions
from trainer_node.loop import Loop
from trainer_node.observer import Observer
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.phases import PhaseState
from trainer_node.progress import step_facts
from trainer_node.step import StepTensors, gradient_norms, train_step

STEPS, WINDOW_STEPS, ROUNDS = 160, 16, 5


def settings_of(width: int, optimizer: str) -> RunSettings:
    sizes = [f"trainer.model.width={width}", "trainer.model.layers=2", "trainer.model.heads=2"]
    return load_settings(
        preset="nano",
        overrides=[
            *sizes, "trainer.model.context_tokens=64", "trainer.batch.sequences=8", f"trainer.steps={STEPS}",
            "trainer.statistics_steps=16", f"trainer.window_steps={WINDOW_STEPS}", "trainer.threads=1",
            f"trainer.optimizer.name={optimizer}",
        ],
    )  # fmt: skip


def bare(settings: RunSettings) -> float:
    """Seconds of a plain loop with the same steps."""
    trainer = settings.trainer
    task = prepare_task(trainer)
    optimizers, groups = (
        build_optimizers(task.model, trainer.optimizer, task.device),
        parameter_groups(task.model),
    )
    started = time.perf_counter()
    for step in range(STEPS):
        set_rates(optimizers, rate_factor(step, STEPS, trainer.schedule))
        batch = task.train.batch(step)
        train_step(task.model, task.loss, [batch], optimizers, groups, clip_norm=trainer.optimizer.clip_norm)
    return time.perf_counter() - started


def instrumented(settings: RunSettings) -> tuple[float, Loop]:
    loop = build_loop(
        prepare_task(settings.trainer),
        settings,
        links=NoDecisions(),
        emit=_ignore,
        housekeeping=lambda _: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    started = time.perf_counter()
    loop.run()
    return time.perf_counter() - started, loop


def _ignore(_: Message) -> None:
    pass


def microseconds(work: Callable[[], object], repeats: int = 200) -> float:
    """Median of one call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def parts(loop: Loop) -> dict[str, float]:
    """Microseconds: a step's observation, norms and averages; a window's end."""
    assert loop.basis is not None
    basis, progress = loop.basis, loop.progress
    observer = Observer(loop.optimizers, loop.settings, ledger=loop.ledger, memory=loop.memory, emit=_ignore)
    progress.phase = replace(PhaseState(loop.progress.phase.phase, 5))
    tensors = StepTensors(torch.tensor(3.0), torch.ones(len(loop.groups)), torch.tensor(1.0))

    def observe() -> None:
        facts = partial(
            step_facts,
            progress.phase,
            loop.task,
            loop.settings,
            step=progress.step + 1,
            rate_factor=1.0,
            step_seconds=1.0,
            data_seconds=0.0,
        )
        observer.observe(progress, tensors, facts, wall_seconds=0.0)

    return {
        "observe": microseconds(observe),
        "norms": microseconds(lambda: gradient_norms(loop.groups)),
        "averages": microseconds(basis.averages.after_step),
        "fingerprint": microseconds(lambda: fingerprint(basis.parameters), 50),
        "close_window": microseconds(lambda: basis.close_window(window=1, fingerprint=""), 50),
        "begin_window": microseconds(basis.averages.begin_window, 50),
        "momentum": microseconds(lambda: _momenta(loop), 50),
    }


def _momenta(loop: Loop) -> None:
    assert loop.basis is not None
    for _, directions in loop.basis.directions():
        del directions


def report(width: int, optimizer: str) -> dict[str, Any]:
    settings = settings_of(width, optimizer)
    pairs = [(bare(settings), instrumented(settings)) for _ in range(ROUNDS)]
    step_us = 1e6 * min(seconds for seconds, _ in pairs) / STEPS
    ratios = [seconds / plain - 1 for plain, (seconds, _) in pairs]
    loop = pairs[-1][1][1]
    cost = parts(loop)
    watching_us = cost["observe"] + cost["averages"]
    window_us = cost["fingerprint"] + cost["close_window"] + cost["begin_window"]
    return {
        "parameters": sum(p.numel() for p in loop.task.model.parameters()),
        "step_us": step_us,
        "wall_overhead_share": {"median": statistics.median(ratios), "least": min(ratios)},
        **{f"{name}_us": value for name, value in cost.items()},
        "step_share": watching_us / step_us,
        "window_share": window_us / WINDOW_STEPS / step_us,
        "whole_share": (watching_us + window_us / WINDOW_STEPS) / step_us,
        "whole_share_window_times_64": (watching_us + window_us / WINDOW_STEPS / 64) / step_us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: report(arguments.width, name) for name in ("adamw", "muon")}
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
