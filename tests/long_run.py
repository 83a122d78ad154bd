"""The messages of a long run, made up: all kinds, at the rates of a real one, in memory that does not grow.

For the load benchmark and the laws of bounded memory. `LongRun.messages` gives them in order with their
writers; one jump in three is refused, so that steps come again. `Tape` is a bus
whose readers find those messages as fast as they can take them, and nothing that they were given before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from common import codec, features
from common import messages as m
from common.bus import STREAM_START, Entry, EntryId
from common.settings import RunSettings
from common.streams import MONITOR, NODES, PREDICTOR, TRAINER, stream_of
from tests.predictor.scripted import NUM_GROUPS, K, outcome, point, small_settings, started

START_UNIX_SECONDS = 1.8e9
CHECKPOINT_STEPS, EVALUATION_STEPS = 500, 250
HEALTH_SECONDS, REPORT_SECONDS, ALERT_SECONDS, ORDER_SECONDS = 5, 30, 600, 3600
_ROWS = 997  # different observations, then the same again
_LOSS, _UNITS = features.INDEX["loss"], features.INDEX["log10_units_per_step"]

Told = tuple[str, m.Message]  # writer, message


def long_settings(*overrides: str, steps: int) -> RunSettings:
    return small_settings(
        f"trainer.steps={steps}",
        "trainer.window_steps=64",
        "trainer.probation_steps=16",
        f"trainer.checkpoint.every_steps={CHECKPOINT_STEPS}",
        *overrides,
    )


@dataclass(kw_only=True)
class LongRun:
    settings: RunSettings
    steps_per_second: float = 2.5
    seed: int = 0
    sampled_weights: int = 0  # of each group, for the per-weight forecaster
    shape: tuple[int, ...] = (2, 3)
    jump_windows: int = 3  # each third window ends in a jump
    told_steps: int = 0  # observations so far, those that were undone included
    seconds: float = 0.0  # of the run

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self._rows = [tuple(rng.gauss(0.0, 1.0) for _ in features.NAMES) for _ in range(_ROWS)]
        self._rng = rng
        self._step, self._attempt, self._window = 0, 0, 0

    @property
    def unix_seconds(self) -> float:
        return START_UNIX_SECONDS + self.seconds

    def messages(self, *, steps: int) -> Iterator[Told]:
        """Until `steps` observations were told."""
        yield TRAINER, started(self.settings, shape=self.shape)
        while self.told_steps < steps:
            yield from self._cycle()
        yield TRAINER, m.RunEnded(step=self._step, reason="finished")

    def _cycle(self) -> Iterator[Told]:
        trainer = self.settings.trainer
        yield from self._take(trainer.window_steps - 1, m.Phase.FULL)
        self._window += 1
        yield from self._take(1, m.Phase.FULL, decides=True)
        jumps = self._window % self.jump_windows == 0
        decision = self._decision(jumps)
        yield PREDICTOR, decision
        if not jumps:
            yield TRAINER, outcome(decision, m.Verdict.REST, self._attempt)
            return
        yield from self._take(trainer.probation_steps, m.Phase.CORRECT)
        verdict = m.Verdict.REFUSED if self._rng.random() < 1 / 3 else m.Verdict.ACCEPTED
        lost_steps = 0
        if verdict is m.Verdict.REFUSED:
            lost_steps = self._step - decision.base_step
            self._step, self._attempt = decision.base_step, self._attempt + 1
        yield TRAINER, outcome(decision, verdict, self._attempt, lost_steps=lost_steps)

    def _take(self, count: int, phase: m.Phase, *, decides: bool = False) -> Iterator[Told]:
        for _ in range(count):
            second_before = int(self.seconds)
            self._step += 1
            self.told_steps += 1
            self.seconds += 1.0 / self.steps_per_second
            yield TRAINER, self._observation(phase, decides=decides)
            if self.told_steps % EVALUATION_STEPS == 0:
                yield TRAINER, self._evaluation()
            if self.told_steps % CHECKPOINT_STEPS == 0:
                yield TRAINER, self._checkpoint()
            for second in range(second_before + 1, int(self.seconds) + 1):
                yield from self._told_at(second)

    def _observation(self, phase: m.Phase, *, decides: bool) -> m.Observation:
        row = list(self._rows[self.told_steps % _ROWS])
        row[_LOSS] = 2.0 + 4.0 / (1 + self._step) ** 0.5 + 0.02 * row[_LOSS]
        row[_UNITS] = 3.0
        where = None
        if decides:
            where = replace(
                point(self._window),
                window_steps=self.settings.trainer.window_steps,
                weights=self._weights(),
                happened=tuple(self._rng.gauss(1.0, 0.1) for _ in range(NUM_GROUPS * K)),
            )
        return m.Observation(
            step=self._step,
            attempt=self._attempt,
            phase=phase,
            features=tuple(row),
            gradient_norms=(1.0,) * NUM_GROUPS,
            decision_point=where,
        )

    def _weights(self) -> bytes:
        """Of a walk that falls off, float32 little endian; only its first value moves."""
        count = NUM_GROUPS * self.sampled_weights
        if not count:
            return b""
        towards = np.linspace(0.1, 1.0, count) * (1.0 + 1.0 / (1 + self._step) ** 0.5)
        return towards.astype("<f4").tobytes()

    def _decision(self, jumps: bool) -> m.PhaseDecision:
        return m.PhaseDecision(
            decision_id=f"{self._step}.{self._attempt}",
            phase=m.Phase.PREDICT if jumps else m.Phase.FULL,
            horizon_steps=25 if jumps else 0,
            num_groups=NUM_GROUPS,
            num_directions=K,
            coefficients=(0.1,) * (NUM_GROUPS * K) if jumps else (),
            controls=m.Controls() if self._window % 2 else None,  # a trial, though of a jump
            forecast=m.Forecast(loss=2.0, loss_without=2.0, spread=0.01, refusal=0.3),
            base_generation=1,
            base_step=self._step,
            base_attempt=self._attempt,
            base_fingerprint=f"weights-{self._window}",
            valid_until_step=self._step,
            reason=f"made up for window {self._window}",
        )

    def _evaluation(self) -> m.Evaluation:
        return m.Evaluation(
            step=self._step, virtual_steps=0, loss=2.0, accuracy=None, train_seconds=self.seconds
        )

    def _checkpoint(self) -> m.CheckpointWritten:
        name = f"step-{self.told_steps:08d}.gen-1"
        return m.CheckpointWritten(
            name=name, step=self._step, attempt=self._attempt, emergency=False, fingerprint="0" * 16
        )

    def _told_at(self, second: int) -> Iterator[Told]:
        """What every node says of itself, by the second."""
        counters = tuple(m.Metric(name=f"counter_{n}", value=float(second), unit="1") for n in range(12))
        for node in NODES:
            yield (
                node,
                m.Heartbeat(
                    node=node,
                    generation=1,
                    process_id=4711,
                    state="running",
                    step=self._step,
                    uptime_seconds=float(second),
                    counters=counters,
                ),
            )
        yield MONITOR, self._sample(second)
        if second % HEALTH_SECONDS == 0:
            yield TRAINER, self._health(second)
        if second % REPORT_SECONDS == 0:
            yield TRAINER, self._report(second)
        if second % ALERT_SECONDS == 0:
            text = f"made up in second {second}"
            yield (
                PREDICTOR,
                m.Alert(node=PREDICTOR, severity="warning", kind="made_up", text=text, step=self._step),
            )
        if second % ORDER_SECONDS == 0:
            yield MONITOR, m.CheckpointRequest(request_id=f"r{second}", emergency=False, reason="made up")
            done = m.OrderDone(
                order_id=f"r{second}", done=True, bytes_before=None, bytes_after=None, detail=""
            )
            yield TRAINER, done

    def _sample(self, second: int) -> m.VramSample:
        return m.VramSample(
            source="fake",
            device="made up",
            used_bytes=(8 << 30) + (second % 61 << 20),
            total_bytes=80 << 30,
            trainer_bytes=7 << 30,
            unknown_reason="",
        )

    def _health(self, second: int) -> m.HealthSample:
        values = {
            "wall_seconds_total": float(second),
            "wall_seconds_steps": 0.9 * second,
            "wall_seconds_verification": 0.05 * second,
            "generation": 1.0,
            "lost_steps": float(self.told_steps - self._step),
        }
        metrics = tuple(m.Metric(name=name, value=value, unit="1") for name, value in values.items())
        return m.HealthSample(node=TRAINER, step=self._step, metrics=metrics)

    def _report(self, second: int) -> m.MemoryReport:
        names = ("weights", "optimizer", "gradients", f"other-{second % 7}")
        return m.MemoryReport(
            step=self._step,
            occasion="interval",
            allocated_bytes=6 << 30,
            reserved_bytes=7 << 30,
            inactive_split_bytes=0,
            peak_bytes=6 << 30,
            alloc_retries=0,
            out_of_memory=0,
            micro_batch=8,
            accumulation=1,
            in_force=(),
            holders=tuple(m.Holder(name=name, num_bytes=1 << 30, place="device") for name in names),
        )


class Tape:
    """What a bus needs to have for a reader; `read_after` gives at most `max_count` new entries in all."""

    def __init__(self, run: LongRun, *, steps: int) -> None:
        self.run = run
        self.ended = False
        self._told = run.messages(steps=steps)
        self._next_sequences: dict[str, int] = {}
        self._last_ids: dict[str, EntryId] = {}
        self.num_entries = 0

    def entries(self, count: int) -> list[Entry]:
        found: list[Entry] = []
        for writer, message in self._told:
            stream = stream_of(message, writer)
            sequence = self._next_sequences.get(stream, 1)
            self._next_sequences[stream] = sequence + 1
            self._last_ids[stream] = EntryId(1, sequence)
            body = codec.encode(message)
            found.append(
                Entry(stream, EntryId(1, sequence), type(message).__name__, body, self.run.unix_seconds)
            )
            if len(found) == count:
                break
        self.num_entries += len(found)
        self.ended = not found
        return found

    def read_after(
        self, after: Mapping[str, EntryId], *, max_count: int, block_seconds: float
    ) -> list[Entry]:
        return [entry for entry in self.entries(max_count) if entry.stream in after]

    def last_id(self, stream: str) -> EntryId:
        return self._last_ids.get(stream, STREAM_START)

    def length(self, stream: str) -> int:
        return self.last_id(stream).sequence

    def close(self) -> None: ...
