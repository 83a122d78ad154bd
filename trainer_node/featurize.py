"""Numbers of a step -> the observation vector of common.features. Pure Python, no tensors.

Keeps rolling windows of 64 steps and three exponential averages; that state is part of every
checkpoint and is set back with the weights. Costs tens of microseconds (docs/benchmarks.md).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from operator import itemgetter

from common.features import NAMES
from common.messages import DIRECTIONS, DecisionPoint, Outcome, Phase, Verdict
from trainer_node.control_features import control_features
from trainer_node.ledger import TRAIN_PASSES
from trainer_node.noise_scale import NoiseScale, with_step
from trainer_node.window_statistics import (
    SHORT,
    TINY,
    Rolling,
    exponential_averages,
    extreme,
    log10,
    mean_and_deviation,
    per_second,
    ratio,
    slope,
)

_in_order = itemgetter(*NAMES)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What the host knows about a step without asking the device."""

    phase: Phase
    phase_steps_done: int
    phase_steps: int
    step: int  # steps done, this one included
    total_steps: int
    rate: float
    peak_rate: float
    beta1: float
    beta2: float
    weight_decay: float
    warmup_steps: int
    decay_start_step: int
    units_per_step: int
    epoch: float
    micro_batches: int
    context: int
    step_seconds: float  # wall, or counted in lockstep
    data_seconds: float
    rate_factor: float = 1.0  # the control's own, in force in this step
    batch_factor: float = 1.0  # the same: its batch is so many configured ones
    context_share: float = 1.0  # context in force / configured


@dataclass(slots=True)
class FeatureState:
    losses: Rolling = field(default_factory=Rolling)
    norms: Rolling = field(default_factory=Rolling)
    clips: Rolling = field(default_factory=Rolling)
    seconds: Rolling = field(default_factory=Rolling)
    loss_averages: list[float] = field(default_factory=list)  # over 4, 16, 64 steps
    norm_averages: list[float] = field(default_factory=list)  # over 16, 64 steps
    first_loss: float = math.nan
    best_loss: float = math.inf
    parameter_norm: float = 0.0
    displacement_norm: float = 0.0
    accepted: list[float] = field(default_factory=list)  # last 8 judged jumps
    jump_step: int = -1
    last_horizon_windows: float = 0.0
    last_gain_spreads: float = 0.0
    last_delta_norm: float = 0.0
    last_cosine: float = 0.0
    guard_loss: float = math.nan
    attempts: int = 0
    check_passes: float = 0.0
    lost_passes: float = 0.0
    all_passes: float = 0.0
    virtual_steps: int = 0
    noise: NoiseScale = field(default_factory=NoiseScale)
    average_distance: float | None = None  # L2, weights to averages, at the newest window end; None: unknown

    def copy(self) -> FeatureState:
        return copy.deepcopy(self)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, object]) -> FeatureState:
        """Of a checkpoint from before a field was there: as at the start of a run."""
        kinds = {**dict.fromkeys(("losses", "norms", "clips", "seconds"), Rolling), "noise": NoiseScale}
        return cls(**{k: kinds[k](**v) if k in kinds else v for k, v in values.items()})  # type: ignore[arg-type]


def note_window(state: FeatureState, point: DecisionPoint) -> None:
    """Remember what the end of a window says of the weights, for the features of the steps from there on."""
    num_directions, pull_back = len(DIRECTIONS), DIRECTIONS.index("pull_back")
    squares_G = point.gram[pull_back * (num_directions + 1) :: num_directions * num_directions]
    square = sum(squares_G) if squares_G else math.nan
    state.parameter_norm = _norm_of(point.parameter_norms)
    state.displacement_norm = _norm_of(point.displacement_norms)
    state.average_distance = math.sqrt(square) if 0.0 <= square < math.inf else None


def _norm_of(norms: tuple[float, ...]) -> float:
    return math.sqrt(sum(norm * norm for norm in norms))


