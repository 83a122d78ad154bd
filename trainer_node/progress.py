"""How far a run is, apart from tensors: what a checkpoint stores and a restore sets back.

The data position is not stored: it is `data_step` times the micro-batches of a step (data.py).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, field, replace

from common.messages import DIRECTIONS, Outcome, Phase, PhaseDecision, Verdict
from common.schedule import decay_start_step
from common.settings import TrainerSettings
from trainer_node.featurize import FeatureState, StepFacts
from trainer_node.phases import MAX_ID_CHARACTERS, PhaseRules, PhaseState, Position, first_state
from trainer_node.spikes import CLEAR_STEPS
from trainer_node.tasks import Task
from trainer_node.trial import Before, blank_outcome
from trainer_node.verify import MIN_FIT_POINTS, GuardRecord


@dataclass
class Progress:
    step: int  # real steps that are kept
    attempt: int
    phase: PhaseState
    features: FeatureState
    recent_losses: deque[float]  # of the last two windows or more, for the no-jump forecast
    guard: GuardRecord = field(default_factory=GuardRecord)
    skipped_steps: int = 0  # whose batches were left behind by rollbacks
    rollbacks: int = 0  # in a row
    spike_step: int = 0  # where the run stood when it was rolled back last

    @property
    def data_step(self) -> int:
        """Steps whose batches have been used: no batch is used twice, unless a jump was refused."""
        return self.step + self.skipped_steps

    @property
    def rollbacks_next(self) -> int:
        """In a row, if the run were rolled back now."""
        return self.rollbacks + 1 if self.step <= self.spike_step + CLEAR_STEPS else 1

    def copy(self) -> Progress:
        return replace(
            self,
            features=self.features.copy(),
            recent_losses=self.recent_losses.copy(),
            guard=self.guard.copy(),
        )

    def after_restore(self, former: Progress, attempt: int) -> Progress:
        """`former`, set back to, with what was learned since: the new attempt and the guard's noise."""
        return replace(former, attempt=attempt, guard=self.guard)

    def after_rollback(self, former: Progress, *, step_passes: float) -> Progress:
        """`former`, of a checkpoint, as a new attempt behind all batches that were used since."""
        undone_steps = self.step - former.step
        attempt = self.attempt + 1
        features, spent = former.features.copy(), self.features
        features.attempts = attempt
        features.lost_passes = spent.lost_passes + undone_steps * step_passes
        features.check_passes, features.all_passes = spent.check_passes, spent.all_passes
        return replace(
            former,
            attempt=attempt,
            features=features,
            skipped_steps=self.skipped_steps + undone_steps,
            rollbacks=self.rollbacks_next,
            spike_step=self.step,
        )

    def to_json(self) -> dict[str, object]:
        return {
            "step": self.step,
            "attempt": self.attempt,
            "phase": {**asdict(self.phase), "phase": self.phase.phase.value},
            "features": self.features.to_json(),
            "recent_losses": list(self.recent_losses),
            "guard": asdict(self.guard),
            "skipped_steps": self.skipped_steps,
            "rollbacks": self.rollbacks,
            "spike_step": self.spike_step,
        }


def phase_rules(settings: TrainerSettings) -> PhaseRules:
    return PhaseRules(
        statistics_steps=settings.statistics_steps,
        window_steps=settings.window_steps,
        probation_steps=settings.probation_steps,
        total_steps=settings.steps,
    )


def position_of(progress: Progress, generation: int, fingerprint: str, num_groups: int) -> Position:
    return Position(
        generation=generation,
        step=progress.step,
        attempt=progress.attempt,
        fingerprint=fingerprint,
        num_groups=num_groups,
        num_directions=len(DIRECTIONS),
    )


def first_progress(rules: PhaseRules) -> Progress:
    return Progress(0, 0, first_state(rules), FeatureState(), deque(maxlen=_recent_steps(rules)))


