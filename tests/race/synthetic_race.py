"""A made-up race: seeded curves with known crossings. For tests and for looking at pictures; proves nothing.

Every arm has a true speed: its final loss after n steps is that of the reference after speed * n steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer_node.race.plan import RaceRecord
from trainer_node.race.run_result import CurvePoint, PhaseSpan, RunKey, RunResult

BASE_STEPS = 400
SEEDS = tuple(range(10))
CONFIG = (("trainer.optimizer.rate", 0.003), ("trainer.optimizer.weight_decay", 0.01))
SPEEDS = {
    "adamw-constant": 0.55, "adamw-decay": 0.93, "adamw-decay-ema": 1.0, "muon-decay": 1.6,
    "schedule-free": 0.97, "lookahead": 0.94, "snoo": 1.02, "ema-nesterov": 1.04, "line-fit": 0.9,
    "ours-fixed": 0.98, "ours-unguarded": 0.2, "ours-random": 0.88, "ours": 1.09,
}  # fmt: skip
READ_MID_RUN = frozenset({"adamw-constant", "schedule-free"})


def loss_after(steps: float, speed: float = 1.0) -> float:
    """Nats; falls like a power of the steps."""
    return 1.2 + 4.8 * (1 + speed * steps / 12) ** -0.55


TARGET = loss_after(BASE_STEPS)


def record(arms: Iterable[str] = tuple(SPEEDS), **changes: Any) -> RaceRecord:
    arms = tuple(arms)
    values: dict[str, Any] = {
        "task": "python", "rule": "decayed", "target": TARGET, "base_steps": BASE_STEPS, "seeds": SEEDS,
        "trials": 16, "arms": arms, "tuned": dict.fromkeys(arms, CONFIG), "reference_arm": "adamw-decay-ema",
        "machine": "2 cores of a made-up processor, 1 thread, torch 2.13.0", "date": "2026-11-21",
        "command": "trainer-node race python --seeds 10",
    }  # fmt: skip
    return RaceRecord(**{**values, **changes})


def run(
    arm: str,
    steps: int,
    seed: int,
    *,
    losses: Sequence[float] | None = None,
    seconds_per_step: float = 0.1,
    diverged: bool = False,
    task: str = "python",
    purpose: str = "race",
    speed: float | None = None,
    noise: float = 0.0,
) -> RunResult:
    """One run; its held-out curve is read 20 times, or as often as there are `losses`."""
    ours = arm.startswith("ours")
    speed = SPEEDS.get(arm, 1.0) if speed is None else speed
    dice = random.Random(f"{arm}/{seed}")
    shift = noise * random.Random(f"seed {seed}").gauss(0, 1) + 0.5 * noise * dice.gauss(0, 1)
    count = len(losses) if losses is not None else 20
    points = []
    for i in range(1, count + 1):
        at = steps * i // count
        tail = 1 if arm in READ_MID_RUN else 1 + 0.12 * (1 - i / count)  # a decayed rate pays at the end
        loss = losses[i - 1] if losses is not None else loss_after(at, speed) * tail + shift
        points.append(
            CurvePoint(
                steps=at,
                passes=at * (3.2 if ours else 3.0),
                backward_passes=float(at),
                trainer_seconds=at * seconds_per_step,
                predictor_seconds=at * seconds_per_step * 0.05 if ours else 0.0,
                loss=loss,
                read_loss=loss,
            )
        )
    forecasts = [(f, 0.05, f + 0.06 * dice.gauss(0, 1)) for f in (2.0 - 0.01 * i for i in range(24))]
    return RunResult(
        key=RunKey(
            task=task, arm=arm, config=CONFIG, planned_steps=steps, seed=seed, purpose=purpose
        ),
        curve=tuple(points),
        diverged=diverged,
        peak_bytes=300 << 20,
        verdicts=(("accepted", 14), ("refused", 4), ("rest", 3)) if ours else (),
        cosines=tuple(0.1 + 0.05 * dice.gauss(0, 1) for _ in range(18)) if ours else (),
        forecasts=tuple(forecasts) if ours else (),
        phases=phases(steps, dice) if ours else (),
        machine="made up",
    )  # fmt: skip


def phases(steps: int, dice: random.Random) -> tuple[PhaseSpan, ...]:
    spans = [PhaseSpan(phase="warmup", first_step=1, last_step=40, verdict="")]
    step = 40
    while step + 32 <= steps:
        spans.append(PhaseSpan(phase="full", first_step=step + 1, last_step=step + 16, verdict=""))
        verdict = dice.choices(["accepted", "refused", "rest", "ruined"], [14, 4, 3, 1])[0]
        step += 16
        if verdict == "rest":
            continue
        spans.append(PhaseSpan(phase="predict", first_step=step, last_step=step, verdict=verdict))
        if verdict != "ruined":
            spans.append(PhaseSpan(phase="correct", first_step=step + 1, last_step=step + 16, verdict=""))
        if verdict == "accepted":
            step += 16
    return tuple(spans)


def race_results(
    arms: Iterable[str] = tuple(SPEEDS), seeds: Iterable[int] = SEEDS, noise: float = 0.01
) -> list[RunResult]:
    """All runs of a finished race: arms with decay at six lengths around their crossing."""
    results = []
    for arm in arms:
        speed = SPEEDS[arm]
        lengths: Mapping[int, None] = dict.fromkeys(
            [BASE_STEPS, *(round(BASE_STEPS / max(speed, 0.45) * 1.05**k) for k in (-3, -1, 0, 1, 3))]
        )
        if arm in READ_MID_RUN:
            lengths = {BASE_STEPS: None, round(2.5 * BASE_STEPS): None}
        for seed in seeds:
            jitter = math.exp(0.02 * random.Random(f"{arm}/{seed}/clock").gauss(0, 1))
            results += [run(arm, n, seed, noise=noise, seconds_per_step=0.1 * jitter) for n in lengths]
    return results
