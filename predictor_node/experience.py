"""What trying has taught: rewards, errors of forecasts, the budget that is left. State of the learned policy.

Owns the bandit, the calibration, the residual store, the budget and the list of newest decisions, and keeps
them in step: a decision is opened, its forecast meets its step, its outcome settles it. Proposes nothing and
knows no network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import CheckpointError
from common.messages import APPLIED_VERDICTS, Forecast, Observation, Outcome, PhaseDecision, Verdict
from common.settings import RunSettings
from common.trying import check_passes, refusal_passes
from predictor_node.arms import SLOW
from predictor_node.bandit import REST, LinUCB, Prior
from predictor_node.budget import ExplorationBudget
from predictor_node.calibration import NORMAL_FACTOR, Calibration, bucket_of
from predictor_node.context import DIMENSION
from predictor_node.history import History
from predictor_node.pending import AVERAGED_STEPS, Pending, PendingForecasts
from predictor_node.residuals import Residuals, scale_of
from predictor_node.reward import cost_steps, gained_steps, reward_of
from predictor_node.tempers import TEMPERS

KEPT_DECISIONS = 50
TRAIN_PASSES = 3.0  # forward-equivalents of a micro-batch: forward 1, backward 2
UNTRIED = Prior(-0.05, 1.0)  # what an untried arm is believed to bring: less than its checks cost
PROMISING = Prior(0.0, 1.0)  # the slow drift is tried first: docs/lab-log.md, anatomy of jumps
FEW_PULLS = 3  # below that an arm's own estimate says too little about its cost


@dataclass(frozen=True, slots=True)
class Tried:
    """A decision whose outcome is not known yet; a rest has arm REST."""

    decision_id: str
    arm: str
    context: tuple[float, ...]
    loss_forecast: float  # nats, with the jump, before residuals.py corrected it
    slope_nats: float  # expected progress per step without the jump
    expected_cost_passes: float = 0.0
    coefficient_scale: float = 1.0  # by which residuals.py multiplied the delta


class Experience:
    def __init__(self, settings: RunSettings, arm_names: Sequence[str]) -> None:
        trainer, temper = settings.trainer, TEMPERS[settings.predictor.temper]
        self._trainer, self._correction_share = trainer, settings.predictor.correction_share
        self.step_passes = TRAIN_PASSES * trainer.batch.accumulation
        priors = {name: PROMISING if name.startswith(SLOW) else UNTRIED for name in arm_names[1:]}
        self.bandit = LinUCB(arm_names, DIMENSION, alpha=temper.optimism, priors=priors)
        self.calibration, self.residuals = Calibration(), Residuals(DIMENSION)
        self.budget = ExplorationBudget(
            temper.exploration_share, planned_passes=self.step_passes * trainer.steps
        )
        self._pending = PendingForecasts()
        self.averaged_steps = min(AVERAGED_STEPS, trainer.probation_steps)
        self._decisions: list[dict[str, Any]] = []
        self._tried: Tried | None = None
        self._happened: tuple[str, float] = ("", math.nan)  # the newest forecast that met its step
        self._applied, self._undone = 0, 0

    @property
    def cycle_steps(self) -> int:
        return self._trainer.window_steps + self._trainer.probation_steps

    def observe(self, observation: Observation, history: History) -> None:
        """One real step: it is paid for, and forecasts that speak of it are compared."""
        self.budget.ran(self.step_passes)
        for met in self._pending.observe(observation, history):
            pending = met.pending
            self.calibration.observe(
                pending.key, forecast=pending.forecast, spread=pending.spread, happened=met.happened
            )
            self._note(pending.decision_id, happened=met.happened)
            self._happened = pending.decision_id, met.happened

    def spread_factor(self, horizon_steps: int) -> float:
        """By which a stated standard deviation must be multiplied to cover what it claims to."""
        return self.calibration.factor(bucket_of(horizon_steps)) / NORMAL_FACTOR

    def confidence(self, forecast: Forecast | None) -> float:
        """In [0, 1]: how far forecasts of this run can be trusted (calibration.py)."""
        if forecast is None:
            return 0.0
        return self.calibration.confidence(
            bucket_of(0), forecast=forecast.loss_without, spread=forecast.spread
        )

    def refusal(self, imagined: float | None) -> float:
        """Probability that a jump will not be kept: the share so far, from one refusal in three at the
        beginning, averaged with the world model's where there is one."""
        share = (self._undone + 1.0) / (self._applied + 3.0)
        return share if imagined is None else 0.5 * (share + imagined)

    def can_ever_afford(self) -> bool:
        """Whether the whole run pays for one refusal: where it does not, nothing is ever tried."""
        return refusal_passes(self._trainer) <= self.budget.most_passes

    def affordable_cost(self, arm: str, *, refusal: float, mean_reward: float, chunks: int) -> float | None:
        """Expected cost less gain of a proposal in passes, or None if the budget does not allow it.

        An arm that was tried is judged by its rewards, which hold all costs; another by what checks
        and a refusal cost.
        """
        probation_passes = self._trainer.probation_steps * self.step_passes
        checks = check_passes(self._trainer, chunks)
        expected = checks + refusal * probation_passes
        if self.bandit.pulls[arm] >= FEW_PULLS:
            gained_cycles = math.atanh(max(-0.9, min(0.9, mean_reward)))
            expected = -gained_cycles * self.cycle_steps * self.step_passes
        return expected if self.budget.allows(expected, checks + probation_passes) else None

    def decided(self, decision: PhaseDecision, *, raw_spread: float, slope_nats: float) -> None:
        """Remember the decision, and its forecast for the day that it can be compared.

        What happened will be a mean over the last steps, so the forecast is moved to their middle.
        """
        forecast = decision.forecast
        if forecast is None:
            return
        self._pending.add(
            Pending(
                decision_id=decision.decision_id,
                end_step=decision.base_step + self._trainer.probation_steps,
                attempt=decision.base_attempt,
                key=bucket_of(decision.horizon_steps),
                forecast=forecast.loss + slope_nats * (self.averaged_steps - 1) / 2,
                spread=raw_spread,
                averaged_steps=self.averaged_steps,
            )
        )
        entry = {
            "decision_id": decision.decision_id,
            "step": decision.base_step,
            "arm": decision.arm,
            "verdict": "",
            "reward": None,
            "forecast": forecast.loss,
            "happened": None,
        }
        self._decisions = [*self._decisions[-(KEPT_DECISIONS - 1) :], entry]

    def tried(self, tried: Tried) -> None:
        self._tried = tried

    def settle(self, outcome: Outcome) -> None:
        """What became of a decision. Only what was tried to the end teaches."""
        tried, self._tried = self._tried, None
        self._note(outcome.decision_id, verdict=outcome.verdict.value)
        if outcome.verdict not in (Verdict.ACCEPTED, Verdict.REST):
            self._pending.drop(outcome.decision_id)  # it spoke of a road that was not taken
        if tried is None or tried.decision_id != outcome.decision_id:
            return
        if tried.arm == REST:
            self.bandit.update(REST, tried.context, 0.0, outcome.decision_id)
            return
        if outcome.verdict not in APPLIED_VERDICTS or outcome.verdict is Verdict.ABORTED:
            return
        self._applied += 1
        self._undone += outcome.verdict is not Verdict.ACCEPTED
        reward = reward_of(outcome, slope_nats=tried.slope_nats, cycle_steps=self.cycle_steps)
        if reward is not None:
            self.bandit.update(tried.arm, tried.context, reward, outcome.decision_id)
            self._note(outcome.decision_id, reward=reward)
        gained = gained_steps(
            outcome, slope_nats=tried.slope_nats, cycle_steps=self.cycle_steps, margin_spreads=1.0
        )
        cost = cost_steps(outcome)
        cost_passes = max(0.0, cost) * self.step_passes if math.isfinite(cost) else outcome.passes
        gain_passes = gained * self.step_passes if math.isfinite(gained) else 0.0
        # A kept jump lost no more than a refused one would have: below that the measured gain is noise.
        worst_passes = outcome.passes + self._trainer.probation_steps * self.step_passes
        self.budget.settle(
            tried.expected_cost_passes, cost_passes, max(gain_passes, cost_passes - worst_passes)
        )
        met_id, happened = self._happened
        if met_id == outcome.decision_id:
            self.residuals.add(
                tried.context,
                step=outcome.base_step,
                forecast=tried.loss_forecast,
                happened=happened,
                coefficient_scale=tried.coefficient_scale
                * scale_of(outcome, correction_share=self._correction_share),
            )

    def _note(self, decision_id: str, **values: object) -> None:
        self._decisions = [
            {**entry, **values} if entry["decision_id"] == decision_id else entry for entry in self._decisions
        ]

    def state(self) -> dict[str, Any]:
        """JSON-able; what inspect.py reads."""
        tried = self._tried
        return {
            "bandit": self.bandit.state(),
            "calibration": self.calibration.state(),
            "budget": self.budget.state(),
            "residuals": self.residuals.state(),
            "decisions": self._decisions,
            "pending": self._pending.state(),
            "tried": None if tried is None else [getattr(tried, name) for name in Tried.__slots__],
            "happened": list(self._happened),
            "judged": [self._applied, self._undone],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError."""
        self._load_lessons(state)
        try:
            self.budget.load(state["budget"])
            self._decisions = [dict(entry) for entry in state["decisions"]]
            self._pending.load(state["pending"])
            tried = state["tried"]
            self._tried = None if tried is None else Tried(*tried[:2], tuple(tried[2]), *tried[3:])
            self._happened = (str(state["happened"][0]), float(state["happened"][1]))
            self._applied, self._undone = (int(count) for count in state["judged"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged experience: {error!r}") from None

    def start_warm(self, state: Mapping[str, Any]) -> None:
        """What another run has taught, but not where that run stood. Raises CheckpointError."""
        self._load_lessons(state)
        self.bandit.new_run()
        self.residuals.new_run()

    def _load_lessons(self, state: Mapping[str, Any]) -> None:
        try:
            self.bandit.load(state["bandit"])
            self.calibration.load(state["calibration"])
            self.residuals.load(state["residuals"])
        except KeyError as error:
            raise CheckpointError(f"damaged experience: {error!r}") from None
