"""Chooses the controls: at a decision point, whether to propose a change, which one, and why in words.

    observe   which controls are in force, what a step takes, whether the trainer went back
    propose   a run in ruin -> a context that must grow -> the bandit among those that
              the rules admit (control_arms.py), within the budget (control_trials.py); else None
    settle    an accepted change stays in force; the trial teaches

A trial of rate or batch has two legs (trainer_node/control_twin.py): the steps with it, and from the same
weights, one attempt later, those of the run without it. The second is no rollback. One that begins at the
first weights (trainer_node/first_weights.py) has its own steps alone, one attempt later and from step 1.

Never two trials at once, never a change that control_rules.breach objects to, never one whose switch is off.
A function of the messages alone; all that later proposals depend on is in `state()`. Knows no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common import features
from common.control_rules import trial_steps, words
from common.errors import CheckpointError
from common.messages import Controls, Forecast, Observation, Outcome, Phase, PhaseDecision
from common.settings import RunSettings
from common.trial_seen import is_kept
from predictor_node.batch_law import StepTimes
from predictor_node.control_arms import Candidate, Situation, candidates, due, urgent
from predictor_node.control_trials import ControlTrials, Trial
from predictor_node.controls_in_force import (
    InForce,
    agree,
    begun_with,
    in_force_from_json,
    told_by,
    told_controls,
)
from predictor_node.evidence import LEVEL_STEPS, TREND_STEPS, Evidence, evidence_of, fastest_fall
from predictor_node.fixed_policy import FITTED_WINDOWS, MAX_FITTED_STEPS
from predictor_node.forecast import LossCurve, fit_loss_curve
from predictor_node.history import LIMIT_STEPS
from predictor_node.policy import DecisionInput, make_decision

MOST_RUIN_TRIALS = 6  # refused in a row; then the rate is not what is wrong
REASON_CHARACTERS = 160  # what a message is sized for (common/message_bounds.py)
_SECONDS, _HAS_AVERAGE = features.INDEX["log10_step_seconds"], features.INDEX["has_average"]
_RATE_SHARE = features.INDEX["rate_over_peak"]


class Pilot:
    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self.in_force = InForce()
        self.trials = ControlTrials(settings)
        self.times = StepTimes(is_lockstep=settings.trainer.decision_mode == "lockstep")
        self._attempt = -1  # of the newest observation or outcome
        self._step = 0
        self._rolled_back = False

    # ---- what happens --------------------------------------------------------------------------

    def observe(self, observation: Observation) -> None:
        """One real step that was not known before."""
        is_first = not self._step
        tried_with = self._tried_with(observation)
        if self._attempt >= 0 and observation.attempt > self._attempt and tried_with is None:
            self._rolled_back = True
        if observation.step <= self._step and tried_with is None:
            self.in_force = self.in_force.set_back(observation.step - 1)
        self._attempt, self._step = max(self._attempt, observation.attempt), observation.step
        if tried_with is None:
            self._believe(observation, is_first=is_first)
        controls = tried_with or self.in_force.controls
        trial = self.trials.open
        if tried_with is not None and trial is not None and tried_with == trial.controls:
            self.trials.open = replace(trial, is_return=observation.attempt > trial.attempt)
        self.times.observe(controls, observation.features[_SECONDS])
        self.trials.stepped(controls.batch_factor)

    def _tried_with(self, observation: Observation) -> Controls | None:
        """The controls of a step on trial, in the first leg or the second; None: it is no such step."""
        trial = self.trials.open
        if trial is None or observation.phase is not Phase.CORRECT:
            return None
        if observation.attempt == trial.attempt:
            return trial.controls
        if observation.attempt != trial.attempt + 1 or not trial.is_beside_twin:
            return None
        told = told_controls(observation, self._settings.trainer, trial.controls)
        return trial.controls if agree(told, trial.controls) else trial.before

    def _believe(self, observation: Observation, *, is_first: bool) -> None:
        """What the step was taken with is in force, whoever asked for it and whatever was heard of it."""
        trainer, believed = self._settings.trainer, self.in_force.controls
        is_before = observation.step <= self.in_force.since_step  # the run went back behind what is known
        if is_first or is_before or not agree(told_controls(observation, trainer, believed), believed):
            self.in_force = told_by(observation, trainer, believed)

    def settle(self, outcome: Outcome) -> bool:
        """Whether it was the outcome of a trial of ours."""
        self._attempt = max(self._attempt, outcome.attempt)
        before = self.trials.open.before if self.trials.open else self.in_force.controls
        trial = self.trials.settle(outcome, ordinary_seconds=self.times.seconds(before))
        if trial is None:
            return False
        if is_kept(outcome):
            self._keep(trial, trial.base_step + outcome.probation_steps)
        return True

    def _keep(self, trial: Trial, kept_step: int) -> None:
        if trial.is_return:
            self.in_force = begun_with(trial.controls)
            return
        if not trial.is_beside_twin:  # behind a twin it goes on from the trial's end
            kept_step = max(self._step, kept_step)
        self.in_force = self.in_force.kept(trial.controls, base_step=trial.base_step, kept_step=kept_step)

    # ---- what is proposed ----------------------------------------------------------------------

    def clock_at(self, step: int) -> float:
        return self.in_force.clock_at(step)

    def may_act_later(self, step: int) -> bool:
        """Whether decision points at the usual distance are still of use."""
        left = self._settings.trainer.steps - self.clock_at(step)
        return left > self._settings.trainer.probation_steps * self.in_force.controls.batch_factor

    def propose(self, point: DecisionInput) -> PhaseDecision | None:
        """A trial of other controls, or None: then jumps have the word."""
        self._forget_an_unanswered_trial(point)
        rows = point.history.fitted_rows(max(TREND_STEPS, self._fitted_steps))
        if not self._settings.predictor.enabled or not rows or self._is_too_late(point):
            return None
        curve = fit_loss_curve(rows[-self._fitted_steps :])
        here = self._situation(point, evidence_of(rows, since_step=self.in_force.since_step), curve)
        self._rolled_back = False
        context = self._context(point, here.evidence)
        chosen = self._choose(point, here, context)
        return None if chosen is None else self._proposal(point, here, chosen, context)

    @property
    def _fitted_steps(self) -> int:
        return min(FITTED_WINDOWS * self._settings.trainer.window_steps, MAX_FITTED_STEPS)

    def _forget_an_unanswered_trial(self, point: DecisionInput) -> None:
        """Asked again for the same point: as if never asked. At a later one: its outcome was lost."""
        trial, observation = self.trials.open, point.observation
        if trial is None:
            return
        if trial.decision_id != f"{observation.step}.{observation.attempt}":
            self.trials.lose()
            self.in_force = self.in_force.with_tail_of(trial.controls, observation, self._settings.trainer)
        self.trials.open = None

    def _is_too_late(self, point: DecisionInput) -> bool:
        return not self.may_act_later(point.observation.step)

    def _situation(self, point: DecisionInput, evidence: Evidence, curve: LossCurve | None) -> Situation:
        observation, now, since_step = point.observation, self.in_force.controls, self.in_force.since_step
        remembered = point.history.fitted_rows(LIMIT_STEPS) if self._settings.trainer.controls.decay else ()
        return Situation(
            settings=self._settings,
            now=now,
            clock=self.clock_at(observation.step),
            evidence=evidence,
            curve=curve,
            time=self.times.fit(now),
            step=observation.step,
            has_average=observation.features[_HAS_AVERAGE] > 0.0,
            fastest_fall=fastest_fall(remembered, since_step=since_step),
            seen_steps=min(observation.step - since_step, point.history.contiguous_steps),
            is_lowered=self.in_force.is_lowered,
            rolled_back=self._rolled_back,
            climb_gain=self.trials.climb_gain,
            not_before=self.trials.not_before,
        )

    def _choose(self, point: DecisionInput, here: Situation, context: tuple[float, ...]) -> Candidate | None:
        must = urgent(here)
        if must is not None:
            may = self.trials.ruins_in_a_row < MOST_RUIN_TRIALS and self.trials.affordable(must, here.now)
            return must if may else None
        if self._rests(point, here):
            return None
        return due(here) or self.trials.chosen(candidates(here), context, here.now)

    def _rests(self, point: DecisionInput, here: Situation) -> bool:
        """Too early for anything but a rescue."""
        trainer = self._settings.trainer
        return (
            # A window at the full rate: before, the loss falls as the rate rises, and so does its noise.
            here.clock < trainer.schedule.warmup_steps + trainer.window_steps
            or point.history.contiguous_steps < trainer.window_steps
            or here.curve is None
        )

    def _context(self, point: DecisionInput, evidence: Evidence) -> tuple[float, ...]:
        """See control_trials.CONTEXT_NAMES; all within about [-1, 1]."""
        now, step = self.in_force.controls, point.observation.step
        scale = evidence.noise_scale / now.batch_factor
        values = (
            1.0,
            self.clock_at(step) / self._settings.trainer.steps,
            point.observation.features[_RATE_SHARE],
            math.log2(now.rate_factor) / 6.0,
            math.log2(now.batch_factor) / 4.0,
            scale / (1.0 + scale) if math.isfinite(scale) else 0.0,
            math.tanh(evidence.significance / 4.0),
        )
        return tuple(value if math.isfinite(value) else 0.0 for value in values)

    def _proposal(
        self, point: DecisionInput, here: Situation, chosen: Candidate, context: tuple[float, ...]
    ) -> PhaseDecision:
        gain = f", {100.0 * chosen.gain:+.0f} % progress per second forecast" if chosen.gain > 0.0 else ""
        reason = f"{words(here.now, chosen.controls)}: {chosen.why}{gain}"[:REASON_CHARACTERS]
        decision = make_decision(
            point,
            phase=Phase.PREDICT,
            horizon_steps=0,
            coefficients=(),
            forecast=self._forecast(here, chosen),
            reason=reason,
            arm=chosen.arm,
            controls=chosen.controls,
        )
        self.trials.open = Trial(
            decision_id=decision.decision_id,
            arm=chosen.arm,
            base_step=decision.base_step,
            attempt=decision.base_attempt,
            clock=here.clock,
            before=here.now,
            controls=chosen.controls,
            context=context,
            gain=chosen.gain,
            reason=reason,
            expected_passes=self.trials.expected_passes(chosen, here.now),
            is_exempt=chosen.is_exempt,
        )
        return decision

    def _forecast(self, here: Situation, chosen: Candidate) -> Forecast | None:
        """At the end of the probation; the gain is of what an ordinary step brings."""
        if here.curve is None:
            return None
        steps = trial_steps(chosen.controls, here.now, self._settings.trainer)
        without = here.curve.loss_at(here.step + steps)
        gained_nats = chosen.gain * steps * max(0.0, -here.curve.slope_at(here.step))
        spread = here.curve.spread_of_mean(here.step + steps, LEVEL_STEPS)
        return Forecast(loss=without - gained_nats, loss_without=without, spread=spread)

    # ---- state ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "in_force": self.in_force.to_json(),
            "trials": self.trials.state(),
            "times": self.times.state(),
            "position": [self._attempt, self._step],
            "rolled_back": self._rolled_back,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError."""
        try:
            self.trials.load(state["trials"])
            self.times.load(state["times"])
            self._attempt, self._step = (int(value) for value in state["position"])
            in_force = in_force_from_json(state["in_force"])
            self.in_force = in_force.under(self._settings.trainer, step=self._step)
            self._rolled_back = bool(state["rolled_back"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged state of the pilot: {error!r}") from None
