"""A race without training: ends follow a formula of arm, config, length and seed. Workers can import it."""

from __future__ import annotations

import math
import os
import signal
import zlib
from dataclasses import replace

from common.errors import SettingsError
from trainer_node.race.run_result import CurvePoint, RunKey, RunResult
from trainer_node.race.workers import RunOrder

NOISE = 0.01
BEST_RATE = 0.003  # no preset has it: tuning has something to find
GAIN = {"ours": 1.6, "ours-fixed": 1.2, "adamw-constant": 0.5}  # real steps are worth this many


def fake_result(key: RunKey, *, noise: float = NOISE) -> RunResult:
    """Loss falls with the logarithm of the length; the best rate is the one of the config's centre."""
    luck = zlib.crc32(key.identity.encode()) / 2**32 - 0.5
    worth = GAIN.get(key.arm, 1.0)
    rate = dict(key.config).get("trainer.optimizer.rate", 0.01)
    miss = 0.05 * abs(math.log(rate / BEST_RATE))

    def point(steps: int) -> CurvePoint:
        loss = 3.0 - 0.3 * math.log(worth * steps) + miss + noise * luck
        return CurvePoint(
            steps=steps,
            passes=3.0 * steps,
            backward_passes=float(steps),
            trainer_seconds=0.01 * steps,
            predictor_seconds=0.0,
            loss=loss + 0.1,
            read_loss=loss,
        )

    steps = sorted({max(1, key.planned_steps * part // 4) for part in range(1, 5)})
    return RunResult(
        key=key,
        curve=tuple(map(point, steps)),
        diverged=False,
        peak_bytes=1 << 20,
        verdicts=(),
        cosines=(),
        forecasts=(),
        phases=(),
        machine="no machine",
    )


def run_fake(order: RunOrder) -> RunResult:
    return fake_result(order.key)


def run_elsewhere(order: RunOrder) -> RunResult:
    """On another machine, by other code."""
    return replace(fake_result(order.key), machine="another machine", code="other")


def run_or_die(order: RunOrder) -> RunResult:
    """Odd seeds kill their worker."""
    if order.key.seed % 2:
        os._exit(7)
    return fake_result(order.key)


def run_and_interrupt(order: RunOrder) -> RunResult:
    """The first runs of the race proper press Ctrl-C: the signal comes before the answer."""
    if order.key.purpose == "race":
        os.kill(os.getppid(), signal.SIGINT)
    return fake_result(order.key)


def run_or_raise(order: RunOrder) -> RunResult:
    if order.key.seed % 2:
        raise ZeroDivisionError("two\nlines")
    return fake_result(order.key)


def run_always_failing(order: RunOrder) -> RunResult:
    raise OSError("no space left")


def run_users_mistake(order: RunOrder) -> RunResult:
    raise SettingsError("install the extra `race`")


def run_telling_threads(order: RunOrder) -> RunResult:
    """The answer's machine says what the worker's environment was before torch could be loaded."""
    import sys

    words = f"OMP {os.environ['OMP_NUM_THREADS']}, torch {'torch' in sys.modules}"
    return replace(fake_result(order.key), machine=words)
