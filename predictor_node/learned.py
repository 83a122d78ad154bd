"""The learned policy: world model and bandit, a delta head and a per-weight forecaster, on a budget.

    observe   ticks -> world model; due forecasts -> calibration; windows -> delta head, forecaster
    decide    arms -> deltas within a trust region -> imagined -> those worth trying -> LinUCB -> budget
    settle    outcome -> reward -> bandit; residuals; budget; verdict -> world model

Arm 0 is rest: what does not pay, or cannot be afforded, is not tried. Everything is a function of the
messages and of the seed of the run; learning is paid for in floating-point operations, not in seconds. The
parts are files of their own; this one owns their order. docs/how-it-works.md has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from common.errors import CheckpointError
from common.messages import Forecast, Observation, Outcome, Phase, PhaseDecision, Verdict
from common.settings import RunSettings
from predictor_node.arms import HEAD, Arm, arms_of
from predictor_node.bandit import REST
from predictor_node.calibration import allowed_horizon_steps
from predictor_node.context import context_of
from predictor_node.experience import Experience, Tried
from predictor_node.fixed_policy import FITTED_WINDOWS, MAX_FITTED_STEPS
from predictor_node.forecast import LossCurve, fit_loss_curve, forecast_at
from predictor_node.history import History
from predictor_node.models import Models
from predictor_node.policy import (
    LAST_WINDOW_FACTOR,
    DecisionInput,
    PolicyState,
    basis_reason,
    history_reason,
    is_in_tail,
    make_decision,
    phase_of_run_reason,
    rest,
    tail_start_step,
)
from predictor_node.proposals import Imagined, Proposal, followed, proposals_for
from predictor_node.state import RunFacts
from predictor_node.tempers import TEMPERS
from predictor_node.ticks import TickMaker

TICKS_PER_WINDOW = 4
MAX_WINDOW_FACTOR = 8  # while nothing is worth trying, windows grow: a decision point is not free
MAX_CHUNKS = 64  # what the trainer takes (docs/messages.md)
ON_PROBATION = {Verdict.ACCEPTED: False, Verdict.REFUSED: True}


class LearnedPolicy:
    def __init__(self, settings: RunSettings, facts: RunFacts) -> None:
        trainer = settings.trainer
        self._settings, self._temper = settings, TEMPERS[settings.predictor.temper]
        self._arms = arms_of(settings)
        stride = max(1, trainer.window_steps // TICKS_PER_WINDOW)
        self._probation_ticks = max(1, trainer.probation_steps // stride)
        self.ticks = TickMaker(stride=stride, num_directions=len(facts.directions))
        self.models = Models(settings, facts)
        self.experience = Experience(settings, [arm.name for arm in self._arms])
        self._rests_in_a_row = self._proposals_in_a_row = 0

    def observe(self, observation: Observation, history: History) -> None:
        gap = history.contiguous_steps == 1
        self.models.step_taken(observation)
        if self.models.is_awake:
            for tick in self.ticks.observe(observation, gap=gap):
                self.models.record(tick)
        self.experience.observe(observation, history)
        if observation.decision_point is not None:
            self.models.window_ended(observation, observation.decision_point)

    # ---- decisions ---------------------------------------------------------------------------

    def decide(self, point: DecisionInput) -> PhaseDecision:
        curve = self._curve(point)
        reason = self._rest_reason(point, curve)
        if reason or curve is None:
            return self._rest(point, curve, reason, for_long=self._rests_to_the_end(point))
        context = self._context(point, curve)
        limit_steps = self._longest_horizon(curve, point)
        possible = proposals_for(self._arms, point, self.models, self._temper, limit_steps)
        proposals = self._worth_trying(possible)
        choice = self.experience.bandit.choose(context, {proposal.arm.name for proposal in proposals})
        chosen = next((proposal for proposal in proposals if proposal.arm.name == choice.arm), None)
        if chosen is None:
            return self._rest(point, curve, "no jump is expected to pay", context)
        imagined = chosen.imagined
        refusal = self.experience.refusal(imagined.refusal if imagined else None)
        cost_passes = self.experience.affordable_cost(
            choice.arm,
            refusal=refusal,
            mean_reward=choice.mean,
            chunks=self._chunks(chosen.arm.horizon_steps),
        )
        if cost_passes is None:
            return self._rest(point, curve, "the budget for trying is spent", context, for_long=True)
        decision = self._propose(point, curve, context, chosen, refusal, cost_passes)
        self.ticks.jumped(chosen.action())
        self._rests_in_a_row, self._proposals_in_a_row = 0, self._proposals_in_a_row + 1
        return decision

    def follow(self, point: DecisionInput, decision: PhaseDecision) -> None:
        """Take a decision that somebody else made for our own, to learn from what became of it."""
        self._rests_in_a_row = 0 if decision.horizon_steps else self._rests_in_a_row + 1
        if not decision.horizon_steps or basis_reason(point):
            return
        windows = decision.horizon_steps / self._settings.trainer.window_steps
        named = {arm.name: arm for arm in self._arms}
        arm = named.get(decision.arm, Arm(decision.arm, HEAD, decision.horizon_steps, windows))
        self.ticks.jumped(followed(decision, arm, point).action())
        curve, forecast = self._curve(point), decision.forecast
        if decision.arm in named and curve is not None and forecast is not None:
            slope_nats = -curve.slope_at(point.observation.step)
            context = self._context(point, curve)
            self.experience.tried(Tried(decision.decision_id, arm.name, context, forecast.loss, slope_nats))

    def _curve(self, point: DecisionInput) -> LossCurve | None:
        count = min(FITTED_WINDOWS * self._settings.trainer.window_steps, MAX_FITTED_STEPS)
        return fit_loss_curve(point.history.fitted_rows(count))

    def _context(self, point: DecisionInput, curve: LossCurve) -> tuple[float, ...]:
        return context_of(
            point,
            curve,
            probation_steps=self._settings.trainer.probation_steps,
            forecaster_explains=self.models.forecaster_explains,
            latent=self.models.latent(),
        )

    def _rest_reason(self, point: DecisionInput, curve: LossCurve | None) -> str:
        settings, step = self._settings, point.schedule_step
        if not settings.predictor.enabled:
            return "prediction is off"
        if not self.experience.can_ever_afford():
            return "this run is too short to pay for a refused jump"
        if step < self._first_step():
            return "too early in the run"
        reason = phase_of_run_reason(settings, point) or history_reason(settings, point.history, curve)
        return reason or basis_reason(point)

    def _rests_to_the_end(self, point: DecisionInput) -> bool:
        return is_in_tail(self._settings, point) or not self.experience.can_ever_afford()

    def _first_step(self) -> float:
        trainer = self._settings.trainer
        stable_steps = min(trainer.steps, tail_start_step(trainer.schedule, trainer.steps))
        return max(min(self._temper.first_step, 0.1 * trainer.steps), self._temper.first_share * stable_steps)

    def _worth_trying(self, proposals: list[Proposal]) -> list[Proposal]:
        """Those that the world model sees neither refused nor surely worse than a rest; all of them while
        it knows too little to say."""
        imagined = self.models.imagine(proposals, self._probation_ticks)
        for proposal, forecast in zip(proposals, imagined, strict=True):
            proposal.imagined = forecast
        return [p for p in proposals if p.imagined is None or self._may_pay(p.imagined)]

    def _may_pay(self, imagined: Imagined) -> bool:
        refused = imagined.refusal is not None and imagined.refusal > self._temper.max_refusal
        return not refused and imagined.change_by_jump <= imagined.spread

    def _propose(
        self,
        point: DecisionInput,
        curve: LossCurve,
        context: tuple[float, ...],
        chosen: Proposal,
        refusal: float,
        cost_passes: float,
    ) -> PhaseDecision:
        predictor, arm, step = self._settings.predictor, chosen.arm, point.observation.step
        base = self._without_jump(curve, point)
        assert base is not None
        raw_loss = base.loss_without + (chosen.imagined.change_by_jump if chosen.imagined else 0.0)
        advice = self.experience.residuals.advise(context, step=step, forecast=raw_loss)
        chosen.scale(advice.coefficient_scale, self._temper.trust_norm)
        forecast = Forecast(
            loss=advice.loss,
            loss_without=base.loss_without,
            spread=base.spread * self.experience.spread_factor(arm.horizon_steps),
            refusal=refusal,
        )
        decision = make_decision(
            point,
            phase=Phase.PREDICT,
            horizon_steps=arm.horizon_steps,
            coefficients=chosen.coefficients(),
            forecast=forecast,
            reason=f"{arm.name}, the best of {len(self._arms)} arms here",
            arm=arm.name,
            forecaster=chosen.forecaster,
            correction_share=predictor.correction_share,
            chunks=self._chunks(arm.horizon_steps),
        )
        slope_nats = -curve.slope_at(step)
        self.experience.decided(decision, raw_spread=base.spread, slope_nats=slope_nats)
        self.experience.tried(
            Tried(
                decision.decision_id,
                arm.name,
                context,
                raw_loss,
                slope_nats,
                expected_cost_passes=cost_passes,
                coefficient_scale=advice.coefficient_scale,
            )
        )
        return decision

    def _chunks(self, horizon_steps: int) -> int:
        chunk_steps = self._settings.predictor.chunk_steps
        return min(MAX_CHUNKS, math.ceil(horizon_steps / chunk_steps)) if chunk_steps else 1

    def _rest(
        self,
        point: DecisionInput,
        curve: LossCurve | None,
        reason: str,
        context: tuple[float, ...] | None = None,
        *,
        for_long: bool = False,
    ) -> PhaseDecision:
        """No jump. Where there will be none `for_long`, the next decision point is put off at once."""
        raw = self._without_jump(curve, point)
        forecast = raw and replace(raw, spread=raw.spread * self.experience.spread_factor(0))
        self._rests_in_a_row, self._proposals_in_a_row = self._rests_in_a_row + 1, 0
        longer = min(MAX_WINDOW_FACTOR, 2 ** (self._rests_in_a_row // 2))
        if for_long and self.models.phi is None:  # which learns from windows of the usual length
            longer = LAST_WINDOW_FACTOR
        decision = rest(
            point,
            reason=reason,
            forecast=forecast,
            arm=REST,
            next_window_steps=self._settings.trainer.window_steps * longer if longer > 1 else 0,
        )
        slope_nats = -curve.slope_at(point.observation.step) if curve else 0.0
        self.experience.decided(decision, raw_spread=raw.spread if raw else 0.0, slope_nats=slope_nats)
        if context is not None:
            self.experience.tried(Tried(decision.decision_id, REST, context, math.nan, slope_nats))
        return decision

    def _without_jump(self, curve: LossCurve | None, point: DecisionInput) -> Forecast | None:
        """The spread is that of what can be compared with it: a mean over the last steps."""
        if curve is None:
            return None
        end_step = point.observation.step + self._settings.trainer.probation_steps
        spread = curve.spread_of_mean(end_step, self.experience.averaged_steps)
        return replace(forecast_at(curve, end_step=end_step, gained_steps=0.0), spread=spread)

    def _longest_horizon(self, curve: LossCurve, point: DecisionInput) -> int:
        """Virtual steps; shorter while forecasts are off, and after many proposals in a row."""
        return allowed_horizon_steps(
            self._temper.max_horizon_steps,
            confidence=self.experience.confidence(self._without_jump(curve, point)),
            proposals_in_a_row=self._proposals_in_a_row,
            min_steps=self._settings.trainer.window_steps,
        )

    # ---- outcomes and state ------------------------------------------------------------------

    def settle(self, outcome: Outcome) -> None:
        for tick in self.ticks.settled(refused=ON_PROBATION.get(outcome.verdict)):
            self.models.record(tick)
        self.experience.settle(outcome)

    def state(self) -> PolicyState:
        values: dict[str, Any] = {
            "policy": "learned",
            **self.experience.state(),
            "ticks": self.ticks.state(),
            "in_a_row": [self._rests_in_a_row, self._proposals_in_a_row],
            "models": self.models.values(),
        }
        return PolicyState(values=values, tensors=self.models.tensors())

    def load(self, state: PolicyState) -> None:
        values = state.values
        if values.get("policy") != "learned":
            raise CheckpointError("not a state of the learned policy")
        try:
            self.experience.load(values)
            self.ticks.load(values["ticks"])  # type: ignore[arg-type]
            rests, proposals = values["in_a_row"]  # type: ignore[misc]
            self._rests_in_a_row, self._proposals_in_a_row = int(rests), int(proposals)
            self.models.load(values["models"], state.tensors)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged state of the learned policy: {error!r}") from None

    def start_warm(self, state: PolicyState) -> None:
        """Take over what other runs have taught. Raises CheckpointError."""
        try:
            self.experience.start_warm(state.values)
            self.models.load(state.values["models"], state.tensors, same_run=False)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not what a learned policy taught: {error!r:.80}") from None
        self.models.new_run(is_warm=True)
