"""Signs that a run goes wrong, or that its predictor does: a pure fold over what the trainer tells.

    not_finite        loss or gradient norm is NaN or infinite
    loss              above its short trend: 2.1, 3, 6 standard deviations (a falling loss is no sign)
    gradient_high     above 100, 1000 times the median of the healthy steps
    gradient_low      below 0.01 times that median
    oscillation       the loss swings from step to step beyond what noise does
    prediction_error  forecast against what happened, relative: above 20 %, 50 %

Thresholds are those of hybrid-predict-trainer-rs; what they are compared with is repaired. Its
share of sign changes (alarm above 0.5 and 0.8) is 2/3 for white noise about a trend, so here the
lag-one correlation decides; its prediction error took an error for a forecast; its level and spread were
blind for the first hundred steps. Reads no clock, sends nothing: node.py turns Critical into an
Alert and a veto.

Three Warnings of one kind in a row are Critical, and Critical lasts until the kind has been calm.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from common.messages import Forecast, Outcome, Phase, PhaseDecision, Verdict
from monitor_node.trend import MIN_POINTS, fit_trend, lag_one_correlation, sigmas

LOSS_SIGMAS = (2.1, 3.0, 6.0)
GRADIENT_HIGH = (100.0, 100.0, 1000.0)  # no Caution
GRADIENT_LOW = (100.0, 100.0, math.inf)  # of baseline over norm
SWING = (0.5, 0.75, math.inf)  # of minus the lag-one correlation; 4 and 6 standard deviations of noise
RELATIVE_ERROR = (0.2, 0.5, math.inf)

TREND_STEPS = 32  # guess: long enough for a spread, short enough for a bent curve
SWING_STEPS = 64
BASELINE_STEPS = 128
BASELINE_EVERY = 8  # steps between looks at the median, which moves slowly
FIRST_STEPS = 8  # healthy steps before a step is judged
SPREAD_SHARE = 1e-3  # of the level: a loss that hardly moves has no spread to measure by
FORECAST_SPREADS = 2.0  # a forecast that is off by less is as good as it said it was
FORECAST_STEPS = 16  # real steps whose trend tells what happened
WARNINGS_IN_A_ROW = 3
CALM = {"oscillation": 2, "prediction_error": 2}  # judgements without a Warning that end Critical
CALM_STEPS = 10  # the same for what is judged at every step

# Made when somebody asks: few of four findings a step are ever read.
_WORDS = {
    "not_finite": "loss {:g}, gradient norm {:g}",
    "loss": "loss {:.4g} nats is {:.1f} standard deviations above its trend",
    "gradient_high": "gradient norm {:.3g} against {:.3g} as a rule",
    "gradient_low": "gradient norm {:.3g} against {:.3g} as a rule",
    "oscillation": "the loss swings from step to step (lag-one correlation {:.2f})",
    "prediction_error": "forecast {:.4g} nats, happened {:.4g}: off by {:.0%}",
}


class Level(enum.IntEnum):
    NORMAL = 0
    CAUTION = 1
    WARNING = 2
    CRITICAL = 3

    @property
    def label(self) -> str:
        return self.name.lower()


class Signal(NamedTuple):
    kind: str
    level: Level  # with hysteresis
    value: float  # in the unit of the kind's thresholds
    facts: tuple[float, ...]  # what `text` names

    @property
    def text(self) -> str:
        """One phrase for people."""
        return _WORDS[self.kind].format(*self.facts)


class KindState(NamedTuple):
    level: Level = Level.NORMAL
    warnings: int = 0  # in a row
    calm: int = 0  # judgements without a Warning since it became Critical


_NORMAL = KindState()


class Claim(NamedTuple):
    """A forecast on its way to be compared."""

    base_step: int
    end_step: int
    loss: float
    spread: float


class DivergenceState(NamedTuple):
    step: int = 0  # the state is a tuple: made anew at every step, a dataclass takes four times as long
    kinds: Mapping[str, KindState] = MappingProxyType({})
    healthy: tuple[tuple[int, float], ...] = ()  # (step, loss) of WARMUP and FULL, outliers pulled in
    norms: tuple[tuple[int, float], ...] = ()  # (step, gradient norm) of the same steps
    baseline: float = 0.0  # median of these norms; 0 = not known
    trail: tuple[tuple[int, float], ...] = ()  # (step, loss) of all phases
    swung: int = 0  # healthy steps since the last look for oscillation
    decision: PhaseDecision | None = None  # the newest one with a forecast
    claims: tuple[Claim, ...] = ()
    excursions: int = 0  # times that the run became Critical
    critical: Signal | None = None  # why it is Critical now
    critical_step: int = 0  # where the newest excursion began
    newest_critical: Signal | None = None  # what began it


Result = tuple[DivergenceState, tuple[Signal, ...]]


def observed(state: DivergenceState, *, step: int, phase: Phase, loss: float, gradient_norm: float) -> Result:
    """One real step. A step number that was there before means that steps were undone."""
    state = _rewound(state, step) if step <= state.step else state
    facts = (loss, gradient_norm)
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        return _judged(state._replace(step=step), [("not_finite", loss, Level.CRITICAL, facts)])
    found: list[_Finding] = [("not_finite", 0.0, Level.NORMAL, facts)]
    state = state._replace(step=step, trail=(*state.trail[-2 * FORECAST_STEPS :], (step, loss)))
    is_ordinary = phase is not Phase.CORRECT  # a jump may lift the loss: the trainer's guard judges that
    is_healthy = True
    if state.baseline > 0:
        gradient = _gradient_findings(state.baseline, gradient_norm)
        is_healthy = all(level < Level.WARNING for _, _, level, _ in gradient)
        found += gradient
    limit = math.inf
    if is_ordinary and len(state.healthy) >= FIRST_STEPS:
        finding, limit = _loss_finding(state, loss)
        found.append(finding)
    if is_ordinary:
        state = _remembered(state, step, min(loss, limit), gradient_norm if is_healthy else None)
        if state.swung >= SWING_STEPS // 2 and len(state.healthy) >= SWING_STEPS:
            found.append(_swing_finding(state))
            state = state._replace(swung=0)
    if state.claims:
        state, errors = _due_claims(state)
        found += errors
    return _judged(state, found)


def decided(state: DivergenceState, decision: PhaseDecision) -> DivergenceState:
    """A decision with a forecast waits for its verdict."""
    return state._replace(decision=decision) if decision.forecast is not None else state


def settled(state: DivergenceState, outcome: Outcome, *, probation_steps: int) -> Result:
    """The verdict tells which of a decision's two forecasts the run will show."""
    decision = state.decision
    if decision is None or decision.decision_id != outcome.decision_id or decision.forecast is None:
        return state, ()
    # Behind a trial that is kept, what was seen last are the steps of its twin.
    expected = None if outcome.lost_steps else _claimed_loss(decision.forecast, outcome.verdict)
    state = state._replace(decision=None)
    if expected is None:
        return state, ()
    claim = Claim(
        base_step=outcome.base_step,
        end_step=outcome.base_step + (outcome.probation_steps or probation_steps),
        loss=expected,
        spread=decision.forecast.spread,
    )
    state, found = _due_claims(state._replace(claims=(*state.claims[-3:], claim)))
    return _judged(state, found)


