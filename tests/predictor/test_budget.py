"""The exploration budget: what never jumping would have brought is never missed by more than the share."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from predictor_node.budget import ExplorationBudget

QUICK = settings(deadline=None, max_examples=150)
COST = st.floats(0.0, 60.0)


@QUICK
@given(
    st.lists(st.tuples(st.floats(0.0, 50.0), st.floats(-20.0, 20.0), COST, COST, COST), max_size=60),
    st.floats(0.0, 0.2),
    st.floats(0.0, 3000.0),
    st.floats(1.0, 4.0),
)
def test_the_net_loss_never_passes_the_worst_bound(rounds, share, planned, worst) -> None:
    """As long as no jump costs more than its stated worst; expectations may be all wrong."""
    budget = ExplorationBudget(share, planned_passes=planned, worst_factor=worst)
    for passes, expected, worst_cost, cost, gain in rounds:
        budget.ran(passes)
        if budget.allows(expected, worst_cost):
            budget.settle(expected, min(cost, worst_cost), gain)
        assert budget.net_passes <= worst * budget.allowance_passes + 1e-9


def expected_net(budget: ExplorationBudget, rounds: int, win: float, lose: float, p_win: float) -> float:
    """Exact expectation of the final net over all paths of a gambler who plays whenever it is allowed."""
    if rounds == 0:
        return budget.net_passes
    budget = copy.copy(budget)
    budget.ran(3.0)
    expected = p_win * -win + (1.0 - p_win) * lose
    if not budget.allows(expected, lose):
        return expected_net(budget, rounds - 1, win, lose, p_win)
    won, lost = copy.copy(budget), copy.copy(budget)
    won.settle(expected, 0.0, win)
    lost.settle(expected, lose, 0.0)
    return p_win * expected_net(won, rounds - 1, win, lose, p_win) + (1.0 - p_win) * expected_net(
        lost, rounds - 1, win, lose, p_win
    )


@settings(deadline=None, max_examples=40)
@given(st.floats(0.0, 20.0), st.floats(0.1, 20.0), st.floats(0.0, 1.0), st.floats(0.0, 5.0))
def test_the_expected_net_loss_stays_within_the_allowance(win, lose, p_win, allowance) -> None:
    """Also for one who goes on while lucky and stops when unlucky: a rule on the net alone fails that."""
    budget = ExplorationBudget(0.01, planned_passes=100.0 * allowance, worst_factor=50.0)
    bound = 0.01 * max(100.0 * allowance, 3.0 * 9)
    assert expected_net(budget, 9, win, lose, p_win) <= bound + 1e-9


def test_nothing_is_allowed_to_cost_before_the_run_has_earned_it() -> None:
    budget = ExplorationBudget(0.02)
    assert not budget.allows(1.0, 1.0)
    budget.ran(49.0)
    assert not budget.allows(1.0, 1.0)
    budget.ran(1.0)
    assert budget.allows(1.0, 1.0)


def test_a_planned_run_may_spend_its_share_early() -> None:
    budget = ExplorationBudget(0.02, planned_passes=3000.0)
    assert budget.allows(20.0, 60.0)
    budget.settle(20.0, 60.0, 0.0)
    assert not budget.allows(1.0, 1.0)


def test_gains_do_not_shrink_the_budget_and_losses_do() -> None:
    lucky, unlucky = (ExplorationBudget(0.1, planned_passes=100.0) for _ in range(2))
    lucky.settle(-2.0, 3.0, 30.0)
    unlucky.settle(-2.0, 9.5, 0.0)
    assert lucky.allows(9.0, 9.0)
    assert not unlucky.allows(9.0, 9.0)
    assert unlucky.allows(0.4, 9.0)


def test_expected_gains_are_not_believed_once_the_net_disproves_them() -> None:
    budget = ExplorationBudget(0.1, planned_passes=100.0, worst_factor=3.0)
    played = 0
    while budget.allows(-1.0, 5.0) and played < 100:
        budget.settle(-1.0, 4.0, 0.0)
        played += 1
    assert played == 3  # net 12 > allowance 10 + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_without_change(bad: float) -> None:
    budget = ExplorationBudget(0.1, planned_passes=100.0)
    before = budget.state()
    assert not budget.allows(bad, 1.0)
    assert not budget.allows(1.0, bad)
    assert not budget.ran(bad)
    assert not budget.ran(-1.0)
    assert not budget.settle(1.0, bad, 0.0)
    assert not budget.settle(1.0, 1.0, bad)
    assert not budget.settle(1.0, -1.0, 0.0)
    assert budget.state() == before


def test_goes_on_after_a_restart() -> None:
    budget = ExplorationBudget(0.1, planned_passes=100.0)
    budget.ran(33.3)
    budget.settle(0.1, 2.7, 1.1)
    restored = ExplorationBudget(0.1, planned_passes=100.0)
    restored.load(json.loads(json.dumps(budget.state())))
    assert restored.state() == budget.state()


@pytest.mark.parametrize("state", [{}, {"spent_passes": "much", "net_passes": 0.0, "expected_passes": 0.0}])
def test_a_damaged_state_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        ExplorationBudget(0.1).load(state)


@pytest.mark.parametrize("knobs", [(-0.1, 0.0, 2.0), (0.1, -1.0, 2.0), (0.1, 0.0, 0.5), (math.nan, 0.0, 2.0)])
def test_limits_that_make_no_sense_are_refused(knobs: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError):
        ExplorationBudget(knobs[0], planned_passes=knobs[1], worst_factor=knobs[2])