def note_outcome(state: FeatureState, outcome: Outcome, *, window_steps: int, lost_passes: float) -> None:
    """Remember an applied jump for the features of the steps to come."""
    kept = outcome.verdict is Verdict.ACCEPTED
    state.accepted = [*state.accepted[-7:], float(kept)]
    state.jump_step = outcome.base_step
    state.last_horizon_windows = outcome.horizon_steps / window_steps
    gain = outcome.loss_forecast - outcome.loss_end
    finite = math.isfinite(gain) and 0 < outcome.loss_spread < math.inf
    state.last_gain_spreads = max(-100.0, min(100.0, gain / outcome.loss_spread)) if finite else 0.0
    state.last_delta_norm = outcome.delta_norm if math.isfinite(outcome.delta_norm) else 0.0
    state.last_cosine = outcome.delta_cosine if math.isfinite(outcome.delta_cosine) else 0.0
    is_of_weights = kept and not outcome.lost_steps  # beside a twin it is that of averaged ones
    state.guard_loss = outcome.loss_end if is_of_weights else outcome.loss_before
    state.virtual_steps += outcome.horizon_steps if kept else 0
    state.attempts = outcome.attempt
    state.lost_passes += lost_passes
    state.check_passes += outcome.passes - lost_passes
    state.all_passes += outcome.passes


def featurize(
    state: FeatureState,
    facts: StepFacts,
    *,
    loss: float,
    gradient_norm: float,
    clip_scale: float,
    small_norm: float = math.nan,
    small_share: float = math.nan,
) -> tuple[float, ...]:
    """Update the state with one step and return the (F,) vector in the order of common.features.

    `small_norm` is the gradient norm of a part of the batch, `small_share` of it; NaN: not measured.
    """
    previous_loss = state.losses.values[-1] if state.losses.values else loss
    _push(state, facts, loss=loss, gradient_norm=gradient_norm, clip_scale=clip_scale)
    state.noise = with_step(
        state.noise,
        small_norm=small_norm,
        whole_norm=gradient_norm,
        small_share=small_share,
        batch_factor=facts.batch_factor,
    )
    of_loss = _loss_features(state, loss, previous_loss)
    values = {
        **of_loss,
        **_gradient_features(state, gradient_norm, clip_scale),
        **_schedule_features(state, facts),
        **_cost_features(state, facts),
        **_jump_features(state, facts, loss),
        **control_features(
            noise_scale=state.noise.over_batch(facts.batch_factor),
            progress_per_second=per_second(-of_loss["loss_slope_64"], state.seconds.values),
            average_distance=state.average_distance,
            parameter_norm=state.parameter_norm,
            factors=(facts.rate_factor, facts.batch_factor, facts.context_share),
        ),
    }
    return tuple(map(float, _in_order(values)))


def _push(
    state: FeatureState, facts: StepFacts, *, loss: float, gradient_norm: float, clip_scale: float
) -> None:
    if not state.losses.values:
        state.first_loss = loss
    if math.isfinite(loss):
        state.best_loss = min(state.best_loss, loss)
    state.losses.push(loss)
    state.norms.push(gradient_norm)
    state.clips.push(float(clip_scale < 1.0))
    state.seconds.push(facts.step_seconds)
    state.all_passes += TRAIN_PASSES * facts.micro_batches
    state.loss_averages = exponential_averages(state.loss_averages, loss, (4, 16, 64))
    state.norm_averages = exponential_averages(state.norm_averages, gradient_norm, (16, 64))


def _loss_features(state: FeatureState, loss: float, previous_loss: float) -> dict[str, float]:
    long, short = state.losses.values, state.losses.newest(SHORT)
    mean_64, std_64 = mean_and_deviation(long)
    mean_16, std_16 = mean_and_deviation(short)
    ema_4, ema_16, ema_64 = state.loss_averages
    return {
        "loss": loss,
        "loss_ema_4": ema_4,
        "loss_ema_16": ema_16,
        "loss_ema_64": ema_64,
        "loss_mean_16": mean_16,
        "loss_std_16": std_16,
        "loss_min_16": extreme(min, short),
        "loss_max_16": extreme(max, short),
        "loss_mean_64": mean_64,
        "loss_std_64": std_64,
        "loss_slope_16": slope(short),
        "loss_slope_64": slope(long),
        "d_loss": loss - previous_loss,
        "z_loss_64": (loss - mean_64) / max(std_64, TINY) if len(long) > 1 else 0.0,
        "loss_over_first": ratio(loss, state.first_loss),
        "loss_over_best": ratio(loss, state.best_loss),
    }


