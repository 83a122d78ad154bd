"""A trainer whose loss and step time follow the controls, for the tests of the pilot. No weights, no network.

    excess *= 1 - SPEED * pull(rate / best rate) / (1 + noise scale / batch)       pull(x) = x (2 - x)

so the best rate is known, twice of it makes no progress and more of it diverges; a step takes a + b B.
Judges trials with the trainer's own judge. What is in force is kept apart from what the pilot believes, and
every proposal is held against control_rules.breach.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from common import features
from common.control_rules import (
    NEUTRAL,
    breach,
    is_beside_twin,
    schedule_of,
    still_allowed,
    trial_steps,
)
from common.messages import Controls, Observation, Outcome, Phase, PhaseDecision, RunEnded, Verdict
from common.settings import RunSettings
from tests.predictor.scripted import NUM_GROUPS, Publish, outcome, point, small_settings, started
from trainer_node.verify import (
    GuardRecord,
    NoJumpForecast,
    forecast_without_jump,
    is_better_than_twin,
    judge,
)

ALL_ON = [f"trainer.controls.{name}=true" for name in ("rate", "batch", "context", "decay", "read_out")]
SPEED, FLOOR, FIRST = 0.02, 1.0, 5.0


def controlled_settings(*overrides: str) -> RunSettings:
    """1000 steps in lockstep, windows and probation of 16, learned policy, no control on."""
    return small_settings(
        "trainer.steps=1000",
        "trainer.statistics_steps=16",
        "trainer.window_steps=16",
        "trainer.probation_steps=16",
        "trainer.controls.trial_steps=16",
        "trainer.checkpoint.every_steps=100",
        'trainer.decision_mode="lockstep"',
        'predictor.policy="learned"',
        *overrides,
    )


@dataclass(frozen=True, kw_only=True)
class World:
    best_rate: float = 1.0  # in units of the configured rate
    noise_scale: float = 0.0  # in configured batches
    fixed_seconds: float = 0.0
    batch_seconds: float = 3.0
    loss_noise: float = 0.02

    def after(self, excess: float, controls: Controls) -> float:
        ratio = controls.rate_factor / self.best_rate
        pull = max(-5.0, ratio * (2.0 - ratio))
        drag = 1.0 + self.noise_scale / controls.batch_factor
        return min(excess * (1.0 - SPEED * pull / drag), 50.0)

    def seconds(self, controls: Controls) -> float:
        return self.fixed_seconds + self.batch_seconds * controls.batch_factor


@dataclass
class ControlledTrainer:
    settings: RunSettings
    world: World = field(default_factory=World)
    verdict: Callable[[PhaseDecision], Verdict | None] = lambda decision: None  # None = judge
    seed: int = 0
    median_steps: int = 64  # of the step time that outcomes tell (before_jump.full_step_seconds)
    generation: int = 1
    resumed_from: str = ""
    step: int = 0
    attempt: int = 0
    window: int = 0
    clock: float = 0.0
    excess: float = FIRST - FLOOR
    best: float = math.inf
    controls: Controls = NEUTRAL
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    undone_passes: float = 0.0
    proposals: list[PhaseDecision] = field(default_factory=list)
    at_points: list[Controls] = field(default_factory=list)  # in force
    checkpoints: dict[str, ControlledTrainer] = field(default_factory=dict)
    window_lengths: list[int] = field(default_factory=list)
    window_steps: int = 0

    def run(self, publish: Publish, *, until_step: int | None = None) -> ControlledTrainer:
        trainer = self.settings.trainer
        publish(
            started(
                self.settings,
                generation=self.generation,
                resumed_from=self.resumed_from,
                first_step=self.step,
            )
        )
        while self.step < trainer.statistics_steps:
            self._take(publish, Phase.WARMUP)
        while not self._is_over() and (until_step is None or self.step < until_step):
            self._cycle(publish)
        if until_step is None:
            publish(RunEnded(step=self.step, reason="finished"))
        return self

    def go_back(self, name: str) -> None:
        """A rollback: a new attempt from this checkpoint, its controls with it."""
        former, kept = self.checkpoints[name], self.attempt
        for name_ in ("step", "clock", "excess", "best", "controls", "window", "window_steps"):
            setattr(self, name_, getattr(former, name_))
        self.losses, self.attempt = list(former.losses), kept + 1

    def resumed(
        self, name: str, *, generation: int, settings: RunSettings | None = None
    ) -> ControlledTrainer:
        former, settings = self.checkpoints[name], settings or self.settings
        return dataclasses.replace(
            former,
            settings=settings,
            controls=still_allowed(former.controls, settings.trainer),
            generation=generation,
            resumed_from=name,
            losses=list(former.losses),
            seconds=list(former.seconds),
            proposals=[],
            at_points=[],
            checkpoints={},
        )

    def _is_over(self) -> bool:
        return self.clock >= schedule_of(self.controls, self.settings.trainer)[0]

    def _take(self, publish: Publish, phase: Phase, *, ends_window: bool = False) -> PhaseDecision | None:
        self.step += 1
        self.clock += self.controls.batch_factor
        noise = random.Random(f"{self.seed}.{self.step}.{self.attempt}").gauss(0.0, self.world.loss_noise)
        loss = FLOOR + self.excess + noise
        self.excess = self.world.after(self.excess, self.controls)
        self.best = min(self.best, loss)
        self.losses.append(loss)
        self.seconds.append(self.world.seconds(self.controls))
        return publish(self._observed(loss, phase, ends_window))

    def _observed(self, loss: float, phase: Phase, ends_window: bool) -> Observation:
        trainer = self.settings.trainer
        values = [0.0] * len(features.NAMES)
        scale = self.world.noise_scale / self.controls.batch_factor
        told = {
            "loss": loss,
            "loss_over_first": loss / FIRST,
            "loss_over_best": loss / self.best,
            "log10_step_seconds": math.log10(self.seconds[-1]),
            "progress": self.clock / schedule_of(self.controls, trainer)[0],
            "rate_over_peak": 1.0,
            "has_noise_scale": float(scale > 0.0),
            "log10_noise_scale_over_batch": math.log10(scale) if scale > 0.0 else 0.0,
            "has_average": 1.0,
            "log2_rate_factor": math.log2(self.controls.rate_factor),
            "log2_batch_factor": math.log2(self.controls.batch_factor),
            "context_share": (self.controls.context_tokens or trainer.model.context_tokens)
            / trainer.model.context_tokens,
        }
        for name, value in told.items():
            values[features.INDEX[name]] = value
        return Observation(
            step=self.step,
            attempt=self.attempt,
            phase=phase,
            features=tuple(values),
            gradient_norms=(1.0,) * NUM_GROUPS,
            decision_point=point(self.window + 1) if ends_window else None,
        )

    def _cycle(self, publish: Publish) -> None:
        trainer = self.settings.trainer
        length = self.window_steps or trainer.window_steps
        self.window_lengths.append(length)
        for _ in range(length - 1):
            self._take(publish, Phase.FULL)
            if self._is_over():
                return
        decision = self._take(publish, Phase.FULL, ends_window=True)
        assert decision is not None
        self.window += 1
        self.window_steps = decision.next_window_steps
        self.at_points.append(self.controls)
        if decision.phase is Phase.FULL:
            assert decision.controls is None
            publish(outcome(decision, Verdict.REST, self.attempt))
        elif decision.controls is None:
            publish(outcome(decision, Verdict.RUINED, self.attempt))  # jumps are not what is tested here
        else:
            self._try(publish, decision)
        self._checkpoint(publish)

    def _try(self, publish: Publish, decision: PhaseDecision) -> None:
        """As trainer_node/jump.py and control_twin.py do it, without weights."""
        trainer, before, wanted = self.settings.trainer, dataclasses.replace(self), decision.controls
        assert wanted is not None
        said = breach(wanted, now=self.controls, settings=trainer, clock=self.clock)
        assert said == "", said
        assert wanted != self.controls
        assert (decision.horizon_steps, decision.coefficients, decision.forecaster) == (0, (), b"")
        self.proposals.append(decision)
        forecast, loss_before = self._forecast(wanted), FLOOR + self.excess
        full_seconds = statistics.median(self.seconds[-self.median_steps :])
        has_twin = trainer.verify.enabled and is_beside_twin(wanted, self.controls)
        losses, loss_without = list(self.losses), loss_before + forecast.change
        steps = trial_steps(wanted, self.controls, trainer) if has_twin else trainer.probation_steps
        self.controls = wanted
        lost_seconds = self._leg(publish, steps)
        loss_end, lost_steps, tried = FLOOR + self.excess, steps, dataclasses.replace(self)
        if has_twin:
            self._go_back_to(before, losses)
            time_steps = max(
                1, round(steps * self.world.seconds(wanted) / self.world.seconds(before.controls))
            )
            twin_seconds, loss_without = self._leg(publish, time_steps), FLOOR + self.excess
            is_better = is_better_than_twin(
                loss_before=loss_before,
                loss_with=loss_end,
                loss_without=loss_without,
                spread=self.world.loss_noise,
                is_way_out=wanted.rate_factor < before.controls.rate_factor,
            )
            verdict = self.verdict(decision) or (Verdict.ACCEPTED if is_better else Verdict.REFUSED)
            if verdict is Verdict.ACCEPTED:
                self._go_back_to(tried, list(tried.losses))
                lost_steps, lost_seconds = time_steps, twin_seconds
        else:
            verdict = self.verdict(decision) or judge(
                loss_before=loss_before, loss_end=loss_end, forecast=forecast, tolerance=1.0
            )
            if verdict is not Verdict.ACCEPTED and trainer.verify.enabled:
                self._go_back_to(before, losses)
            else:
                lost_steps, lost_seconds = 0, 0.0
        lost_batch = before.controls if verdict is Verdict.ACCEPTED else wanted
        passes = 3.0 + 3.0 * lost_batch.batch_factor * lost_steps
        self.undone_passes += passes
        publish(
            dataclasses.replace(
                outcome(decision, verdict, self.attempt, lost_steps=lost_steps),
                probation_steps=steps,
                loss_before=loss_before,
                loss_end=loss_end,
                loss_forecast=loss_without,
                loss_spread=self.world.loss_noise if has_twin else forecast.spread,
                passes=passes,
                check_seconds=3.0,
                lost_seconds=lost_seconds,
                full_step_seconds=full_seconds,
            )
        )

    def _leg(self, publish: Publish, steps: int) -> float:
        """Seconds of these steps on probation."""
        for _ in range(steps):
            self._take(publish, Phase.CORRECT)
        return math.fsum(self.seconds[-steps:])

    def _go_back_to(self, former: ControlledTrainer, losses: list[float]) -> None:
        for name in ("step", "clock", "excess", "best", "controls"):
            setattr(self, name, getattr(former, name))
        self.losses, self.attempt = losses, self.attempt + 1

    def _forecast(self, wanted: Controls) -> NoJumpForecast:
        noise = statistics.pstdev(b - a for a, b in zip(self.losses[-32:], self.losses[-31:], strict=False))
        return forecast_without_jump(
            self.losses[-32:],
            horizon_steps=self.settings.trainer.probation_steps
            * self.world.seconds(wanted)
            / self.world.seconds(self.controls),  # equal time; where a step costs its data, equal data
            guard=GuardRecord(),
            loss_noise=noise / math.sqrt(2),
        )

    def _checkpoint(self, publish: Publish) -> None:
        from common.messages import CheckpointWritten

        name = f"step-{self.step:08d}.gen-{self.generation}"
        self.checkpoints[name] = dataclasses.replace(
            self, losses=list(self.losses), seconds=list(self.seconds), checkpoints={}
        )
        publish(
            CheckpointWritten(
                name=name, step=self.step, attempt=self.attempt, emergency=False, fingerprint="0" * 16
            )
        )


def outcomes_of(messages: list[object]) -> list[Outcome]:
    return [message for message in messages if isinstance(message, Outcome)]
