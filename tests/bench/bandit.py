"""What choosing and learning from an outcome cost: `python -m tests.bench.bandit [--json FILE]`.

Bandit of 13 arms and 24 features (a decision chooses once and updates once), residual store of 10, 50 and
1000 entries, calibration with a full window. Times one call each; prints a table, asserts nothing.
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

from predictor_node.bandit import REST, LinUCB
from predictor_node.calibration import WINDOW, Calibration
from predictor_node.residuals import Residuals

REPEATS = 3000
JUMPS = [f"drift:{horizon}" for horizon in (5, 10, 15, 25, 50, 75)]
JUMPS += [f"forecaster:{windows}w" for windows in (1, 2, 4, 8)] + ["pull_back:0.5", "pull_back:1.0"]
ARMS = (REST, *JUMPS)
DIMENSION = 24


def microseconds(work: Callable[[int], object]) -> dict[str, float]:
    """Median and 99th percentile of one call; `work` gets the number of the call."""
    times = []
    for call in range(REPEATS):
        started = time.perf_counter()
        work(call)
        times.append((time.perf_counter() - started) * 1e6)
    times.sort()
    return {"p50": statistics.median(times), "p99": times[int(0.99 * len(times)) - 1]}


def contexts() -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(REPEATS, DIMENSION))
    drawn[:, 0] = 1.0
    return drawn


def bandit_times(forgetting: float) -> dict[str, dict[str, float]]:
    bandit, drawn = LinUCB(ARMS, DIMENSION, forgetting=forgetting), contexts()
    label = "" if forgetting == 1.0 else f", forgetting {forgetting}"

    def learn(call: int) -> None:
        bandit.update(ARMS[call % len(ARMS)], drawn[call], 0.1, str(call))

    return {
        f"bandit update{label}": microseconds(learn),
        f"bandit choose{label}": microseconds(lambda call: bandit.choose(drawn[call], ARMS)),
    }


def residual_times(entries: int) -> dict[str, dict[str, float]]:
    residuals, drawn = Residuals(DIMENSION), contexts()
    rng = np.random.default_rng(1)
    for step in range(entries):
        residuals.add(rng.normal(size=DIMENSION), step=step, forecast=2.0, happened=2.0 + 0.1 * rng.normal())

    def find(call: int) -> None:
        residuals.advise(drawn[call], step=entries, forecast=2.0)

    times = {f"residual find at {entries}": microseconds(find)}

    def add(call: int) -> None:
        if call % 10 == 0:
            residuals._count = entries  # stay at this size
        residuals.add(drawn[call], step=call, forecast=2.0, happened=2.1, coefficient_scale=0.9)

    return {**times, f"residual add at {entries}": microseconds(add)}


def calibration_times() -> dict[str, dict[str, float]]:
    calibration, rng = Calibration(), np.random.default_rng(2)
    errors = rng.normal(size=REPEATS + WINDOW).tolist()
    for error in errors[:WINDOW]:
        calibration.observe("9-16", forecast=2.0, spread=0.1, happened=2.0 + 0.1 * error)

    def observe(call: int) -> None:
        happened = 2.0 + 0.1 * errors[WINDOW + call]
        calibration.observe("9-16", forecast=2.0, spread=0.1, happened=happened)

    def trust(call: int) -> None:
        calibration.confidence("9-16", forecast=2.0, spread=0.1)

    return {
        f"calibration observe at {WINDOW}": microseconds(observe),
        f"confidence, uncached, at {WINDOW}": microseconds(trust),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    results = {**bandit_times(1.0), **bandit_times(0.99)}
    for entries in (10, 50, 1000):
        results |= residual_times(entries)
    results |= calibration_times()
    print(f"{'one call, microseconds':<40} {'p50':>9} {'p99':>9}")
    for name, figures in results.items():
        print(f"{name:<40} {figures['p50']:>9.1f} {figures['p99']:>9.1f}")
    if arguments.json:
        facts = {
            "machine": platform.platform(),
            "arms": len(ARMS),
            "dimension": DIMENSION,
            "results": results,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
