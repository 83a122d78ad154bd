"""The fixed policy: what it proposes, and exactly where it rests."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from common.errors import CheckpointError
from common.messages import DIRECTIONS, DecisionPoint, Phase
from common.settings import RunSettings
from predictor_node.fixed_policy import FixedPolicy
from predictor_node.history import History
from predictor_node.policy import DecisionInput, PolicyState
from tests.predictor.scripted import NUM_GROUPS, K, loss_at, observed, point, small_settings

STEPS = 400


def history_until(
    step: int, *, missing: tuple[int, ...] = (), loss: dict[int, float] | None = None
) -> History:
    history = History()
    for seen in range(max(1, step - 40), step + 1):
        if seen not in missing:
            history = history.append(observed(seen, loss=(loss or {}).get(seen, loss_at(seen))))
    return history


def input_at(
    step: int = 100,
    *,
    window: int = 20,
    decision_point: DecisionPoint | None = None,
    history: History | None = None,
    phase: Phase = Phase.FULL,
    directions: tuple[str, ...] = DIRECTIONS,
) -> DecisionInput:
    decision_point = decision_point or point(window)
    return DecisionInput(
        observation=observed(step, phase=phase, decision_point=decision_point),
        point=decision_point,
        generation=1,
        history=history or history_until(step),
        num_groups=NUM_GROUPS,
        directions=directions,
    )


def reason_at(settings: RunSettings, decision_input: DecisionInput) -> str:
    """Why it rests; "" for a proposal. A rest must be neutral in every field."""
    policy = FixedPolicy(settings)
    decision = policy.decide(decision_input)
    assert decision.controls is None
    if decision.phase is Phase.PREDICT:
        assert decision.horizon_steps > 0
        return ""
    assert (decision.phase, decision.horizon_steps, decision.coefficients) == (Phase.FULL, 0, ())
    assert policy.state().values == {"proposals": 0}, "a rest does not take a horizon"
    assert decision.reason
    return decision.reason


def test_coefficients_are_a_line_fit_to_the_horizon() -> None:
    settings = small_settings(
        "predictor.drift_gain=0.5", "predictor.slow_gain=0.25", "predictor.pull_back=0.125"
    )
    decision = FixedPolicy(settings).decide(input_at())
    assert decision.horizon_steps == 5
    by_name = {"momentum": 0.0, "drift": 0.5 * 5 / 8, "slow_drift": 0.25 * 5 / 8, "pull_back": 0.125}
    assert decision.coefficients == tuple(by_name[name] for name in DIRECTIONS) * NUM_GROUPS
    assert (decision.num_groups, decision.num_directions) == (NUM_GROUPS, K)


def test_coefficients_follow_the_announced_order_of_directions() -> None:
    gram = (1.0,) * (NUM_GROUPS * 4)
    decision_input = input_at(decision_point=point(20, gram=gram), directions=("drift", "sideways"))
    decision = FixedPolicy(small_settings()).decide(decision_input)
    assert decision.coefficients == (0.5 * 5 / 8, 0.0) * NUM_GROUPS


def test_horizons_are_taken_in_turn_and_the_turn_is_state() -> None:
    settings = small_settings("predictor.horizon_steps=[3, 7]")
    first = FixedPolicy(settings)
    assert [first.decide(input_at()).horizon_steps for _ in range(3)] == [3, 7, 3]
    second = FixedPolicy(settings)
    second.load(first.state())
    assert second.decide(input_at()) == first.decide(input_at())


@pytest.mark.parametrize(
    "state", [{}, {"proposals": -1}, {"proposals": 1.5}, {"proposals": True}, {"proposals": 1, "more": 2}]
)
def test_state_of_something_else_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        FixedPolicy(small_settings()).load(PolicyState(values=state))


def test_forecast_is_for_the_end_of_probation() -> None:
    decision = FixedPolicy(small_settings()).decide(input_at(100))
    assert decision.forecast is not None
    truth = 2.0 + 4.0 / math.sqrt(1 + 108)
    assert abs(decision.forecast.loss_without - truth) < 4 * decision.forecast.spread
    assert decision.forecast.loss < decision.forecast.loss_without


def test_rests_in_warm_up() -> None:
    assert reason_at(small_settings(), input_at(phase=Phase.WARMUP)) == "warm-up"


@pytest.mark.parametrize(("window", "is_resting"), [(1, True), (2, True), (3, False)])
def test_rests_for_the_promised_windows_after_warm_up(window: int, is_resting: bool) -> None:
    assert bool(reason_at(small_settings(), input_at(window=window))) is is_resting


@pytest.mark.parametrize(("step", "is_resting"), [(99, True), (100, False)])
def test_rests_while_the_rate_warms_up(step: int, is_resting: bool) -> None:
    settings = small_settings("trainer.schedule.warmup_steps=100")
    assert bool(reason_at(settings, input_at(step))) is is_resting


@pytest.mark.parametrize(
    ("schedule", "first_resting"),
    [
        (("wsd", "0.2"), 320),
        (("wsd", "0.5"), 200),
        (("cosine", "0.2"), 320),
        (("linear", "0.2"), 320),
        (("wsd", "0.0"), STEPS - 8 + 1),
        (("constant", "0.2"), STEPS - 8 + 1),
    ],
)
def test_rests_in_the_decay_tail_and_when_probation_does_not_fit(
    schedule: tuple[str, str], first_resting: int
) -> None:
    name, share = schedule
    settings = small_settings(f"trainer.schedule.name={name}", f"trainer.schedule.decay_share={share}")
    assert reason_at(settings, input_at(first_resting - 1)) == ""
    assert reason_at(settings, input_at(first_resting))


@pytest.mark.parametrize(("hole", "is_resting"), [(93, True), (92, False)])
def test_rests_until_a_window_without_a_hole(hole: int, is_resting: bool) -> None:
    decision_input = input_at(100, history=history_until(100, missing=(hole,)))
    assert bool(reason_at(small_settings(), decision_input)) is is_resting


@pytest.mark.parametrize(("step", "is_resting"), [(85, True), (84, False)])
def test_rests_while_a_loss_that_is_not_finite_is_fitted(step: int, is_resting: bool) -> None:
    decision_input = input_at(100, history=history_until(100, loss={step: math.nan}))
    assert bool(reason_at(small_settings(), decision_input)) is is_resting


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, NUM_GROUPS * K * K - 1])
def test_rests_on_a_gram_entry_that_is_not_finite(value: float, position: int) -> None:
    gram = list(point(20).gram)
    gram[position] = value
    assert "Gram" in reason_at(small_settings(), input_at(decision_point=point(20, gram=tuple(gram))))


def test_rests_on_a_coefficient_that_is_not_finite() -> None:
    settings = small_settings()
    endless = replace(settings, predictor=replace(settings.predictor, drift_gain=math.inf))
    assert reason_at(endless, input_at()) == "a coefficient is not finite"


def test_rests_when_the_drift_is_zero_in_all_groups() -> None:
    drift = DIRECTIONS.index("drift")
    gram = list(point(20).gram)
    gram[drift * K + drift] = 0.0
    assert reason_at(small_settings(), input_at(decision_point=point(20, gram=tuple(gram)))) == ""
    gram[K * K + drift * K + drift] = 0.0
    decision_input = input_at(decision_point=point(20, gram=tuple(gram)))
    assert reason_at(small_settings(), decision_input) == "the drift is zero"


def test_rests_without_a_drift_direction_or_with_a_gram_of_another_shape() -> None:
    no_drift = input_at(decision_point=point(20, gram=(1.0,) * NUM_GROUPS), directions=("momentum",))
    assert reason_at(small_settings(), no_drift) == "the trainer holds no drift direction"
    assert reason_at(small_settings(), input_at(decision_point=point(20, gram=(1.0,))))


def test_rests_when_prediction_is_off_or_all_gains_are_zero() -> None:
    assert reason_at(small_settings("predictor.enabled=false"), input_at()) == "prediction is off"
    assert reason_at(small_settings("predictor.drift_gain=0"), input_at()) == "all gains are zero"
