"""A trainer without a network, for the predictor's tests: a loss curve, windows, seeded verdicts.

`ScriptedTrainer.run` publishes the history of a lockstep run and reads decisions as a trainer
would. Everything is a function of the seed, the step and the attempt, so runs can be repeated,
cut and resumed. Also builders for single messages.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from common import features
from common.bus import EntryId
from common.config import dump_settings, load_settings
from common.messages import (
    APPLIED_VERDICTS,
    DIRECTIONS,
    CheckpointWritten,
    DecisionPoint,
    GroupSpec,
    Message,
    Observation,
    Outcome,
    ParameterSpec,
    Phase,
    PhaseDecision,
    RunEnded,
    RunStarted,
    Verdict,
)
from common.settings import RunSettings

RUN_ID = "scripted"
NUM_GROUPS = 2
K = len(DIRECTIONS)
NAN = float("nan")

Publish = Callable[[Message], PhaseDecision | None]


def small_settings(*overrides: str) -> RunSettings:
    """400 steps, windows and probation of 8, no learning-rate warm-up, tail from step 320."""
    return load_settings(
        preset="nano",
        overrides=[
            "trainer.steps=400",
            "trainer.statistics_steps=8",
            "trainer.window_steps=8",
            "trainer.probation_steps=8",
            "trainer.schedule.warmup_steps=0",
            "trainer.checkpoint.every_steps=40",
            'predictor.policy="fixed"',
            "predictor.horizon_steps=[5, 10, 15]",
            "predictor.rest_windows=2",
            *overrides,
        ],
    )


def started(
    settings: RunSettings,
    *,
    generation: int = 1,
    resumed_from: str = "",
    first_step: int = 0,
    shape: tuple[int, ...] = (2, 3),
) -> RunStarted:
    groups = tuple(
        GroupSpec(name=f"g{n}", parameters=(ParameterSpec(name="w", shape=shape, dtype="float32"),))
        for n in range(NUM_GROUPS)
    )
    return RunStarted(
        run_id=RUN_ID,
        generation=generation,
        resumed_from=resumed_from,
        settings_toml=dump_settings(settings),
        feature_version=features.VERSION,
        directions=DIRECTIONS,
        groups=groups,
        first_step=first_step,
    )


def loss_at(step: int, attempt: int = 0, seed: int = 0) -> float:
    noise = random.Random(f"{seed}.{step}.{attempt}").gauss(0.0, 0.02)
    return 2.0 + 4.0 / (1 + step) ** 0.5 + noise


def point(window: int, *, gram: tuple[float, ...] | None = None) -> DecisionPoint:
    if gram is None:
        gram = tuple(
            float(1 + (row == column)) for _ in range(NUM_GROUPS) for row in range(K) for column in range(K)
        )
    return DecisionPoint(
        window=window,
        fingerprint=f"weights-{window}",
        gram=gram,
        parameter_norms=(1.0,) * NUM_GROUPS,
        displacement_norms=(0.1,) * NUM_GROUPS,
        happened=(0.0,) * (NUM_GROUPS * K),
        unexplained_share=(0.5,) * NUM_GROUPS,
    )


def observed(
    step: int,
    attempt: int = 0,
    *,
    phase: Phase = Phase.FULL,
    loss: float | None = None,
    decision_point: DecisionPoint | None = None,
) -> Observation:
    values = [0.0] * len(features.NAMES)
    values[features.INDEX["loss"]] = loss_at(step, attempt) if loss is None else loss
    values[features.INDEX["d_loss"]] = NAN  # not a number must survive every way
    return Observation(
        step=step,
        attempt=attempt,
        phase=phase,
        features=tuple(values),
        gradient_norms=(1.0,) * NUM_GROUPS,
        decision_point=decision_point,
    )


def outcome(decision: PhaseDecision, verdict: Verdict, attempt: int, *, lost_steps: int = 0) -> Outcome:
    is_applied = verdict in APPLIED_VERDICTS
    return Outcome(
        decision_id=decision.decision_id,
        verdict=verdict,
        base_step=decision.base_step,
        attempt=attempt,
        horizon_steps=decision.horizon_steps,
        loss_before=2.0 if is_applied else NAN,
        loss_after=2.1 if is_applied else NAN,
        loss_end=1.9 if is_applied else NAN,
        loss_forecast=1.95,
        loss_spread=0.01,
        delta_norm=0.1,
        delta_cosine=NAN,
        probation_steps=8 if is_applied else 0,
        lost_steps=lost_steps,
        passes=1.0,
        waiting_seconds=0.0,
        snapshot_seconds=0.0,
        jump_seconds=0.0,
        check_seconds=0.0,
        restore_seconds=0.0,
        lost_seconds=0.0,
        full_step_seconds=3.0,
    )


@dataclass
class ScriptedTrainer:
    settings: RunSettings
    generation: int = 1
    resumed_from: str = ""
    seed: int = 0
    shape: tuple[int, ...] = (2, 3)  # of each group's one parameter
    step: int = 0
    attempt: int = 0
    window: int = 0
    checkpoints: dict[str, ScriptedTrainer] = field(default_factory=dict)

    def resumed(self, name: str, *, generation: int) -> ScriptedTrainer:
        trainer = copy.copy(self.checkpoints[name])
        trainer.generation, trainer.resumed_from = generation, name
        trainer.checkpoints = {}
        return trainer

    def run(self, publish: Publish, *, until_step: int | None = None) -> None:
        """Train; `publish` delivers a message and returns the decision that answers it, if any."""
        trainer, last_step = self.settings.trainer, until_step or self.settings.trainer.steps
        publish(
            started(
                self.settings,
                generation=self.generation,
                resumed_from=self.resumed_from,
                first_step=self.step,
                shape=self.shape,
            )
        )
        while self.step < min(trainer.statistics_steps, last_step):
            self._steps(publish, Phase.WARMUP, 1)
        while self.step + trainer.window_steps <= last_step:
            self._cycle(publish)
        if until_step is None:
            publish(RunEnded(step=self.step, reason="finished"))

    def _steps(self, publish: Publish, phase: Phase, count: int) -> None:
        for _ in range(count):
            self.step += 1
            publish(observed(self.step, self.attempt, phase=phase))

    def _cycle(self, publish: Publish) -> None:
        trainer = self.settings.trainer
        self._steps(publish, Phase.FULL, trainer.window_steps - 1)
        self.step += 1
        self.window += 1
        decision = publish(observed(self.step, self.attempt, decision_point=point(self.window)))
        assert decision is not None, f"no decision at step {self.step}"
        if decision.horizon_steps == 0:
            publish(outcome(decision, Verdict.REST, self.attempt))
        else:
            self._try(publish, decision)
        if self.step % trainer.checkpoint.every_steps < trainer.window_steps:
            self._checkpoint(publish)

    def _try(self, publish: Publish, decision: PhaseDecision) -> None:
        verdict = random.Random(f"{self.seed}.{decision.decision_id}").choice(
            [Verdict.ACCEPTED, Verdict.ACCEPTED, Verdict.REFUSED, Verdict.RUINED]
        )
        lost_steps = 0
        if verdict is not Verdict.RUINED:
            self._steps(publish, Phase.CORRECT, self.settings.trainer.probation_steps)
        if verdict is not Verdict.ACCEPTED:
            lost_steps = self.step - decision.base_step
            self.step = decision.base_step
            self.attempt += 1
        publish(outcome(decision, verdict, self.attempt, lost_steps=lost_steps))

    def _checkpoint(self, publish: Publish) -> None:
        name = f"step-{self.step:08d}.gen-{self.generation}"
        self.checkpoints[name] = copy.copy(self)
        publish(
            CheckpointWritten(
                name=name, step=self.step, attempt=self.attempt, emergency=False, fingerprint="0" * 16
            )
        )


@dataclass
class Log:
    """A history as the bus holds it, and every decision it led to."""

    answer: Callable[[Message, EntryId], list[Message]]
    entries: list[tuple[EntryId, Message]] = field(default_factory=list)
    answers: list[Message] = field(default_factory=list)
    generation: int = 1
    sequence: int = 0

    def publish(self, message: Message) -> PhaseDecision | None:
        if isinstance(message, RunStarted):
            self.generation, self.sequence = message.generation, 0
        self.sequence += 1
        entry_id = EntryId(self.generation, self.sequence)
        self.entries.append((entry_id, message))
        new = self.answer(message, entry_id)
        self.answers += new
        decisions = [answer for answer in new if isinstance(answer, PhaseDecision)]
        assert len(decisions) <= 1
        return decisions[0] if decisions else None

    @property
    def decisions(self) -> list[PhaseDecision]:
        return [answer for answer in self.answers if isinstance(answer, PhaseDecision)]
