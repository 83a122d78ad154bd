"""What watching costs a step: `python -m tests.bench.hot_path [--json FILE]`.

Times, on CPU tensors: (1) observation and hand-off for 124M-parameter shapes, norm kernels left out;
(2) the same plus norms and averages for `nano`, as a share of its step. Prints a table; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.clock import SystemClock
from common.config import load_settings
from common.memory_bus import MemoryBus, MemoryServer
from common.outbox import Outbox
from common.publisher import Publisher
from trainer_node.assembly import build_loop, prepare_task
from trainer_node.averages import ExactAverages
from trainer_node.featurize import FeatureState
from trainer_node.groups import parameter_groups
from trainer_node.links import NoDecisions
from trainer_node.loop import Loop
from trainer_node.probe import Probe
from trainer_node.progress import first_progress, phase_rules, step_facts
from trainer_node.snapshot import MemoryStore
from trainer_node.step import StepTensors, gradient_norms
from trainer_node.tasks import build_model

REPEATS = 300


def microseconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and 99th percentile of one call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e6)
    times.sort()
    return {"p50": statistics.median(times), "p99": times[int(0.99 * len(times)) - 1]}


def make_outbox() -> Outbox:
    bus = MemoryBus(MemoryServer(), "bench")
    publisher = Publisher(bus, writer="trainer", generation=1, clock=SystemClock(), rng=random.Random(0))
    return Outbox(publisher, capacity=20_000)


def large_shapes() -> dict[str, Any]:
    """124M parameters: gradients exist, their norms are taken as given."""
    settings = load_settings(preset="gpt2-small", overrides=["trainer.device=cpu"])
    model = build_model(settings.trainer, torch.device("cpu"))
    groups = parameter_groups(model)
    task = prepare_task(load_settings(preset="digits").trainer)
    progress = first_progress(phase_rules(settings.trainer))
    facts = partial(
        step_facts,
        progress.phase,
        task,
        settings.trainer,
        step=1,
        rate_factor=1.0,
        step_seconds=1.0,
        data_seconds=0.0,
    )
    probe, state, outbox = Probe([], None), FeatureState(), make_outbox()
    tensors = StepTensors(torch.tensor(3.0), torch.rand(len(groups)), torch.tensor(1.0))

    def observe_and_hand_off() -> None:
        probe.record(tensors, facts, 0)
        for observation in probe.collect(state, wait=False):
            outbox.put(observation)

    microseconds(observe_and_hand_off, 100)  # fill the windows
    result = microseconds(observe_and_hand_off, REPEATS)
    outbox.close(5.0)
    parameters = [p.detach() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    averages = ExactAverages(parameters, average_steps=20, slow_momentum=0.6, park=MemoryStore())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "groups": len(groups),
        "observation_and_hand_off_us": result,
        "norm_kernels_us": microseconds(lambda: gradient_norms(groups), 5),
        "averages_us": microseconds(averages.after_step, 5),
    }


def nano() -> dict[str, Any]:
    """Real steps of `nano`: what watching takes of them, norms and averages included."""
    settings = load_settings(preset="nano", overrides=["trainer.steps=60", "trainer.statistics_steps=1000"])
    outbox = make_outbox()
    loop = build_loop(
        prepare_task(settings.trainer),
        settings,
        links=NoDecisions(),
        emit=outbox.put,
        housekeeping=lambda _: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    loop.run()
    step_us = 1e6 * loop.ledger.wall_seconds["steps"] / 60
    assert loop.basis is not None
    watching = {
        "observation_and_hand_off_us": microseconds(lambda: _observe(loop, outbox), REPEATS),
        "norm_kernels_us": microseconds(lambda: gradient_norms(loop.groups), REPEATS),
        "averages_us": microseconds(loop.basis.averages.after_step, REPEATS),
    }
    outbox.close(5.0)
    share = watching["observation_and_hand_off_us"]["p50"] / step_us
    whole = sum(cost["p50"] for cost in watching.values()) / step_us
    return {"step_us": step_us, **watching, "observation_share": share, "everything_share": whole}


def _observe(loop: Loop, outbox: Outbox) -> None:
    progress = loop.progress
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
    norms_G = torch.ones(len(loop.groups))
    probe = Probe([], None)
    probe.record(StepTensors(torch.tensor(3.0), norms_G, torch.tensor(1.0)), facts, 0)
    for observation in probe.collect(loop.progress.features, wait=False):
        outbox.put(observation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "gpt2-small shapes": large_shapes(),
        "nano": nano(),
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