def _gradient_features(state: FeatureState, norm: float, clip_scale: float) -> dict[str, float]:
    mean, deviation = mean_and_deviation(state.norms.values)
    clips = state.clips.values
    ema_16, ema_64 = state.norm_averages
    return {
        "log10_grad_norm": log10(norm),
        "log10_grad_norm_ema_16": log10(ema_16),
        "log10_grad_norm_ema_64": log10(ema_64),
        "grad_norm_over_ema_64": ratio(norm, ema_64),
        "grad_norm_cv_64": ratio(deviation, mean),
        "clip_scale": clip_scale,
        "clipped_share_64": sum(clips) / len(clips),
        "grad_norm_max_64_over_mean": ratio(extreme(max, state.norms.values), mean),
    }


def _schedule_features(state: FeatureState, facts: StepFacts) -> dict[str, float]:
    in_phase = facts.phase_steps_done / max(1, facts.phase_steps)
    tail = max(1, facts.total_steps - facts.decay_start_step)
    return {
        "rate": facts.rate,
        "rate_over_peak": ratio(facts.rate, facts.peak_rate),
        "beta1": facts.beta1,
        "beta2": facts.beta2,
        "weight_decay": facts.weight_decay,
        "log10_update_norm": log10(state.displacement_norm),
        "update_over_parameter_norm": ratio(state.displacement_norm, state.parameter_norm),
        "log10_parameter_norm": log10(state.parameter_norm),
        "progress": facts.step / facts.total_steps,
        "rate_warmup_progress": min(1.0, facts.step / max(1, facts.warmup_steps)),
        "decay_progress": min(1.0, max(0.0, (facts.step - facts.decay_start_step) / tail)),
        "steps_in_phase_share": in_phase,
        "log10_steps_done": math.log10(1 + facts.step),
        "log10_steps_left": math.log10(1 + max(0, facts.total_steps - facts.step)),
        "is_warmup": float(facts.phase is Phase.WARMUP),
        "is_full": float(facts.phase is Phase.FULL),
        "is_correct": float(facts.phase is Phase.CORRECT),
        "window_progress": in_phase if facts.phase is Phase.FULL else 0.0,
        "log10_units_per_step": log10(facts.units_per_step),
        "epoch": facts.epoch,
        "micro_batches": float(facts.micro_batches),
        "log10_context": log10(facts.context),
    }


def _cost_features(state: FeatureState, facts: StepFacts) -> dict[str, float]:
    seconds = state.seconds.values
    return {
        "log10_step_seconds": log10(facts.step_seconds),
        "step_seconds_over_ema_64": ratio(facts.step_seconds, sum(seconds) / len(seconds)),
        "data_wait_share": ratio(facts.data_seconds, facts.step_seconds),
        "check_share_of_run": ratio(state.check_passes, state.all_passes),
        "lost_share_of_run": ratio(state.lost_passes, state.all_passes),
    }


def _jump_features(state: FeatureState, facts: StepFacts, loss: float) -> dict[str, float]:
    has_jump, has_guard = state.jump_step >= 0, math.isfinite(state.guard_loss)
    accepted = state.accepted
    return {
        "has_jump": float(has_jump),
        "steps_since_jump_log10": math.log10(1 + facts.step - state.jump_step) if has_jump else 0.0,
        "accepted_share_8": sum(accepted) / len(accepted) if accepted else 0.0,
        "last_horizon_over_window": state.last_horizon_windows,
        "last_accepted": accepted[-1] if accepted else 0.0,
        "last_gain_in_spreads": state.last_gain_spreads,
        "last_delta_over_parameter_norm": ratio(state.last_delta_norm, state.parameter_norm),
        "virtual_share_of_run": ratio(state.virtual_steps, state.virtual_steps + facts.step),
        "last_delta_cosine": state.last_cosine,
        "loss_over_guard": ratio(loss, state.guard_loss) if has_guard else 0.0,
        "attempts_log10": math.log10(1 + state.attempts),
        "has_guard_loss": float(has_guard),
        "guard_loss": state.guard_loss if has_guard else 0.0,
    }
