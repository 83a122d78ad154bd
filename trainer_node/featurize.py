"""Numbers of a step -> the observation vector of common.features. Pure Python, no tensors.

Keeps rolling windows of 64 steps and three exponential averages; that state is part of every
checkpoint and is set back with the weights. Costs tens of microseconds (docs/benchmarks.md).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter, mul

from common.features import NAMES
from common.messages import Outcome, Phase, Verdict
from trainer_node.ledger import TRAIN_PASSES

LONG, SHORT = 64, 16
_TINY = 1e-12
_OFFSETS: dict[int, tuple[float, ...]] = {}  # by count: positions about their middle
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


@dataclass(slots=True)
class Rolling:
    """The last LONG values, oldest first once unrolled."""

    values: list[float] = field(default_factory=list)

    def push(self, value: float) -> None:
        self.values.append(value)
        if len(self.values) > LONG:
            del self.values[0]

    def newest(self, count: int) -> list[float]:
        return self.values[-count:]


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

    def copy(self) -> FeatureState:
        return copy.deepcopy(self)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, object]) -> FeatureState:
        rolling = {"losses", "norms", "clips", "seconds"}
        return cls(**{k: Rolling(**v) if k in rolling else v for k, v in values.items()})  # type: ignore[arg-type]


def note_outcome(state: FeatureState, outcome: Outcome, *, window_steps: int, step_passes: float) -> None:
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
    state.guard_loss = outcome.loss_end if kept else outcome.loss_before
    state.virtual_steps += outcome.horizon_steps if kept else 0
    state.attempts = outcome.attempt
    lost_passes = outcome.lost_steps * step_passes
    state.lost_passes += lost_passes
    state.check_passes += outcome.passes - lost_passes
    state.all_passes += outcome.passes


def featurize(
    state: FeatureState, facts: StepFacts, *, loss: float, gradient_norm: float, clip_scale: float
) -> tuple[float, ...]:
    """Update the state with one step and return the (F,) vector in the order of common.features."""
    previous_loss = state.losses.values[-1] if state.losses.values else loss
    _push(state, facts, loss=loss, gradient_norm=gradient_norm, clip_scale=clip_scale)
    values = {
        **_loss_features(state, loss, previous_loss),
        **_gradient_features(state, gradient_norm, clip_scale),
        **_schedule_features(state, facts),
        **_cost_features(state, facts),
        **_jump_features(state, facts, loss),
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
    state.loss_averages = _ema(state.loss_averages, loss, (4, 16, 64))
    state.norm_averages = _ema(state.norm_averages, gradient_norm, (16, 64))


def _ema(averages: list[float], value: float, steps: tuple[int, ...]) -> list[float]:
    if not averages or not all(math.isfinite(a) for a in averages):
        return [value] * len(steps)
    return [a + (value - a) * 2 / (n + 1) for a, n in zip(averages, steps, strict=True)]


def _loss_features(state: FeatureState, loss: float, previous_loss: float) -> dict[str, float]:
    long, short = state.losses.values, state.losses.newest(SHORT)
    mean_64, std_64 = _mean_and_deviation(long)
    mean_16, std_16 = _mean_and_deviation(short)
    ema_4, ema_16, ema_64 = state.loss_averages
    return {
        "loss": loss,
        "loss_ema_4": ema_4,
        "loss_ema_16": ema_16,
        "loss_ema_64": ema_64,
        "loss_mean_16": mean_16,
        "loss_std_16": std_16,
        "loss_min_16": _extreme(min, short),
        "loss_max_16": _extreme(max, short),
        "loss_mean_64": mean_64,
        "loss_std_64": std_64,
        "loss_slope_16": _slope(short),
        "loss_slope_64": _slope(long),
        "d_loss": loss - previous_loss,
        "z_loss_64": (loss - mean_64) / max(std_64, _TINY) if len(long) > 1 else 0.0,
        "loss_over_first": _ratio(loss, state.first_loss),
        "loss_over_best": _ratio(loss, state.best_loss),
    }


def _gradient_features(state: FeatureState, norm: float, clip_scale: float) -> dict[str, float]:
    mean, deviation = _mean_and_deviation(state.norms.values)
    clips = state.clips.values
    ema_16, ema_64 = state.norm_averages
    return {
        "log10_grad_norm": _log10(norm),
        "log10_grad_norm_ema_16": _log10(ema_16),
        "log10_grad_norm_ema_64": _log10(ema_64),
        "grad_norm_over_ema_64": _ratio(norm, ema_64),
        "grad_norm_cv_64": _ratio(deviation, mean),
        "clip_scale": clip_scale,
        "clipped_share_64": sum(clips) / len(clips),
        "grad_norm_max_64_over_mean": _ratio(_extreme(max, state.norms.values), mean),
    }


def _schedule_features(state: FeatureState, facts: StepFacts) -> dict[str, float]:
    in_phase = facts.phase_steps_done / max(1, facts.phase_steps)
    tail = max(1, facts.total_steps - facts.decay_start_step)
    return {
        "rate": facts.rate,
        "rate_over_peak": _ratio(facts.rate, facts.peak_rate),
        "beta1": facts.beta1,
        "beta2": facts.beta2,
        "weight_decay": facts.weight_decay,
        "log10_update_norm": _log10(state.displacement_norm),
        "update_over_parameter_norm": _ratio(state.displacement_norm, state.parameter_norm),
        "log10_parameter_norm": _log10(state.parameter_norm),
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
        "log10_units_per_step": _log10(facts.units_per_step),
        "epoch": facts.epoch,
        "micro_batches": float(facts.micro_batches),
        "log10_context": _log10(facts.context),
    }


def _cost_features(state: FeatureState, facts: StepFacts) -> dict[str, float]:
    seconds = state.seconds.values
    return {
        "log10_step_seconds": _log10(facts.step_seconds),
        "step_seconds_over_ema_64": _ratio(facts.step_seconds, sum(seconds) / len(seconds)),
        "data_wait_share": _ratio(facts.data_seconds, facts.step_seconds),
        "check_share_of_run": _ratio(state.check_passes, state.all_passes),
        "lost_share_of_run": _ratio(state.lost_passes, state.all_passes),
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
        "last_delta_over_parameter_norm": _ratio(state.last_delta_norm, state.parameter_norm),
        "virtual_share_of_run": _ratio(state.virtual_steps, state.virtual_steps + facts.step),
        "last_delta_cosine": state.last_cosine,
        "loss_over_guard": _ratio(loss, state.guard_loss) if has_guard else 0.0,
        "attempts_log10": math.log10(1 + state.attempts),
        "has_guard_loss": float(has_guard),
        "guard_loss": state.guard_loss if has_guard else 0.0,
    }


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Population deviation. Sums over 64 floats are faster in plain Python than by way of an array."""
    count = len(values)
    mean = sum(values) / count
    return mean, math.sqrt(sum([(value - mean) * (value - mean) for value in values]) / count)


def _extreme(of: Callable[[list[float]], float], values: list[float]) -> float:
    """Least or greatest; NaN if one of them is, wherever it stands."""
    total = sum(values)
    return of(values) if total == total or not any(map(math.isnan, values)) else math.nan


def _slope(values: list[float]) -> float:
    """Least-squares slope per step."""
    n = len(values)
    if n < 2:
        return 0.0
    middle = (n - 1) / 2
    offsets = _OFFSETS.get(n) or _OFFSETS.setdefault(n, tuple(x - middle for x in range(n)))
    return sum(map(mul, offsets, values)) / (n * (n * n - 1) / 12)


def _ratio(value: float, base: float) -> float:
    return value / base if abs(base) > _TINY else 0.0


def _log10(value: float) -> float:
    return math.log10(max(value, _TINY)) if math.isfinite(value) else value
