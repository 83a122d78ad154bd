"""The loss forecast: exact on its own curve, honest about its spread, better than a straight line."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from predictor_node.forecast import MIN_POINTS, LossCurve, fit_loss_curve, forecast_at
from predictor_node.history import History, Row
from tests.predictor.scripted import observed

NOISE = 0.05


def rows_of(losses: dict[int, float]) -> tuple[Row, ...]:
    history = History()
    for step, loss in losses.items():
        history = history.append(observed(step, loss=loss))
    return history.rows


def fitted(losses: dict[int, float]) -> LossCurve:
    curve = fit_loss_curve(rows_of(losses))
    assert curve is not None
    return curve


def decay(step: int) -> float:
    return 1.2 + 9.0 * step**-0.35


def test_recovers_its_own_curve() -> None:
    curve = fitted({step: 5.0 - 0.1 * math.sqrt(step) for step in range(100, 132)})
    assert curve.loss_at(150) == pytest.approx(5.0 - 0.1 * math.sqrt(150), abs=1e-9)
    assert curve.slope_at(100) == pytest.approx(-0.1 / 20.0, rel=1e-6)
    assert curve.spread_at(150) < 1e-9


def test_equals_numpy_least_squares() -> None:
    rng = random.Random(0)
    losses = {step: decay(step) + rng.gauss(0.0, NOISE) for step in range(200, 240)}
    curve = fitted(losses)
    design = np.array([[1.0, math.sqrt(step)] for step in losses])
    target = np.array(list(losses.values()))
    weights, residual, *_ = np.linalg.lstsq(design, target, rcond=None)
    at = np.array([1.0, math.sqrt(260)])
    variance = at @ np.linalg.inv(design.T @ design) @ at * residual[0] / (len(target) - 2)
    assert curve.loss_at(260) == pytest.approx(float(at @ weights), rel=1e-9)
    assert curve.spread_at(260) == pytest.approx(math.sqrt(variance), rel=1e-6)


def errors_on_decay() -> tuple[list[float], list[float], list[float]]:
    """(error, error in spreads, error of a straight line) over many noisy windows."""
    rng = random.Random(1)
    errors, scores, line_errors = [], [], []
    for repeat in range(300):
        end = 100 + 2 * repeat
        losses = {step: decay(step) + rng.gauss(0.0, NOISE) for step in range(end - 31, end + 1)}
        curve, truth = fitted(losses), decay(end + 16)
        errors.append(curve.loss_at(end + 16) - truth)
        scores.append(errors[-1] / curve.spread_at(end + 16))
        line = np.polyfit(list(losses), list(losses.values()), 1)
        line_errors.append(float(np.polyval(line, end + 16)) - truth)
    return errors, scores, line_errors


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def test_forecasts_a_decaying_curve_better_than_a_straight_line() -> None:
    errors, _, line_errors = errors_on_decay()
    assert rms(errors) < rms(line_errors)


def test_spread_is_one_standard_deviation_of_the_error() -> None:
    _, scores, _ = errors_on_decay()
    assert 0.85 < rms(scores) < 1.25


def test_a_jump_is_assumed_to_move_along_the_curve() -> None:
    curve = fitted({step: decay(step) for step in range(100, 132)})
    resting = forecast_at(curve, end_step=147, gained_steps=0.0)
    jumping = forecast_at(curve, end_step=147, gained_steps=5.0)
    assert resting.loss == resting.loss_without == jumping.loss_without
    assert jumping.loss == resting.loss + 5.0 * curve.slope_at(147) < resting.loss
    assert jumping.spread == resting.spread > 0.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_no_curve_through_a_loss_that_is_not_finite(loss: float) -> None:
    assert fit_loss_curve(rows_of({1: 1.0, 2: 1.0, 3: loss, 4: 1.0, 5: 1.0})) is None


def test_no_curve_through_too_few_points() -> None:
    losses = {step: decay(step) for step in range(1, MIN_POINTS)}
    assert fit_loss_curve(rows_of(losses)) is None
    assert fit_loss_curve(rows_of({**losses, MIN_POINTS: 1.0})) is not None


def test_the_mean_of_many_steps_is_known_as_well_as_the_curve_and_one_step_no_better_than_its_noise() -> None:
    curve = fitted(dict(enumerate([3.0, 2.8, 2.9, 2.6, 2.7, 2.5, 2.55, 2.4], start=1)))
    step = 12
    of_the_curve = math.hypot(curve.spread_at(step), curve.doubt_at(step))
    assert curve.spread_of_mean(step, 10**12) == pytest.approx(of_the_curve)
    assert curve.spread_of_mean(step, 1) > math.sqrt(curve.residual_variance)
    assert curve.spread_of_mean(step, 2) < curve.spread_of_mean(step, 1)


def test_where_the_losses_bend_more_than_a_root_the_doubt_is_what_the_forecast_misses() -> None:
    curve = fitted({step: 2.0 + 5.0 / math.sqrt(step) for step in range(17, 49)})
    for step in (50, 56, 64):
        missed = 2.0 + 5.0 / math.sqrt(step) - curve.loss_at(step)
        assert missed > 0.0
        assert curve.doubt_at(step) == pytest.approx(missed)


def test_there_is_no_doubt_about_losses_that_do_not_move() -> None:
    curve = fitted(dict.fromkeys(range(17, 49), 3.0))
    assert curve.doubt_at(64) == 0.0
