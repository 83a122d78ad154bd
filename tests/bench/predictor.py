"""What the predictor costs: `python -m tests.bench.predictor [--json FILE]`, with OMP_NUM_THREADS=1.

The original's six groups (shared/reference/hybrid.md, sections 1f and 4) and two more: RSSM prediction at
seven horizons, state encoding, expansion of a weight delta, RSSM training, confidence, state history,
residual store, phase decision. "Amortised" lines add up medians. Processor time of one thread, since other
processes share the machine. Prints a table, asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.messages import DIRECTIONS
from predictor_node.bandit import REST, LinUCB
from predictor_node.episodes import NUM_ACTIONS, Tick, encode_features
from predictor_node.fixed_policy import FixedPolicy
from predictor_node.history import History
from predictor_node.policy import DecisionInput
from predictor_node.residuals import Residuals
from predictor_node.rssm import Latent
from predictor_node.world_model import WorldModel
from tests.predictor.scripted import NUM_GROUPS, observed, point, small_settings
from trainer_node.basis import Basis
from trainer_node.delta import linear_deltas

HORIZONS = (1, 5, 10, 15, 25, 50, 75)
ARMS, SHORT, WINDOW = 7, 8, 16
Times = dict[str, float]


def microseconds(work: Callable[[], object], repeats: int, warm_up: int = 5) -> Times:
    """Shortest time, median and 99th percentile of one call. On a busy machine the shortest says most."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        started = time.thread_time_ns()
        work()
        times.append((time.thread_time_ns() - started) / 1e3)
    times.sort()
    return {"best": times[0], "p50": statistics.median(times), "p99": times[int(0.99 * (len(times) - 1))]}


def ticks(count: int) -> list[Tick]:
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(count, 64)).astype(np.float32)
    actions = np.zeros((count, NUM_ACTIONS), dtype=np.float32)
    actions[::20] = rng.uniform(size=NUM_ACTIONS)
    return [
        Tick(features_F, 3.0 + 0.1 * float(features_F[0]), action)
        for features_F, action in zip(drawn, actions, strict=True)
    ]


def taught_model() -> WorldModel:
    model = WorldModel(len(DIRECTIONS), 0)
    for tick in ticks(512):
        model.record(tick)
        model.observe_latest()
    model.learn(20)
    return model


def prediction(model: WorldModel) -> dict[str, Times]:
    plans = {
        ticks: np.random.default_rng(ticks).uniform(size=(ARMS, ticks, NUM_ACTIONS)) for ticks in HORIZONS
    }
    return {
        f"rssm prediction, {ARMS} arms, {ticks} ticks": microseconds(
            lambda plan=plan: model.imagine(plan), 60
        )
        for ticks, plan in plans.items()
    }


def encoding_and_history(model: WorldModel) -> dict[str, Times]:
    features_F = ticks(1)[0].features

    @torch.inference_mode()
    def encode() -> None:
        model.encode(encode_features(features_F))

    history = History()
    for step in range(1, 600):
        history = history.append(observed(step))
    newest = observed(600)
    one = ticks(1)[0]
    return {
        "state encoding": microseconds(encode, 3000),
        "state history, append an observation": microseconds(lambda: history.append(newest), 3000),
        "state history, record a tick": microseconds(lambda: model.record(one), 3000),
    }


def observation(model: WorldModel) -> dict[str, Times]:
    one = ticks(1)[0]

    def observe() -> None:
        model.record(one)
        model.observe_latest()

    return {
        "record and observe one tick": microseconds(observe, 1000),
        "rssm training, one update of 8x16 ticks": microseconds(lambda: model.learn(1), 100),
    }


def confidence(model: WorldModel) -> dict[str, Times]:
    actions_NTA = np.random.default_rng(0).uniform(size=(ARMS, SHORT, NUM_ACTIONS))
    end = Latent(torch.rand(ARMS, model.sizes.hidden), torch.rand(ARMS, model.sizes.code))
    return {
        f"confidence of {ARMS} arms, {SHORT} ticks, uncached": microseconds(
            lambda: model.imagine(actions_NTA), 500
        ),
        f"confidence of {ARMS} arms, already imagined": microseconds(lambda: model.read_arms(end), 1000),
    }


