"""Which arm to try: disjoint LinUCB (Li, Chu, Langford & Schapire 2010, arXiv 1003.0146, Algorithm 1).

Arms are names. What an arm does to the weights is the policy's business, what a reward is
reward.py's, how much may be spent on trying is budget.py's. No clock and no random numbers: what
it answers is a function of the updates it got, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import CheckpointError
from predictor_node.exact_arrays import Array, pack, unpack

REST = "rest"  # always arm 0; worth 0 by definition of the reward
REFRESH_PULLS = 256  # of one arm, between two exact inversions
REMEMBERED_IDS = 1024  # the trainer repeats only its newest outcomes


@dataclass(frozen=True, slots=True)
class Prior:
    """What an untried arm is believed to bring in any context, and how many pulls that belief is worth."""

    mean: float = 0.0  # reward, in [-1, 1]
    count: float = 0.0  # >= 0


@dataclass(frozen=True, slots=True)
class Choice:
    arm: str
    mean: float  # estimated reward
    width: float  # alpha * sqrt(x' A^-1 x)
    upper: float  # mean + width


class LinUCB:
    """A arms with a ridge regression each, d features. x[0] is the constant 1 by convention.

        A_a = ridge I + count_a e0 e0' + sum x x'        theta_a = A_a^-1 (A0_a mean_a e0 + sum r x)

    so that a fresh arm is estimated at its prior mean wherever x[0] = 1 (ridge towards that mean).
    A^-1 follows by Sherman-Morrison, and exactly after every REFRESH_PULLS pulls of an arm.
    `forgetting` < 1 multiplies all sums by itself at every settled decision (after Russac, Vernade
    & Cappe 2019, arXiv 1909.09146; their width is never above ours), which costs an inversion of
    every arm. The rest arm has no model: its value is known to be 0.
    """

    def __init__(
        self,
        arms: Sequence[str],
        dimension: int,
        *,
        alpha: float = 1.0,
        ridge: float = 1.0,
        forgetting: float = 1.0,
        priors: Mapping[str, Prior] | None = None,
    ) -> None:
        """Raises ValueError for arms that are not rest and distinct others, or parameters out of range."""
        if len(arms) < 2 or arms[0] != REST or len(set(arms)) != len(arms):
            raise ValueError(f"arms must be {REST!r} and at least one other, all different: {arms}")
        if dimension < 1 or not (alpha >= 0.0 and ridge > 0.0 and 0.0 < forgetting <= 1.0):
            raise ValueError(f"out of range: {dimension=}, {alpha=}, {ridge=}, {forgetting=}")
        self.arms = tuple(arms)
        self.dimension = dimension
        self.alpha, self.ridge, self.forgetting = alpha, ridge, forgetting
        self.priors = tuple((priors or {}).get(arm, Prior()) for arm in self.arms)
        self.pulls = dict.fromkeys(self.arms, 0)
        self.reward_sums = dict.fromkeys(self.arms, 0.0)
        self.last_context: tuple[float, ...] = ()  # of the newest update
        self._recent_ids: dict[str, None] = {}  # in order of arrival
        count, d = len(arms) - 1, dimension  # the models are those of arms[1:]
        self._prior_ADD = np.zeros((count, d, d)) + ridge * np.eye(d)
        self._prior_ADD[:, 0, 0] += [prior.count for prior in self.priors[1:]]
        self._prior_AD = self._prior_ADD[:, :, 0] * [[prior.mean] for prior in self.priors[1:]]
        self._squares_ADD = np.zeros((count, d, d))  # sum x x'
        self._rewards_AD = np.zeros((count, d))  # sum r x
        self._inverse_ADD = np.linalg.inv(self._prior_ADD)
        self._theta_AD = np.zeros((count, d))
        self._solve(range(count))

    def score(self, context: Sequence[float]) -> dict[str, tuple[float, float]]:
        """arm -> (estimated reward, width), in the order of the arms. Raises ValueError on a bad context."""
        x_D = np.asarray(context, dtype=np.float64)
        if not self._usable(x_D):
            raise ValueError(f"a context has {self.dimension} finite numbers: {context!r}")
        means = self._theta_AD @ x_D
        widths = self.alpha * np.sqrt(np.maximum((self._inverse_ADD @ x_D) @ x_D, 0.0))
        pairs = zip(means.tolist(), widths.tolist(), strict=True)
        return {REST: (0.0, 0.0), **dict(zip(self.arms[1:], pairs, strict=True))}

    def choose(self, context: Sequence[float], allowed: Collection[str]) -> Choice:
        """The allowed arm of the highest upper bound above 0, the first of equals; otherwise rest.

        Rest needs no permission, and is the answer to a context that is not finite.
        """
        best = Choice(REST, 0.0, 0.0, 0.0)
        if not self._usable(np.asarray(context, dtype=np.float64)):
            return best
        for arm, (mean, width) in self.score(context).items():
            if arm in allowed and mean + width > best.upper:
                best = Choice(arm, mean, width, mean + width)
        return best

    def update(self, arm: str, context: Sequence[float], reward: float, decision_id: str) -> bool:
        """Learn from one settled decision. False, and nothing changes, when the numbers are not finite
        or the decision was learned from before. Raises ValueError for an arm that is not ours."""
        if arm not in self.pulls:
            raise ValueError(f"no such arm: {arm!r}; the arms are {', '.join(self.arms)}")
        x_D = np.asarray(context, dtype=np.float64)
        if not self._usable(x_D) or not math.isfinite(reward) or decision_id in self._recent_ids:
            return False
        self._remember(decision_id)
        self.pulls[arm] += 1
        self.last_context = tuple(x_D.tolist())
        if self.forgetting < 1.0:
            self._squares_ADD *= self.forgetting
            self._rewards_AD *= self.forgetting
        if arm != REST:
            self.reward_sums[arm] += reward
            self._learn(self.arms.index(arm) - 1, x_D, reward)
        if self.forgetting < 1.0:
            self._inverse_ADD = np.linalg.inv(self._prior_ADD + self._squares_ADD)
            self._solve(range(len(self.arms) - 1))
        return True

    def new_run(self) -> None:
        """What was learned is carried over to another run, whose decision ids start again."""
        self._recent_ids = {}

    def state(self) -> dict[str, Any]:
        """JSON-able and exact: `load` goes on with the same bits."""
        return {
            "dimension": self.dimension,
            "alpha": self.alpha,
            "ridge": self.ridge,
            "forgetting": self.forgetting,
            "recent_ids": list(self._recent_ids),
            "last_context": list(self.last_context),
            "arms": [self._arm_state(index) for index in range(len(self.arms))],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what was learned about the arms of the same names; others keep their prior.

        Alpha, ridge, forgetting and priors stay this bandit's own. Raises CheckpointError, and changes
        nothing, when the state is damaged or of another dimension.
        """
        fresh = LinUCB(
            self.arms,
            self.dimension,
            alpha=self.alpha,
            ridge=self.ridge,
            forgetting=self.forgetting,
            priors=dict(zip(self.arms, self.priors, strict=True)),
        )
        try:
            if state["dimension"] != self.dimension:
                raise CheckpointError(f"a bandit of dimension {state['dimension']}, not {self.dimension}")
            fresh.last_context = tuple(map(float, state["last_context"]))
            fresh._recent_ids = dict.fromkeys(map(str, state["recent_ids"]))
            for values in state["arms"]:
                if values["name"] in fresh.pulls:
                    fresh._load_arm(values, same_ridge=state["ridge"] == self.ridge)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged state of the bandit: {error!r}") from None
        fresh._solve(range(len(self.arms) - 1))
        self.__dict__.update(fresh.__dict__)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LinUCB:
        """The bandit that gave this state. Raises CheckpointError."""
        try:
            bandit = cls(
                [values["name"] for values in state["arms"]],
                state["dimension"],
                alpha=state["alpha"],
                ridge=state["ridge"],
                forgetting=state["forgetting"],
                priors={
                    values["name"]: Prior(values["prior_mean"], values["prior_count"])
                    for values in state["arms"]
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged state of the bandit: {error!r}") from None
        bandit.load(state)
        return bandit

    def _usable(self, x_D: Array) -> bool:
        return x_D.shape == (self.dimension,) and bool(np.isfinite(x_D).all())

    def _remember(self, decision_id: str) -> None:
        self._recent_ids[decision_id] = None
        if len(self._recent_ids) > REMEMBERED_IDS:
            del self._recent_ids[next(iter(self._recent_ids))]

    def _learn(self, index: int, x_D: Array, reward: float) -> None:
        self._squares_ADD[index] += np.outer(x_D, x_D)
        self._rewards_AD[index] += reward * x_D
        if self.forgetting < 1.0:
            return  # every arm is inverted anyway
        if self.pulls[self.arms[index + 1]] % REFRESH_PULLS == 0:
            self._inverse_ADD[index] = np.linalg.inv(self._prior_ADD[index] + self._squares_ADD[index])
        else:
            ax_D = self._inverse_ADD[index] @ x_D
            self._inverse_ADD[index] -= np.outer(ax_D, ax_D) / (1.0 + float(ax_D @ x_D))
        self._solve([index])

    def _solve(self, indices: Collection[int]) -> None:
        for index in indices:
            self._theta_AD[index] = self._inverse_ADD[index] @ (
                self._prior_AD[index] + self._rewards_AD[index]
            )

    def _arm_state(self, index: int) -> dict[str, object]:
        name, prior = self.arms[index], self.priors[index]
        values: dict[str, object] = {
            "name": name,
            "prior_mean": prior.mean,
            "prior_count": prior.count,
            "pulls": self.pulls[name],
            "reward_sum": self.reward_sums[name],
        }
        if index > 0:
            values["squares"] = pack(self._squares_ADD[index - 1])
            values["rewards"] = pack(self._rewards_AD[index - 1])
            values["inverse"] = pack(self._inverse_ADD[index - 1])
        return values

    def _load_arm(self, values: Mapping[str, Any], *, same_ridge: bool) -> None:
        name, d = values["name"], self.dimension
        self.pulls[name], self.reward_sums[name] = int(values["pulls"]), float(values["reward_sum"])
        index = self.arms.index(name) - 1
        if index < 0:
            return
        self._squares_ADD[index] = unpack(values["squares"], shape=(d, d))
        self._rewards_AD[index] = unpack(values["rewards"], shape=(d,))
        if same_ridge and values["prior_count"] == self.priors[index + 1].count:
            self._inverse_ADD[index] = unpack(values["inverse"], shape=(d, d))
        else:
            self._inverse_ADD[index] = np.linalg.inv(self._prior_ADD[index] + self._squares_ADD[index])