def prediction_finding(*, forecast: float, happened: float, spread: float) -> _Finding:
    """Forecast and happened in nats; spread: one standard deviation of what may lie between them."""
    gap = abs(forecast - happened)
    share = gap / abs(happened) if happened else (math.inf if gap else 0.0)
    level = Level.NORMAL if gap <= FORECAST_SPREADS * spread else _level_of(share, RELATIVE_ERROR)
    if not math.isfinite(forecast):
        level = Level.WARNING
    return "prediction_error", share, level, (forecast, happened, share)


_Finding = tuple[str, float, Level, tuple[float, ...]]  # kind, value, level, facts for its words


def _loss_finding(state: DivergenceState, loss: float) -> tuple[_Finding, float]:
    """And the highest loss that may enter the trend: an outlier must not make the next one normal."""
    past = [value for _, value in state.healthy[-TREND_STEPS:]]
    # Noise of a loss grows with its level: compare ratios where there are ratios.
    in_ratios = loss > 0 and min(past) > 0
    trend = fit_trend(list(map(math.log, past)) if in_ratios else past)
    floor = SPREAD_SHARE * (1.0 if in_ratios else abs(trend.level)) + 1e-12
    spread = math.hypot(max(trend.spread, floor), trend.level_error)
    # A fall is followed to its present value, not beyond: one that levels off is no alarm. A rise is
    # not followed at all.
    level = min(trend.level, trend.mean)
    value = sigmas(((math.log(loss) if in_ratios else loss) - level) / spread, trend.freedom)
    limit = level + LOSS_SIGMAS[1] * spread
    limit = math.exp(min(limit, 700.0)) if in_ratios else limit
    return ("loss", value, _level_of(value, LOSS_SIGMAS), (loss, value)), limit


