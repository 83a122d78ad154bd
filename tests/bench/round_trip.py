"""Decision round trip: `python -m tests.bench.round_trip [--decisions N]`.

Trainer side in this process (outbox and inbox as in a run), a private real server, and a real
`predictor-node serve` process with the fixed policy. Time from handing over the observation of a
decision point to having its decision; steps are a millisecond apart, as short as real ones get.
Prints percentiles; asserts nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import random
import subprocess
import sys
import threading
import time

from common import features
from common.clock import SystemClock
from common.config import dump_settings, load_settings
from common.embedded import start_server
from common.messages import (
    DIRECTIONS,
    DecisionPoint,
    GroupSpec,
    Observation,
    ParameterSpec,
    Phase,
    RunStarted,
)
from common.open_bus import open_bus
from common.outbox import Outbox
from common.publisher import Publisher
from trainer_node.inbox import Inbox

GROUPS, WINDOW = 11, 16
STEP_SECONDS = 0.001


def run_started(run_id: str) -> RunStarted:
    settings = load_settings(
        preset="nano",
        overrides=["trainer.steps=1000000", "trainer.statistics_steps=1", "predictor.rest_windows=0"],
    )
    spec = ParameterSpec(name="w", shape=(8, 8), dtype="float32")
    return RunStarted(
        run_id=run_id,
        generation=1,
        resumed_from="",
        settings_toml=dump_settings(settings),
        feature_version=features.VERSION,
        directions=DIRECTIONS,
        groups=tuple(GroupSpec(name=f"g{i}", parameters=(spec,)) for i in range(GROUPS)),
        first_step=0,
    )


def observation(step: int, rng: random.Random) -> Observation:
    k = len(DIRECTIONS)
    point = DecisionPoint(
        window=step // WINDOW,
        fingerprint="0" * 16,
        gram=tuple(rng.random() + 0.5 for _ in range(GROUPS * k * k)),
        parameter_norms=(1.0,) * GROUPS,
        displacement_norms=(0.1,) * GROUPS,
        happened=(0.1,) * (GROUPS * k),
        unexplained_share=(0.5,) * GROUPS,
    )
    return Observation(
        step=step,
        attempt=0,
        phase=Phase.FULL,
        features=tuple(rng.random() for _ in features.NAMES),
        gradient_norms=(1.0,) * GROUPS,
        decision_point=point if step % WINDOW == 0 else None,
    )


def measure(decisions: int) -> list[float]:
    """Microseconds, one per decision."""
    run_id, clock, rng = "bench", SystemClock(), random.Random(0)
    with start_server() as server:
        predictor = subprocess.Popen(
            [sys.executable, "-m", "predictor_node", "serve", "--run-id", run_id, "--stop-with-parent"],
            stdin=subprocess.PIPE,
            env={**os.environ, "HPT_REDIS_URL": server.url},
        )
        writing, reading = open_bus(server.url, run_id), open_bus(server.url, run_id)
        generation = writing.next_generation("trainer", at_least=1)
        outbox = Outbox(
            Publisher(writing, writer="trainer", generation=generation, clock=clock, rng=rng), capacity=20_000
        )
        inbox = Inbox(
            reading, generation=generation, silent_seconds=30.0, stop=threading.Event(), clock=clock, rng=rng
        )
        outbox.put(dataclasses.replace(run_started(run_id), generation=generation))
        inbox.wait_for_predictor(30.0)
        times = []
        for step in range(1, (decisions + 20) * WINDOW + 1):
            message = observation(step, rng)
            time.sleep(STEP_SECONDS)
            started = time.perf_counter()
            outbox.put(message)
            if message.decision_point is not None:
                if inbox.wait_decision(step=step, attempt=0, seconds=10.0) is None:
                    raise SystemExit(f"no decision for step {step}")
                times.append((time.perf_counter() - started) * 1e6)
        inbox.close()
        outbox.close(5.0)
        assert predictor.stdin is not None
        predictor.stdin.close()
        predictor.wait(10)
        writing.close()
        reading.close()
    return times[20:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=2000)
    times = sorted(measure(parser.parse_args().decisions))
    print(f"{len(times)} decisions on {platform.machine()}, {os.cpu_count()} cores")
    for share in (0.5, 0.9, 0.99, 0.999):
        print(f"p{share * 100:g}: {times[min(len(times) - 1, int(share * len(times)))]:,.0f} us")


if __name__ == "__main__":
    main()
