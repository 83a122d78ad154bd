"""A made-up run whose predictor changes rate, batch and context: for tests, and to look at the page.

    python -m tests.monitor.fake_controls      serves its page until Ctrl-C

Every number is invented; nothing here is a measurement.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from common import features
from common import messages as m
from common.config import dump_settings, parse_settings
from monitor_node.feed import Feed
from monitor_node.run_reader import new_view
from monitor_node.snapshot import as_dict
from monitor_node.web import PageServer
from tests.monitor import fake_run as fake

CONTEXT_TOKENS = 256
PROBATION_STEPS = 16
V = m.Verdict


def started(*, steps: int = 1000, generation: int = 1, first_step: int = 0, **switches: bool) -> m.RunStarted:
    values: dict[str, Any] = {
        "trainer": {
            "task": "language",
            "steps": steps,
            "model": {"context_tokens": CONTEXT_TOKENS},
            "controls": switches,
        }
    }
    made = fake.started("fake", generation=generation, first_step=first_step)
    return replace(made, settings_toml=dump_settings(parse_settings(values)))


def observation(
    step: int,
    loss: float = 2.0,
    *,
    rate: float = 1.0,
    batch: float = 1.0,
    context_share: float = 1.0,
    noise: float | None = None,
    seconds: float = fake.STEP_SECONDS,
    progress: float = 0.0,
    phase: m.Phase = m.Phase.FULL,
    attempt: int = 0,
) -> m.Observation:
    made = fake.observation(step, loss, phase=phase, attempt=attempt)
    values = list(made.features)
    for name, value in {
        "log2_rate_factor": math.log2(rate),
        "log2_batch_factor": math.log2(batch),
        "context_share": context_share,
        "has_noise_scale": float(noise is not None),
        "log10_noise_scale_over_batch": math.log10(noise) if noise else 0.0,
        "log10_step_seconds": math.log10(seconds),
        "progress": progress,
    }.items():
        values[features.INDEX[name]] = value
    return replace(made, features=tuple(values))


def decision(step: int, controls: m.Controls, reason: str = "", *, generation: int = 1) -> m.PhaseDecision:
    made = replace(fake.decision(step, 0, reason=reason), phase=m.Phase.PREDICT, controls=controls)
    return replace(made, base_generation=generation)


def outcome(
    step: int,
    verdict: m.Verdict,
    *,
    before: float = 2.2,
    end: float = 2.09,
    forecast: float = 2.1,
    spread: float = 0.02,
) -> m.Outcome:
    made = fake.outcome(step, verdict, 0)
    if not made.probation_steps:
        return made
    return replace(made, loss_before=before, loss_end=end, loss_forecast=forecast, loss_spread=spread)


# Step, what is asked for, the reason, what became of it, seconds of a step with it.
_C = m.Controls
_STORY = (
    (96, _C(context_tokens=64), "early: 64 of 256 tokens of context", V.ACCEPTED, 0.09),
    (192, _C(context_tokens=64, rate_factor=2.0),
     "a climb was not tried yet, +20 % progress per second forecast", V.ACCEPTED, 0.09),
    (288, _C(context_tokens=64, rate_factor=4.0),
     "the last climb brought +31 %, +15 % progress per second forecast", V.REFUSED, 0.09),
    (384, _C(context_tokens=64, rate_factor=2.0, batch_factor=2.0),
     "noise scale 3.1× batch, +12 % progress per second forecast", V.ACCEPTED, 0.15),
    (480, _C(context_tokens=128, rate_factor=2.0, batch_factor=2.0),
     "its time in the curriculum", V.ACCEPTED, 0.17),
    (576, _C(context_tokens=128, rate_factor=2.0, batch_factor=4.0),
     "noise scale 4.6× batch, +9 % progress per second forecast", V.VETOED, 0.17),
    (640, _C(context_tokens=128, rate_factor=2.0, batch_factor=4.0),
     "noise scale 5.0× batch, +14 % progress per second forecast", V.ACCEPTED, 0.31),
    (720, _C(rate_factor=2.0, batch_factor=4.0), "its time in the curriculum", V.ACCEPTED, 0.36),
)  # fmt: skip


def fake_controls(*, steps: int = 800, seed: int = 0) -> Iterator[tuple[str, m.Message, float]]:
    """(writer, message, seconds since the start) of a run with trials of every kind."""
    rng = random.Random(seed)
    at_seconds, clock, seconds, now, step = 0.0, 0.0, 0.12, m.Controls(), 0
    story = {base: rest for base, *rest in _STORY}
    yield "trainer", started(steps=2400, rate=True, batch=True, context=True), at_seconds

    def walk(controls: m.Controls, step_seconds: float, phase: m.Phase) -> m.Observation:
        loss = 1.9 + 4.0 * (1.0 + clock / 60.0) ** -0.6 + rng.gauss(0.0, 0.05)
        context_share = (controls.context_tokens or CONTEXT_TOKENS) / CONTEXT_TOKENS
        noise = (0.8 + step / 120.0) * math.exp(rng.gauss(0.0, 0.15)) / controls.batch_factor
        return observation(
            step, loss, rate=controls.rate_factor, batch=controls.batch_factor, context_share=context_share,
            noise=noise if step > 30 else None, seconds=step_seconds, progress=clock / 2400.0, phase=phase,
        )  # fmt: skip

    def go(count: int, controls: m.Controls, step_seconds: float, phase: m.Phase) -> Iterator[Any]:
        nonlocal step, clock, at_seconds
        for _ in range(count):
            step, clock, at_seconds = step + 1, clock + controls.batch_factor, at_seconds + step_seconds
            yield "trainer", walk(controls, step_seconds, phase), at_seconds
            if step % 5 == 0:
                yield "trainer", fake.heartbeat(step=step, uptime_seconds=at_seconds), at_seconds
                yield "monitor", fake.sample(int(8.9 * 2**30), source="nvml"), at_seconds
            if step % 50 == 0:
                yield "trainer", fake.evaluation(step, 2.0 + 4.0 * (1.0 + clock / 60.0) ** -0.6), at_seconds

    while step < steps:
        yield from go(16, now, seconds, m.Phase.FULL if step >= 64 else m.Phase.WARMUP)
        if step not in story:
            continue
        wanted, reason, verdict, step_seconds = story[step]
        base, base_clock = step, clock
        yield "predictor", decision(step, wanted, reason), at_seconds
        if verdict in m.APPLIED_VERDICTS:
            yield from go(PROBATION_STEPS, wanted, step_seconds, m.Phase.CORRECT)
        if verdict is V.ACCEPTED:
            now, seconds = wanted, step_seconds
        elif verdict is V.REFUSED:
            step, clock = base, base_clock
        loss = 1.9 + 4.0 * (1.0 + base_clock / 60.0) ** -0.6
        end = loss + (0.02 if verdict is V.REFUSED else -0.044)
        told = outcome(base, verdict, before=loss, end=end, forecast=loss - 0.04, spread=0.004)
        yield "trainer", told, at_seconds


def main() -> None:
    view, feed, at_seconds = new_view("made-up-controls"), Feed("fake"), 0.0
    server = PageServer(feed, host="127.0.0.1", port=0)
    server.start()
    print(server.url, flush=True)
    begun = time.time() - 150.0
    for _, message, at_seconds in fake_controls():
        view.fold(message, sent_unix_seconds=begun + at_seconds, at_seconds=at_seconds)
    feed.publish(as_dict(view, now_seconds=at_seconds) | {"server": {"connected": True, "away_seconds": 0}})
    while True:
        time.sleep(1.0)


if __name__ == "__main__":
    main()
