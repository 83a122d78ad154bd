"""Phases and forecasts as the messages of a run tell them."""

from __future__ import annotations

import math

import pytest

from common.messages import Controls, Forecast, Phase, PhaseDecision, Verdict
from tests.predictor.scripted import observed, outcome
from trainer_node.race.run_result import PhaseSpan
from trainer_node.race.trace import SMOOTHED_STEPS, Trace

FORECAST = Forecast(loss=1.5, loss_without=2.0, spread=0.25)


def decision(step: int, *, forecast: Forecast | None = FORECAST) -> PhaseDecision:
    return PhaseDecision(
        decision_id=f"{step}.0", phase=Phase.FULL, horizon_steps=5, num_groups=1, num_directions=1,
        coefficients=(), controls=Controls(), forecast=forecast, base_generation=1, base_step=step,
        base_attempt=0, base_fingerprint="", valid_until_step=step, reason="",
    )  # fmt: skip


def steps_of(
    trace: Trace, first: int, last: int, phase: Phase, *, attempt: int = 0, shift: float = 0.0
) -> None:
    for step in range(first, last + 1):
        trace.see(observed(step, attempt, phase=phase, loss=100.0 - step + shift))


def run_with_jump(verdict: Verdict, *, undone: bool) -> Trace:
    """Warm-up 1-4, window 5-10, a jump at 10 with its probation 11-14, and on to 30."""
    trace = Trace()
    steps_of(trace, 1, 4, Phase.WARMUP)
    steps_of(trace, 5, 10, Phase.FULL)
    if verdict is not Verdict.RUINED:
        steps_of(trace, 11, 14, Phase.CORRECT, shift=-50.0)
    trace.see(outcome(decision(10), verdict, 1 if undone else 0))
    steps_of(trace, 11 if undone else 15, 30, Phase.FULL, attempt=int(undone))
    return trace


def span(phase: str, first: int, last: int, verdict: str = "") -> PhaseSpan:
    return PhaseSpan(phase=phase, first_step=first, last_step=last, verdict=verdict)


@pytest.mark.parametrize(
    ("verdict", "undone", "after"),
    [
        (Verdict.ACCEPTED, False, [span("correct", 11, 14), span("full", 15, 30)]),
        (Verdict.REFUSED, True, [span("correct", 11, 14), span("full", 11, 30)]),
        (Verdict.RUINED, True, [span("full", 11, 30)]),
    ],
)
def test_phases_are_told_in_the_order_in_which_they_were_lived(verdict, undone, after) -> None:
    trace = run_with_jump(verdict, undone=undone)
    before = [span("warmup", 1, 4), span("full", 5, 10), span("predict", 10, 10, verdict.value)]
    assert list(trace.phases()) == before + after


def test_a_trial_and_its_twin_are_one_proposal() -> None:
    trace = Trace()
    steps_of(trace, 5, 10, Phase.FULL)
    for attempt in (0, 1):
        steps_of(trace, 11, 14, Phase.CORRECT, attempt=attempt)
    trace.see(outcome(decision(10), Verdict.ACCEPTED, 2))
    steps_of(trace, 15, 20, Phase.FULL, attempt=2)
    tried = [span("correct", 11, 14)] * 2
    proposed = [span("full", 5, 10), span("predict", 10, 10, "accepted"), *tried, span("full", 15, 20)]
    assert list(trace.phases()) == proposed


def test_verdicts_that_move_no_weight_leave_no_span() -> None:
    trace = Trace()
    steps_of(trace, 1, 4, Phase.FULL)
    trace.see(outcome(decision(4), Verdict.REST, 0))
    steps_of(trace, 5, 8, Phase.FULL)
    assert trace.phases() == (span("full", 1, 8),)


def test_what_happened_is_the_mean_loss_around_the_horizon() -> None:
    trace = Trace()
    steps_of(trace, 1, 40, Phase.FULL)
    horizon = SMOOTHED_STEPS + 4
    assert trace.forecasts([decision(10)], horizon) == ((2.0, 0.25, 100.0 - (10 + horizon)),)
    assert trace.forecasts([decision(10)], 1) == ((2.0, 0.25, 89.0),), "never the steps before the decision"


def test_without_a_forecast_or_an_end_there_is_nothing_to_compare() -> None:
    trace = Trace()
    steps_of(trace, 1, 20, Phase.FULL)
    assert trace.forecasts([decision(5, forecast=None), decision(15)], 6) == ()


@pytest.mark.parametrize("verdict", [Verdict.REFUSED, Verdict.RUINED])
def test_after_an_undone_jump_the_road_without_it_is_what_happened(verdict: Verdict) -> None:
    ((_, _, happened),) = run_with_jump(verdict, undone=True).forecasts([decision(10)], 6)
    assert math.isclose(happened, 84.0)


def test_a_kept_jump_leaves_forecasts_over_it_without_an_answer() -> None:
    trace = run_with_jump(Verdict.ACCEPTED, undone=False)
    assert trace.forecasts([decision(7), decision(10)], 6) == ()
    assert len(trace.forecasts([decision(16)], 6)) == 1