def _gradient_findings(baseline: float, norm: float) -> list[_Finding]:
    high, low = norm / baseline, baseline / norm if norm > 0 else math.inf
    facts = (norm, baseline)
    return [
        ("gradient_high", high, _level_of(high, GRADIENT_HIGH), facts),
        ("gradient_low", 1 / low, _level_of(low, GRADIENT_LOW), facts),
    ]


def _swing_finding(state: DivergenceState) -> _Finding:
    swing = -lag_one_correlation([value for _, value in state.healthy[-SWING_STEPS:]])
    return "oscillation", swing, _level_of(swing, SWING), (-swing,)


def _due_claims(state: DivergenceState) -> tuple[DivergenceState, list[_Finding]]:
    due = [claim for claim in state.claims if claim.end_step <= state.step]
    found = []
    for claim in due:
        losses = [loss for step, loss in state.trail if claim.base_step < step <= claim.end_step]
        if len(losses) >= MIN_POINTS:
            trend = fit_trend(losses[-FORECAST_STEPS:])
            spread = math.hypot(claim.spread, trend.level_error)
            found.append(prediction_finding(forecast=claim.loss, happened=trend.level, spread=spread))
    left = tuple(claim for claim in state.claims if claim.end_step > state.step)
    return state._replace(claims=left), found


def _claimed_loss(forecast: Forecast, verdict: Verdict) -> float | None:
    if verdict is Verdict.ACCEPTED:
        return forecast.loss
    return forecast.loss_without if verdict in (Verdict.REST, Verdict.VETOED) else None


def _remembered(state: DivergenceState, step: int, loss: float, norm: float | None) -> DivergenceState:
    norms, baseline = state.norms, state.baseline
    if norm is not None:
        norms = (*norms[1 - BASELINE_STEPS :], (step, norm))
        is_due = step % BASELINE_EVERY == 0 or (baseline == 0 and norm > 0)
        if is_due and len(norms) >= FIRST_STEPS:
            baseline = statistics.median([value for _, value in norms])
    healthy = (*state.healthy[1 - SWING_STEPS :], (step, loss))
    return state._replace(healthy=healthy, norms=norms, baseline=baseline, swung=state.swung + 1)


def _rewound(state: DivergenceState, step: int) -> DivergenceState:
    """Steps from this one on were undone."""
    return state._replace(
        step=step,
        healthy=tuple(point for point in state.healthy if point[0] < step),
        norms=tuple(point for point in state.norms if point[0] < step),
        trail=tuple(point for point in state.trail if point[0] < step),
        claims=tuple(claim for claim in state.claims if claim.base_step < step),
    )


def _level_of(value: float, bounds: tuple[float, float, float]) -> Level:
    first, second, third = bounds
    if not value > first:  # a value that is not a number is above nothing
        return Level.NORMAL
    return Level.CRITICAL if value > third else Level.WARNING if value > second else Level.CAUTION


def _judged(state: DivergenceState, found: list[_Finding]) -> Result:
    """Hysteresis, kind by kind; then whether the run as a whole became or stopped being Critical."""
    kinds, signals, fresh = state.kinds, [], None
    for kind, value, level, facts in found:
        before = kinds.get(kind)
        now = next_kind(before or _NORMAL, kind, level)
        if now is not before:
            kinds = {**kinds, kind: now}
        signals.append(Signal(kind, now.level, value, facts))
        if fresh is None and now.level is Level.CRITICAL:
            fresh = signals[-1]
    if kinds is not state.kinds:
        state = state._replace(kinds=kinds)
    if state.critical is None and fresh is not None:
        state = state._replace(critical=fresh, newest_critical=fresh, critical_step=state.step)
        state = state._replace(excursions=state.excursions + 1)
    elif state.critical is not None and not any(k.level is Level.CRITICAL for k in kinds.values()):
        state = state._replace(critical=None)
    return state, tuple(signals)


def next_kind(before: KindState, kind: str, level: Level) -> KindState:
    """State x level of one judgement -> state."""
    if level is before.level is Level.NORMAL and not before.warnings:
        return before  # as nearly always
    warnings = before.warnings + 1 if level >= Level.WARNING else 0
    if level is Level.CRITICAL or warnings >= WARNINGS_IN_A_ROW:
        return KindState(level=Level.CRITICAL, warnings=warnings)
    if before.level is Level.CRITICAL:
        calm = 0 if level >= Level.WARNING else before.calm + 1
        if calm < CALM.get(kind, CALM_STEPS):
            return KindState(level=Level.CRITICAL, warnings=warnings, calm=calm)
    return KindState(level=level, warnings=warnings)
