"""A made-up run as the nodes would tell it: for tests of the monitor, and to look at the page.

    python -m tests.monitor.fake_run [STEPS]      serves the page of a made-up live run until Ctrl-C

The curves are invented; nothing here is a measurement.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from common import features, sealed_folder
from common import messages as m
from common.bus import Bus
from common.clock import Clock, FakeClock, SystemClock
from common.config import dump_settings, parse_settings
from common.publisher import Publisher
from common.streams import MONITOR, NODES, PREDICTOR, TRAINER

WINDOW, PROBATION = 16, 16
STEP_SECONDS = 0.12


@dataclass(frozen=True, kw_only=True)
class Said:
    """One message of the run and when which node said it."""

    writer: str
    message: m.Message
    at_seconds: float  # since the run began


def started(
    run_id: str = "fake", *, steps: int = 1000, first_step: int = 0, generation: int = 1
) -> m.RunStarted:
    values = {"trainer": {"steps": steps, "seed": 7, "schedule": {"warmup_steps": 10}}}
    return m.RunStarted(
        run_id=run_id,
        generation=generation,
        resumed_from="",
        settings_toml=dump_settings(parse_settings(values)),
        feature_version=features.VERSION,
        directions=m.DIRECTIONS,
        groups=(),
        first_step=first_step,
    )


def observation(step: int, loss: float, *, phase: m.Phase = m.Phase.FULL, attempt: int = 0) -> m.Observation:
    values = dict.fromkeys(features.NAMES, 0.0)
    values |= {"loss": loss, "log10_units_per_step": math.log10(2048), "log10_step_seconds": -0.9}
    values |= {"loss_slope_64": -0.0012}
    return m.Observation(
        step=step,
        attempt=attempt,
        phase=phase,
        features=tuple(values.values()),
        gradient_norms=(),
        decision_point=None,
    )


def heartbeat(
    node: str = TRAINER,
    step: int = 0,
    *,
    state: str = "running",
    generation: int = 1,
    process_id: int = 1 << 22,
    uptime_seconds: float = 1.0,
) -> m.Heartbeat:
    return m.Heartbeat(
        node=node,
        generation=generation,
        process_id=process_id,
        state=state,
        step=step,
        uptime_seconds=uptime_seconds,
        counters=(m.Metric(name="queued", value=0.0, unit="entries"),),
    )


def sample(
    used_bytes: int | None, *, total_bytes: int | None = 16 << 30, source: str = "rss", reason: str = ""
) -> m.VramSample:
    return m.VramSample(
        source=source,
        device="host memory",
        used_bytes=used_bytes,
        total_bytes=total_bytes,
        trainer_bytes=used_bytes,
        unknown_reason=reason or ("" if used_bytes is not None else "lost"),
    )


def decision(
    step: int, horizon_steps: int, *, loss: float = 2.0, reason: str = "line fit"
) -> m.PhaseDecision:
    return m.PhaseDecision(
        decision_id=f"{step}.0",
        phase=m.Phase.PREDICT if horizon_steps else m.Phase.FULL,
        horizon_steps=horizon_steps,
        num_groups=0,
        num_directions=4,
        coefficients=(),
        controls=m.Controls(),
        forecast=m.Forecast(loss=loss, loss_without=loss + 0.01, spread=0.02),
        base_generation=1,
        base_step=step,
        base_attempt=0,
        base_fingerprint="f",
        valid_until_step=step + 2,
        reason=reason,
    )


def outcome(step: int, verdict: m.Verdict, horizon_steps: int = 10, *, loss: float = 2.0) -> m.Outcome:
    undone = verdict in (m.Verdict.REFUSED, m.Verdict.RUINED, m.Verdict.ABORTED)
    applied = verdict in m.APPLIED_VERDICTS
    probation = PROBATION if applied and verdict is not m.Verdict.RUINED else 0
    return m.Outcome(
        decision_id=f"{step}.0",
        verdict=verdict,
        base_step=step,
        attempt=1 if undone else 0,
        horizon_steps=horizon_steps,
        loss_before=loss if applied else math.nan,
        loss_after=math.inf if verdict is m.Verdict.RUINED else loss + 0.1,
        loss_end=loss + (0.05 if undone else -0.03) if probation else math.nan,
        loss_forecast=loss - 0.01 if probation else math.nan,
        loss_spread=0.02,
        delta_norm=1.5,
        delta_cosine=0.3 if probation else math.nan,
        probation_steps=probation,
        lost_steps=probation if undone else 0,
        passes=3.0,
        waiting_seconds=0.01,
        snapshot_seconds=0.02,
        jump_seconds=0.01,
        check_seconds=0.05,
        restore_seconds=0.02 if undone else 0.0,
        lost_seconds=probation * STEP_SECONDS if undone else 0.0,
        full_step_seconds=STEP_SECONDS,
    )


def evaluation(step: int, loss: float) -> m.Evaluation:
    return m.Evaluation(
        step=step, virtual_steps=0, loss=loss, accuracy=None, train_seconds=step * STEP_SECONDS
    )


def account(
    step: int,
    *,
    total_seconds: float,
    generation: int = 1,
    lost_steps: int = 0,
    **seconds: float,
) -> m.HealthSample:
    """Where the time went, as trainer_node/housekeeping.py tells it; `seconds` by purpose."""
    told = {**seconds, "total": total_seconds}
    return m.HealthSample(
        node=TRAINER,
        step=step,
        metrics=(
            *(m.Metric(name=f"wall_seconds_{name}", value=value, unit="s") for name, value in told.items()),
            m.Metric(name="lost_steps", value=float(lost_steps), unit="steps"),
            m.Metric(name="generation", value=float(generation), unit="1"),
        ),
    )


def report(step: int, holders: dict[str, int], *, occasion: str = "interval") -> m.MemoryReport:
    held = sum(holders.values())
    return m.MemoryReport(
        step=step,
        occasion=occasion,
        allocated_bytes=held,
        reserved_bytes=held,
        inactive_split_bytes=0,
        peak_bytes=held,
        alloc_retries=0,
        out_of_memory=0,
        micro_batch=16,
        accumulation=1,
        in_force=(),
        holders=tuple(
            m.Holder(name=name, num_bytes=num_bytes, place="device") for name, num_bytes in holders.items()
        ),
    )


def checkpoint(step: int, *, emergency: bool = False) -> m.CheckpointWritten:
    name = sealed_folder.folder_name(step, 1, emergency=emergency)
    return m.CheckpointWritten(name=name, step=step, attempt=0, emergency=emergency, fingerprint="f")


def _holders(used_bytes: int) -> dict[str, int]:
    mib = 1 << 20
    held = {"weights": 900 * mib, "optimizer": 1800 * mib, "gradients": 900 * mib, "averages": 2700 * mib}
    held |= {"history": 300 * mib, "snapshot": 0}
    return held | {"rest": used_bytes - sum(held.values())}


def fake_run(
    run_id: str = "fake", *, steps: int = 600, total_steps: int = 1000, seed: int = 0
) -> Iterator[Said]:
    """A run from its start to `steps`: warm-up, windows, jumps (some undone), one memory scare."""
    rng = random.Random(seed)
    at_seconds, step, lost_steps, jumps, written = 0.0, 0, 0, 0, 0

    def say(writer: str, message: m.Message) -> Said:
        return Said(writer=writer, message=message, at_seconds=at_seconds)

    def loss_at(step: int, noise: float = 0.06) -> float:
        return 1.7 + 5.2 * math.exp(-step / 60) + 1.6 * math.exp(-step / 400) + rng.gauss(0.0, noise)

    def walk(count: int, phase: m.Phase, lift: float = 0.0) -> Iterator[Said]:
        nonlocal at_seconds, step, written
        for done in range(count):
            step += 1
            at_seconds += STEP_SECONDS
            loss = loss_at(step) + lift * math.exp(-done / 4)
            yield say(TRAINER, observation(step, math.nan if step == 333 else loss, phase=phase))
            if step % 5 == 0:
                for node in (TRAINER, PREDICTOR, MONITOR):
                    yield say(node, heartbeat(node, step, uptime_seconds=at_seconds))
                used_gib = 12.6 if 280 < step < 330 else 8.9 + 0.1 * math.sin(step / 20)
                yield say(MONITOR, sample(int(used_gib * 2**30), source="nvml"))
                yield say(TRAINER, report(step, _holders(int((used_gib - 0.6) * 2**30))))
            if step % 50 == 0:
                yield say(TRAINER, evaluation(step, loss_at(step, 0.0) + 0.12))
                yield say(TRAINER, checkpoint(step))
                written += 1
                yield say(TRAINER, time_account())

    def time_account() -> m.HealthSample:
        return account(
            step,
            total_seconds=at_seconds + 0.2 * written + 0.1 * jumps,
            lost_steps=lost_steps,
            steps=at_seconds - 0.002 * step,
            data=0.004 * step,
            verification=0.06 * jumps,
            snapshots=0.03 * jumps,
            waiting=0.01 * jumps,
            evaluation=0.15 * written,
            checkpoints=0.05 * written,
        )

    yield say(TRAINER, started(run_id, steps=total_steps))
    yield say(TRAINER, account(0, total_seconds=0.1, evaluation=0.1))
    yield from walk(64, m.Phase.WARMUP)
    turn = 0
    while step < steps:
        yield from walk(WINDOW, m.Phase.FULL)
        turn += 1
        horizon_steps = (0, 5, 10, 15)[turn % 4]
        base = step
        yield say(PREDICTOR, decision(base, horizon_steps, loss=loss_at(base + 16, 0.0)))
        if not horizon_steps:
            yield say(TRAINER, outcome(base, m.Verdict.REST, 0))
            continue
        verdict = m.Verdict.RUINED if turn == 9 else rng.choices(
            (m.Verdict.ACCEPTED, m.Verdict.REFUSED, m.Verdict.VETOED), (8, 2, 1)
        )[0]  # fmt: skip
        if verdict in (m.Verdict.ACCEPTED, m.Verdict.REFUSED):
            yield from walk(PROBATION, m.Phase.CORRECT, lift=0.5)
        if verdict is m.Verdict.REFUSED:
            step = base
            lost_steps += PROBATION
        jumps += verdict in m.APPLIED_VERDICTS
        yield say(TRAINER, outcome(base, verdict, horizon_steps, loss=loss_at(base + 16, 0.0)))
        if turn % 12 == 7:
            reason = "memory level cleanup: 12.60 GiB used on GPU 0, threshold 12.00 GiB"
            yield say(
                MONITOR, m.MemoryOrder(order_id=f"1.{turn}", action=m.MemoryAction.CLEANUP, reason=reason)
            )
            yield say(TRAINER, m.OrderDone(
                done=True,
                order_id=f"1.{turn}", bytes_before=12_600_000_000, bytes_after=9_000_000_000, detail=""
            ))  # fmt: skip
            yield say(MONITOR, m.Alert(
                node="monitor", severity="warning", kind="memory_level", text=reason, step=step
            ))  # fmt: skip


def publish(bus: Bus, said: Iterator[Said], *, now_unix_seconds: float, ago_seconds: float) -> None:
    """Put a run on a bus as if it had begun `ago_seconds` before now."""
    clock = _Shifted(now_unix_seconds - ago_seconds)
    publishers = {node: publisher_of(bus, node, generation=1, clock=clock) for node in NODES}
    for item in said:
        clock.since_seconds = item.at_seconds
        publisher = publishers[item.writer]
        publisher.send([publisher.prepare(item.message)], give_up_seconds=0.0)


def publisher_of(bus: Bus, node: str, *, generation: int, clock: Clock | None = None) -> Publisher:
    clock = clock or SystemClock()
    return Publisher(bus, writer=node, generation=generation, clock=clock, rng=random.Random(0))


class _Shifted(FakeClock):
    """Envelope times of the past."""

    def __init__(self, origin_unix_seconds: float) -> None:
        super().__init__()
        self.since_seconds = 0.0
        self._origin_unix_seconds = origin_unix_seconds

    def unix(self) -> float:
        return self._origin_unix_seconds + self.since_seconds


def main() -> None:
    """Play a run at its own speed into a page."""
    from monitor_node.feed import Feed
    from monitor_node.node import new_view
    from monitor_node.snapshot import as_dict
    from monitor_node.web import PageServer

    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    clock: Clock = SystemClock()
    view, feed = new_view("nano-<b>demo</b>"), Feed("demo")
    page = PageServer(feed, host="127.0.0.1", port=0)
    page.start()
    print(page.url, flush=True)
    origin_unix, begun = time.time() - steps * STEP_SECONDS, clock.monotonic() - steps * STEP_SECONDS
    for item in fake_run(steps=10 * steps, total_steps=4 * steps):
        ahead_seconds = begun + item.at_seconds - clock.monotonic()
        if ahead_seconds > 0:
            feed.publish(as_dict(view, now_seconds=clock.monotonic()))
            clock.sleep(ahead_seconds)
        view.stream_lengths = {"history": view.step, "decisions": view.proposals}
        view.fold(
            item.message, sent_unix_seconds=origin_unix + item.at_seconds, at_seconds=begun + item.at_seconds
        )


if __name__ == "__main__":
    main()