def progress_from_json(values: dict, rules: PhaseRules) -> Progress:
    phase = values["phase"]
    return Progress(
        step=values["step"],
        attempt=values["attempt"],
        phase=PhaseState(**{**phase, "phase": Phase(phase["phase"])}),
        features=FeatureState.from_json(values["features"]),
        recent_losses=deque(values["recent_losses"], maxlen=_recent_steps(rules)),
        guard=_guard_from_json(values.get("guard", {})),
        skipped_steps=values.get("skipped_steps", 0),
        rollbacks=values.get("rollbacks", 0),
        spike_step=values.get("spike_step", 0),
    )


def _guard_from_json(values: dict) -> GuardRecord:
    changes = [(int(steps), float(change)) for steps, change in values.get("changes", [])]
    return GuardRecord(**{**values, "changes": changes})


def _recent_steps(rules: PhaseRules) -> int:
    # Below MIN_FIT_POINTS there is no forecast, and without one every jump that is no ruin would pass.
    return max(2 * rules.window_steps, MIN_FIT_POINTS)


def step_facts(
    state: PhaseState,
    task: Task,
    settings: TrainerSettings,
    *,
    step: int,
    rate_factor: float,
    step_seconds: float,
    data_seconds: float,
    skipped_steps: int = 0,
) -> StepFacts:
    """Facts of step `step` (from 1); the phase stood at `state` before it."""
    optimizer = settings.optimizer
    window_steps = state.window_steps or settings.window_steps
    lengths = {Phase.WARMUP: settings.statistics_steps, Phase.FULL: window_steps}
    phase_steps = lengths.get(state.phase, settings.probation_steps)
    return StepFacts(
        phase=state.phase,
        phase_steps_done=phase_steps - state.steps_left + 1,
        phase_steps=phase_steps,
        step=step,
        total_steps=settings.steps,
        rate=rate_factor * optimizer.rate,
        peak_rate=optimizer.rate,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        warmup_steps=settings.schedule.warmup_steps,
        decay_start_step=decay_start_step(settings.steps, settings.schedule),
        units_per_step=task.units_per_step,
        epoch=task.train.epoch((step + skipped_steps) * settings.batch.accumulation),
        micro_batches=settings.batch.accumulation,
        context=settings.model.context_tokens,
        step_seconds=step_seconds,
        data_seconds=data_seconds,
    )


def needs_averages(progress: Progress, settings: TrainerSettings) -> bool:
    """By a decision point that is still to come in this run, or as the weights that are handed out."""
    state, left_steps = progress.phase, settings.steps - progress.step
    window_ends = state.phase is not Phase.FULL or state.steps_left <= left_steps
    return window_ends or settings.read_out == "average"


def before_jump(progress: Progress, waiting_seconds: float) -> Before:
    losses = list(progress.recent_losses)
    changes = [later - earlier for earlier, later in itertools.pairwise(losses)]
    changes = [change for change in changes if math.isfinite(change)]  # pstdev raises on others
    return Before(
        attempt=progress.attempt,
        recent_losses=losses,
        first_loss=progress.features.first_loss,
        # Noise of a single loss from successive differences: a trend does not inflate it.
        loss_noise=statistics.pstdev(changes) / math.sqrt(2) if len(changes) > 1 else 0.0,
        waiting_seconds=waiting_seconds,
        full_step_seconds=full_step_seconds(progress),
        guard=progress.guard,
    )


def outcome_without_jump(
    progress: Progress, decision: PhaseDecision | None, verdict: Verdict, waiting_seconds: float
) -> Outcome:
    """Of a decision point that the run passed as it was."""
    return blank_outcome(
        decision.decision_id[:MAX_ID_CHARACTERS] if decision else f"{progress.step}.{progress.attempt}",
        verdict,
        step=progress.step,
        attempt=progress.attempt,
        horizon_steps=decision.horizon_steps if decision else 0,
        waiting_seconds=waiting_seconds,
        full_step_seconds=full_step_seconds(progress),
    )


def full_step_seconds(progress: Progress) -> float:
    """What an ordinary step costs now, in the unit of messages."""
    return float(statistics.median(progress.features.seconds.values or [0.0]))