def weight_delta(millions: int) -> Times:
    """All four directions but momentum, expanded for one matrix of that many million weights."""
    parameter = torch.nn.Parameter(torch.randn(1000, 1000 * millions))
    coefficients_GK = torch.full((1, len(DIRECTIONS)), 0.1)
    coefficients_GK[:, DIRECTIONS.index("momentum")] = 0.0
    held = [torch.randn_like(parameter) for _ in DIRECTIONS]

    class OneMatrix:
        parameters = (parameter,)
        group_of = (0,)

        def directions(self, *, with_momentum: bool) -> list[tuple[int, list[torch.Tensor]]]:
            return [(0, held)]

    basis: Basis = OneMatrix()  # type: ignore[assignment]
    return microseconds(lambda: list(linear_deltas(basis, coefficients_GK)), 20)


def residuals_and_decision() -> dict[str, Times]:
    rng = np.random.default_rng(0)
    store, bandit = Residuals(24), LinUCB((REST, *map(str, HORIZONS)), 24)
    contexts = rng.normal(size=(1000, 24))
    contexts[:, 0] = 1.0
    for step, context in enumerate(contexts):
        store.add(context, step=step, forecast=2.0, happened=2.1)
    arms, history = bandit.arms, History()
    for step in range(1, 41):
        history = history.append(observed(step))
    decision_point = point(5)
    given = DecisionInput(
        observation=observed(40, decision_point=decision_point),
        point=decision_point,
        generation=1,
        history=history,
        num_groups=NUM_GROUPS,
        directions=DIRECTIONS,
    )
    policy = FixedPolicy(small_settings())
    return {
        "residual store, add": microseconds(
            lambda: store.add(contexts[0], step=1, forecast=2.0, happened=2.1), 2000
        ),
        "residual store, find among 1000": microseconds(
            lambda: store.advise(contexts[1], step=1000, forecast=2.0), 2000
        ),
        "phase decision, bandit over 8 arms": microseconds(lambda: bandit.choose(contexts[2], arms), 2000),
        "phase decision, fixed policy": microseconds(lambda: policy.decide(given), 2000),
    }


def amortised(scenarios: dict[str, Times], model: WorldModel) -> dict[str, float]:
    """Microseconds per observation; a decision every WINDOW ticks, over the longest horizon."""
    p50 = {name: times["p50"] for name, times in scenarios.items()}
    observe, update = p50["record and observe one tick"], p50["rssm training, one update of 8x16 ticks"]
    decide = p50[f"rssm prediction, {ARMS} arms, {HORIZONS[-1]} ticks"]
    return {
        "rollout per arm and tick": decide / (ARMS * HORIZONS[-1]),
        "rollout per member, arm and tick": decide / (ARMS * HORIZONS[-1] * model.sizes.members),
        "observation, learned at every one": observe + update,
        "observation, learned at every 8th": observe + update / 8,
        "observation, learned at every 16th": observe + update / 16,
        f"learned at every 8th + decision every {WINDOW}": observe + update / 8 + decide / WINDOW,
        "learned at every 8th + decision at every one": observe + update / 8 + decide,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = taught_model()
    scenarios = {
        **prediction(model),
        **encoding_and_history(model),
        **observation(model),
        **confidence(model),
        **{f"weight delta, {millions} M weights": weight_delta(millions) for millions in (1, 10)},
        **residuals_and_decision(),
    }
    sums = amortised(scenarios, model)
    for name, times in scenarios.items():
        shown = "   ".join(f"{quantile} {value:9.1f} us" for quantile, value in times.items())
        print(f"{name:48s} {shown}")
    for name, value in sums.items():
        print(f"{name:48s}      {value:9.1f} us")
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "weights": sum(p.numel() for p in model.rssm.parameters()),
        "flops_per_update": model.flops_per_update,
        "flops_per_tick": model.flops_per_tick,
        "microseconds": scenarios,
        "amortised_us": sums,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print({name: report[name] for name in ("machine", "weights", "flops_per_update", "flops_per_tick")})


if __name__ == "__main__":
    main()
