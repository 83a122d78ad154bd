"""Prediction error: forecast and happened are compared as such, and relative to what happened."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import messages as m
from common.messages import Phase, Verdict
from monitor_node.divergence import Level, Signal, decided, prediction_finding, settled
from tests.monitor import fake_run as fake
from tests.monitor.watched_run import Watched, curve


@given(st.floats(1e-6, 1e3))
def test_a_perfect_prediction_is_normal(loss: float) -> None:
    """The original passed the error where the forecast was expected, and punished good forecasts."""
    kind, share, level, _ = prediction_finding(forecast=loss, happened=loss, spread=0.0)
    assert (kind, share, level) == ("prediction_error", 0.0, Level.NORMAL)


@given(st.floats(0.01, 100.0), st.floats(0.0, 3.0))
def test_the_error_is_relative_to_what_happened(happened: float, share: float) -> None:
    for forecast in (happened * (1 + share), happened * (1 - share)):
        level = prediction_finding(forecast=forecast, happened=happened, spread=0.0)[2]
        if share < 0.199:
            assert level is Level.NORMAL
        elif 0.201 < share < 0.499:
            assert level is Level.CAUTION
        elif share > 0.501:
            assert level is Level.WARNING


@given(st.floats(-2.0, 2.0), st.floats(0.01, 10.0))
def test_a_forecast_within_its_own_spread_is_normal(spreads: float, spread: float) -> None:
    found = prediction_finding(forecast=0.1 + 0.999 * spreads * spread, happened=0.1, spread=spread)
    assert found[2] is Level.NORMAL


@pytest.mark.parametrize("forecast", [math.nan, math.inf])
def test_a_forecast_that_is_no_number_is_a_warning(forecast: float) -> None:
    assert prediction_finding(forecast=forecast, happened=1.0, spread=math.inf)[2] is Level.WARNING


def foretold(verdict: Verdict, *, loss: float, loss_without: float, happens: float) -> list[Signal]:
    """A decision at step 64 with both forecasts, its verdict, and the sixteen steps that they are of."""
    run = Watched()
    run.healthy(64)
    decision = fake.decision(64, 5)
    forecast = m.Forecast(loss=loss, loss_without=loss_without, spread=0.01)
    decision = dataclasses.replace(decision, forecast=forecast)
    run.state = decided(run.state, decision)
    outcome = fake.outcome(64, verdict, 5)
    outcome = dataclasses.replace(outcome, decision_id=decision.decision_id)
    is_probation = verdict in m.APPLIED_VERDICTS
    found: list[Signal] = []
    if not is_probation:
        run.state, _ = settled(run.state, outcome, probation_steps=16)
    for _ in range(16):
        phase = Phase.CORRECT if is_probation else Phase.FULL
        found += run.take(happens + run.random.gauss(0.0, 0.005), phase=phase)
    if is_probation:
        outcome = dataclasses.replace(outcome, probation_steps=16)
        run.state, late = settled(run.state, outcome, probation_steps=16)
        found += late
    assert run.state.claims == ()
    return [signal for signal in found if signal.kind == "prediction_error"]


def test_a_kept_jump_is_held_against_the_forecast_with_it() -> None:
    (signal,) = foretold(Verdict.ACCEPTED, loss=2.0, loss_without=9.0, happens=2.0)
    assert signal.level is Level.NORMAL
    (signal,) = foretold(Verdict.ACCEPTED, loss=9.0, loss_without=2.0, happens=2.0)
    assert signal.level is Level.WARNING


@pytest.mark.parametrize("verdict", [Verdict.REST, Verdict.VETOED])
def test_a_run_without_the_jump_is_held_against_the_forecast_without_it(verdict: Verdict) -> None:
    (signal,) = foretold(verdict, loss=9.0, loss_without=2.0, happens=2.0)
    assert signal.level is Level.NORMAL
    (signal,) = foretold(verdict, loss=2.0, loss_without=2.6, happens=2.0)
    assert signal.level is Level.CAUTION


@pytest.mark.parametrize("verdict", [Verdict.REFUSED, Verdict.RUINED, Verdict.ABORTED])
def test_a_forecast_of_steps_that_were_undone_is_not_judged(verdict: Verdict) -> None:
    assert foretold(verdict, loss=9.0, loss_without=9.0, happens=2.0) == []


def test_bad_forecasts_are_critical_and_good_ones_lift_it_while_prediction_is_vetoed() -> None:
    """Resting decisions carry forecasts too, so a predictor under veto can win back trust."""
    run = Watched()
    run.healthy(64)

    def window(claimed: float) -> None:
        step = run.step
        decision = fake.decision(step, 5)
        forecast = m.Forecast(loss=1.0, loss_without=claimed, spread=0.01)
        run.state = decided(run.state, dataclasses.replace(decision, forecast=forecast))
        outcome = dataclasses.replace(fake.outcome(step, Verdict.VETOED, 5), decision_id=decision.decision_id)
        run.state, _ = settled(run.state, outcome, probation_steps=16)
        run.healthy(16)

    for _ in range(3):
        assert run.state.critical is None
        window(10.0)
    assert run.state.critical is not None
    assert run.state.critical.kind == "prediction_error"
    window(curve(run.step + 16))
    window(curve(run.step + 16))
    assert run.state.critical is None
