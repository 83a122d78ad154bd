"""How far a run is, apart from tensors: what a checkpoint stores and a restore sets back.

The data position is not stored: it is `data_step` times the items of a configured step (data.py). While the
batch is as configured, nominal steps are real steps; what larger and smaller batches (controls.py) have added
to them is counted apart, so that a run without controls has the numbers that it always had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from common.control_rules import NEUTRAL, context_of, schedule_of
from common.messages import DIRECTIONS, Controls, Outcome, Phase
from common.schedule import decay_start_step
from common.settings import TrainerSettings
from trainer_node.controls import StepPlan, betas_of, plan_step, steps_left
from trainer_node.featurize import FeatureState, StepFacts, note_outcome
from trainer_node.phases import PhaseRules, PhaseState, Position, first_state
from trainer_node.spikes import CLEAR_STEPS
from trainer_node.step_taken import StepTaken
from trainer_node.tasks import Task
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
    controls: Controls = NEUTRAL  # in force
    extra_steps: float = 0.0  # nominal steps kept beyond `step`; below 0: the batches were smaller
    extra_data_steps: float = 0.0  # the same of all batches used, also of those that rollbacks left behind

    @property
    def clock(self) -> float:
        """Nominal steps that are kept: what schedule and end of the run go by. Exact (controls.py)."""
        return self.step + self.extra_steps

    @property
    def data_step(self) -> float:
        """Nominal steps whose batches were used: no item is used twice, unless a jump was refused. Exact."""
        return self.step + self.skipped_steps + self.extra_data_steps

    def count(self, taken: StepTaken) -> None:
        """One more real step."""
        self.step += 1
        self.extra_steps += taken.nominal_steps - 1
        self.extra_data_steps += taken.nominal_steps - 1

    def note(self, outcome: Outcome, *, window_steps: int, lost_passes: float) -> None:
        """Of an applied proposal. After a return the run stands before where it was made."""
        note_outcome(self.features, outcome, window_steps=window_steps, lost_passes=lost_passes)
        self.features.jump_step = min(self.step, outcome.base_step)

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

    def returned_to(self, first: Progress, *, attempt: int) -> Progress:
        """`first`, before any step, as a new attempt in this phase and with these controls."""
        features, spent = first.features.copy(), self.features
        features.attempts = attempt
        features.lost_passes, features.check_passes = spent.lost_passes, spent.check_passes
        features.all_passes = spent.all_passes
        return replace(
            first.copy(),
            attempt=attempt,
            phase=self.phase,
            features=features,
            guard=self.guard,
            controls=self.controls,
        )

    def after_rollback(self, former: Progress, *, step_passes: float) -> Progress:
        """`former`, of a checkpoint, as a new attempt behind all batches that were used since.

        `step_passes`: forward-equivalents of a nominal step.
        """
        undone_steps = self.step - former.step
        attempt = self.attempt + 1
        features, spent = former.features.copy(), self.features
        features.attempts = attempt
        features.lost_passes = spent.lost_passes + (self.clock - former.clock) * step_passes
        features.check_passes, features.all_passes = spent.check_passes, spent.all_passes
        return replace(
            former,
            attempt=attempt,
            features=features,
            skipped_steps=self.skipped_steps + undone_steps,
            rollbacks=self.rollbacks_next,
            spike_step=self.step,
            extra_data_steps=self.extra_data_steps,
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
            "controls": asdict(self.controls),
            "extra_steps": self.extra_steps,
            "extra_data_steps": self.extra_data_steps,
        }


def phase_rules(settings: TrainerSettings) -> PhaseRules:
    return PhaseRules(
        statistics_steps=settings.statistics_steps,
        window_steps=settings.window_steps,
        probation_steps=settings.probation_steps,
        total_steps=settings.steps,
    )


def is_over(progress: Progress, settings: TrainerSettings) -> bool:
    """Whether the clock stands at the end of the schedule in force."""
    return progress.clock >= schedule_of(progress.controls, settings)[0]


def plan_of(progress: Progress, settings: TrainerSettings) -> StepPlan:
    """Of the step that comes now."""
    return plan_step(
        progress.controls, settings, step=progress.step, clock=progress.clock, data_step=progress.data_step
    )


def position_of(
    progress: Progress,
    generation: int,
    fingerprint: str,
    num_groups: int,
    *,
    steps_left: int,
    trial_steps: int = 0,
) -> Position:
    return Position(
        generation=generation,
        step=progress.step,
        attempt=progress.attempt,
        fingerprint=fingerprint,
        num_groups=num_groups,
        num_directions=len(DIRECTIONS),
        controls=progress.controls,
        steps_left=steps_left,
        trial_steps=trial_steps,
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
        controls=_controls_from_json(values.get("controls", {})),
        extra_steps=float(values.get("extra_steps", 0.0)),
        extra_data_steps=float(values.get("extra_data_steps", 0.0)),
    )


def _controls_from_json(values: dict) -> Controls:
    kinds = {name: type(value) for name, value in asdict(NEUTRAL).items()}
    return Controls(**{name: kinds[name](value) for name, value in values.items()})


def _guard_from_json(values: dict) -> GuardRecord:
    changes = [(float(steps), float(change)) for steps, change in values.get("changes", [])]
    return GuardRecord(**{**values, "changes": changes})


def _recent_steps(rules: PhaseRules) -> int:
    # Below MIN_FIT_POINTS there is no forecast, and without one every jump that is no ruin would pass.
    return max(2 * rules.window_steps, MIN_FIT_POINTS)


def facts_later(
    progress: Progress, taken: StepTaken, task: Task, settings: TrainerSettings
) -> Callable[[], StepFacts]:
    """Facts of the step that `progress` comes to by `taken`; they may be asked for after it has gone on."""
    return partial(
        step_facts,
        progress.phase,
        task,
        settings,
        step=progress.step + 1,
        rate_factor=taken.rate_factor,
        step_seconds=taken.seconds,
        data_seconds=taken.data_seconds,
        skipped_steps=progress.skipped_steps,
        controls=progress.controls,
        nominal_steps=taken.nominal_steps,
        extra_steps=progress.extra_steps + (taken.nominal_steps - 1),
        extra_data_steps=progress.extra_data_steps + (taken.nominal_steps - 1),
    )


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
    controls: Controls = NEUTRAL,
    nominal_steps: float = 1.0,
    extra_steps: float = 0.0,
    extra_data_steps: float = 0.0,
) -> StepFacts:
    """Facts of step `step` (from 1), of `nominal_steps`; the phase stood at `state` before it.

    The schedule's steps are given in real ones at the average batch so far: shares of the schedule (progress,
    warm-up, decay) are then those of its clock, and go on without a leap when the batch changes.
    """
    optimizer, end = settings.optimizer, schedule_of(controls, settings)
    real = step / (step + extra_steps) if extra_steps else 1
    beta1, beta2 = betas_of(controls, settings)
    window_steps = state.window_steps or settings.window_steps
    lengths = {Phase.WARMUP: settings.statistics_steps, Phase.FULL: window_steps}
    phase_steps = max(
        lengths.get(state.phase, settings.probation_steps), state.steps_left
    )  # a trial is longer
    return StepFacts(
        phase=state.phase,
        phase_steps_done=phase_steps - state.steps_left + 1,
        phase_steps=phase_steps,
        step=step,
        total_steps=end[0] * real,
        rate=rate_factor * optimizer.rate,
        peak_rate=optimizer.rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=optimizer.weight_decay,
        warmup_steps=settings.schedule.warmup_steps * real,
        decay_start_step=decay_start_step(*end) * real,
        units_per_step=round(task.units_per_step * nominal_steps),
        epoch=task.train.epoch((step + skipped_steps + extra_data_steps) * settings.batch.accumulation),
        micro_batches=settings.batch.accumulation * nominal_steps,
        context=context_of(controls, settings),
        step_seconds=step_seconds,
        data_seconds=data_seconds,
        rate_factor=controls.rate_factor,
        batch_factor=controls.batch_factor,
        context_share=context_of(controls, settings) / settings.model.context_tokens,
    )


def needs_averages(progress: Progress, settings: TrainerSettings) -> bool:
    """By a decision point that is still to come in this run, or as the weights that are handed out."""
    state, left_steps = progress.phase, steps_left(progress.controls, settings, progress.clock)
    window_ends = state.phase is not Phase.FULL or state.steps_left <= left_steps
    return window_ends or settings.read_out == "average" or settings.controls.read_out
