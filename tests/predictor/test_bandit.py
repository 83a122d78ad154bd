"""LinUCB: equal to its slow twin, cheap in regret, unharmed by bad numbers. State: test_bandit_state.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor_node.bandit import REFRESH_PULLS, REMEMBERED_IDS, REST, LinUCB, Prior

ARMS = (REST, "drift:5", "drift:25", "pull_back:0.5")
D = 3
QUICK = settings(deadline=None, max_examples=60)
NUMBER = st.floats(-3.0, 3.0, width=32)
UPDATE = st.tuples(st.sampled_from(ARMS), st.tuples(NUMBER, NUMBER, NUMBER), st.floats(-1.0, 1.0, width=32))


class Twin:
    """The definition, from all that ever happened: nothing is updated, everything is inverted."""

    def __init__(self, alpha: float, ridge: float, forgetting: float, priors: dict[str, Prior]) -> None:
        self.alpha, self.ridge, self.forgetting, self.priors = alpha, ridge, forgetting, priors
        self.seen: list[tuple[str, np.ndarray, float]] = []

    def score(self, arm: str, context: tuple[float, ...]) -> tuple[float, float]:
        if arm == REST:
            return 0.0, 0.0
        x, prior = np.array(context), self.priors.get(arm, Prior())
        start = self.ridge * np.eye(D)
        start[0, 0] += prior.count
        matrix, vector = start.copy(), start @ np.array([prior.mean, *[0.0] * (D - 1)])
        for age, (pulled, seen, reward) in enumerate(reversed(self.seen)):
            if pulled == arm:
                matrix += self.forgetting**age * np.outer(seen, seen)
                vector += self.forgetting**age * reward * seen
        mean = x @ np.linalg.solve(matrix, vector)
        return mean, self.alpha * math.sqrt(x @ np.linalg.solve(matrix, x))


@QUICK
@given(
    st.lists(UPDATE, max_size=40),
    st.tuples(NUMBER, NUMBER, NUMBER),
    st.sampled_from([1.0, 0.9]),
    st.floats(0.0, 2.0),
    st.floats(0.1, 10.0),
    st.floats(-1.0, 1.0),
    st.floats(0.0, 20.0),
)
def test_equals_the_plain_inverse_twin(updates, context, forgetting, alpha, ridge, mean, count) -> None:
    priors = {"drift:25": Prior(mean, count)}
    bandit = LinUCB(ARMS, D, alpha=alpha, ridge=ridge, forgetting=forgetting, priors=priors)
    twin = Twin(alpha, ridge, forgetting, priors)
    for position, (arm, seen, reward) in enumerate(updates):
        assert bandit.update(arm, seen, reward, f"{position}.0")
        twin.seen.append((arm, np.array(seen), reward))
    for arm, score in bandit.score(context).items():
        assert score == pytest.approx(twin.score(arm, context), rel=1e-7, abs=1e-8)


def random_updates(count: int, seed: int = 0) -> list[tuple[str, list[float], float]]:
    rng = np.random.default_rng(seed)
    return [
        (ARMS[int(rng.integers(len(ARMS)))], [1.0, *rng.normal(size=D - 1)], float(rng.uniform(-1, 1)))
        for _ in range(count)
    ]


def taught(count: int, seed: int = 0, **knobs: float) -> LinUCB:
    bandit = LinUCB(ARMS, D, **knobs)
    for position, (arm, context, reward) in enumerate(random_updates(count, seed)):
        bandit.update(arm, context, reward, f"{position}.0")
    return bandit


def test_the_inverse_is_exact_again_after_refresh_pulls() -> None:
    """On features so unequal that 2000 rank-one updates alone drift off."""
    bandit = LinUCB((REST, "a"), 2, ridge=1e-6)
    matrix = 1e-6 * np.eye(2)
    for pull in range(4 * REFRESH_PULLS):
        x = np.array([1.0, 1e6 * (pull % 3)])
        matrix += np.outer(x, x)
        bandit.update("a", x, 0.0, str(pull))
        if (pull + 1) % REFRESH_PULLS == 0:
            width = bandit.score([1.0, 0.0])["a"][1]
            assert width == pytest.approx(math.sqrt(np.linalg.inv(matrix)[0, 0]), rel=1e-13)


def test_a_cold_arm_is_worth_its_prior_and_its_width_shrinks_with_the_count() -> None:
    priors = {"drift:5": Prior(-0.4, 0.0), "drift:25": Prior(-0.4, 9.0)}
    scores = LinUCB(ARMS, D, priors=priors).score([1.0, 0.0, 0.0])
    assert scores["drift:5"] == pytest.approx((-0.4, 1.0))
    assert scores["drift:25"] == pytest.approx((-0.4, math.sqrt(0.1)))
    assert scores["pull_back:0.5"] == pytest.approx((0.0, 1.0))


def test_prior_count_is_that_many_pulls() -> None:
    """A prior of mean m and count n estimates as n pulls of reward m would, around the same ridge mean."""
    believed = LinUCB((REST, "a"), 2, priors={"a": Prior(0.3, 5.0)})
    pulled = LinUCB((REST, "a"), 2, priors={"a": Prior(0.3, 0.0)})
    for position in range(5):
        pulled.update("a", [1.0, 0.0], 0.3, str(position))
    assert believed.score([1.0, 0.7])["a"] == pytest.approx(pulled.score([1.0, 0.7])["a"])


# Choosing


def test_rest_is_chosen_unless_an_arm_promises_more_than_nothing() -> None:
    context = [1.0, 0.0, 0.0]
    pessimist = LinUCB(ARMS, D, alpha=0.5, priors={arm: Prior(-0.6, 0.0) for arm in ARMS})
    assert pessimist.choose(context, ARMS).arm == REST
    undecided = LinUCB(ARMS, D, alpha=0.0)
    assert undecided.choose(context, ARMS).arm == REST  # equal to 0 is not above it
    optimist = LinUCB(ARMS, D, alpha=0.5, priors={"drift:25": Prior(-0.4, 0.0)})
    assert optimist.choose(context, {"drift:25"}).arm == "drift:25"


def test_equal_arms_are_tried_in_their_order() -> None:
    assert LinUCB(ARMS, D).choose([1.0, 0.0, 0.0], set(ARMS)).arm == ARMS[1]


@QUICK
@given(st.integers(0, 30), st.sets(st.sampled_from(ARMS)), st.tuples(NUMBER, NUMBER, NUMBER))
def test_chooses_the_highest_allowed_upper_bound_and_never_another(count, allowed, context) -> None:
    bandit = taught(count)
    choice = bandit.choose(context, allowed)
    assert choice.arm in allowed | {REST}
    uppers = [mean + width for arm, (mean, width) in bandit.score(context).items() if arm in allowed]
    assert choice.upper == max([0.0, *uppers])
    assert choice.upper == choice.mean + choice.width


# Regret


def regret_halves(choose: Callable[[LinUCB, np.ndarray, np.random.Generator], str]) -> tuple[float, float]:
    """Regret in the first and second half of 1600 rounds; 6 arms linear in 5 features, noise 0.2."""
    rng = np.random.default_rng(1)
    arms = (REST, *"abcdef")
    thetas = rng.normal(0.0, 0.3, size=(len(arms), 5))
    thetas[0] = 0.0
    bandit = LinUCB(arms, 5, alpha=0.5)
    regrets = []
    for decision in range(1600):
        context = np.array([1.0, *rng.uniform(-1.0, 1.0, size=4)])
        worth = thetas @ context
        arm = choose(bandit, context, rng)
        value = worth[arms.index(arm)]
        regrets.append(float(worth.max() - value))
        bandit.update(arm, context, float(value + rng.normal(0.0, 0.2)), str(decision))
    return sum(regrets[:800]), sum(regrets[800:])


def optimistic(bandit: LinUCB, context: np.ndarray, rng: np.random.Generator) -> str:
    rng.random(2)  # the same stream of contexts for all
    return bandit.choose(context, bandit.arms).arm


def epsilon_greedy(bandit: LinUCB, context: np.ndarray, rng: np.random.Generator) -> str:
    explore, which = rng.random(2)
    if explore < 0.1:
        return bandit.arms[int(which * len(bandit.arms))]
    return max(bandit.arms, key=lambda arm: bandit.score(context)[arm][0])


def uniform(bandit: LinUCB, context: np.ndarray, rng: np.random.Generator) -> str:
    return bandit.arms[int(rng.random(2)[1] * len(bandit.arms))]


def test_regret_is_sublinear_and_below_epsilon_greedy_and_chance() -> None:
    first, second = regret_halves(optimistic)
    assert second < 0.4 * first
    assert second < 0.5 * regret_halves(epsilon_greedy)[1]
    assert first + second < 0.1 * sum(regret_halves(uniform))


def test_rests_for_good_where_every_jump_loses() -> None:
    bandit, tried = LinUCB(ARMS, D, alpha=0.5), 0
    for decision in range(300):
        context = [1.0, math.sin(decision), math.cos(decision)]
        arm = bandit.choose(context, ARMS).arm
        tried += arm != REST and decision >= 100
        bandit.update(arm, context, -0.3 if arm != REST else 0.0, str(decision))
    assert tried == 0
    assert bandit.pulls[REST] > 200


def test_forgetting_finds_the_arm_that_became_good() -> None:
    def late_pulls(forgetting: float) -> int:
        bandit, late = LinUCB((REST, "b", "a"), 1, alpha=0.3, forgetting=forgetting), 0
        for decision in range(400):
            arm = bandit.choose([1.0], bandit.arms).arm
            late += decision >= 300 and arm == "b"
            worth = {REST: 0.0, "a": 0.3, "b": -0.5} if decision < 200 else {REST: 0.0, "a": 0.1, "b": 0.8}
            bandit.update(arm, [1.0], worth[arm], str(decision))
        return late

    assert late_pulls(0.97) > 80
    assert late_pulls(1.0) == 0


# Refusals


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_changes_nothing(reward: float) -> None:
    bandit = taught(10)
    before = json.dumps(bandit.state())
    assert not bandit.update("drift:5", [1.0, 0.0, 0.0], reward, "new")
    assert json.dumps(bandit.state()) == before
    assert bandit.update("drift:5", [1.0, 0.0, 0.0], 0.5, "new")  # the id was not used up


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_context_that_is_not_finite_changes_nothing_and_rests(bad: float) -> None:
    bandit = taught(10, alpha=5.0)
    before = json.dumps(bandit.state())
    assert not bandit.update("drift:5", [1.0, bad, 0.0], 0.5, "new")
    assert bandit.choose([1.0, bad, 0.0], ARMS).arm == REST
    assert json.dumps(bandit.state()) == before
    with pytest.raises(ValueError):
        bandit.score([1.0, bad, 0.0])


def test_a_decision_is_learned_from_once() -> None:
    bandit = taught(0)
    assert bandit.update("drift:5", [1.0, 0.0, 0.0], 0.5, "16.0")
    before = json.dumps(bandit.state())
    assert not bandit.update("drift:5", [1.0, 0.0, 0.0], 0.5, "16.0")
    assert json.dumps(bandit.state()) == before


def test_remembers_no_more_ids_than_it_says() -> None:
    bandit = LinUCB((REST, "a"), 1)
    for decision in range(REMEMBERED_IDS + 5):
        bandit.update(REST, [1.0], 0.0, str(decision))
    assert len(bandit.state()["recent_ids"]) == REMEMBERED_IDS
    assert not bandit.update(REST, [1.0], 0.0, str(REMEMBERED_IDS + 4))


def test_resting_is_counted_and_worth_nothing() -> None:
    bandit = taught(0)
    scores = bandit.score([1.0, 0.5, 0.5])
    bandit.update(REST, [1.0, 0.5, 0.5], 0.7, "16.0")
    assert bandit.score([1.0, 0.5, 0.5]) == scores
    assert (bandit.pulls[REST], bandit.reward_sums[REST]) == (1, 0.0)


def test_pulls_and_rewards_add_up() -> None:
    bandit, updates = taught(50), random_updates(50)
    for arm in ARMS[1:]:
        rewards = [reward for pulled, _, reward in updates if pulled == arm]
        assert bandit.pulls[arm] == len(rewards)
        assert bandit.reward_sums[arm] == pytest.approx(sum(rewards))


@pytest.mark.parametrize(
    ("arms", "knobs"),
    [
        (("a", "b"), {}),
        ((REST,), {}),
        ((REST, "a", "a"), {}),
        (ARMS, {"ridge": 0.0}),
        (ARMS, {"forgetting": 0.0}),
        (ARMS, {"forgetting": 1.1}),
        (ARMS, {"alpha": math.nan}),
    ],
)
def test_refuses_arms_and_parameters_that_make_no_sense(arms, knobs) -> None:
    with pytest.raises(ValueError):
        LinUCB(arms, D, **knobs)


def test_refuses_an_unknown_arm() -> None:
    with pytest.raises(ValueError, match="drift:99"):
        taught(0).update("drift:99", [1.0, 0.0, 0.0], 0.1, "16.0")
