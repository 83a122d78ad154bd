"""Trials of controls: the one that is open, those that are over, and what they teach. State of the pilot.

Owns the bandit, the budget and the pacing, and keeps them in step. The bandit learns by how much the
estimates of control_arms.py are wrong: its target is reward less forecast, so an arm that was never tried is
worth its estimate. Trials may cost `predictor.control_share` of the run's passes at most, less a part of what
the kept ones were seen to gain; a run in ruin is exempt. Proposes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.control_rules import is_beside_twin, trial_steps, words
from common.errors import CheckpointError
from common.messages import APPLIED_VERDICTS, Controls, Outcome, Verdict
from common.settings import RunSettings
from common.trial_seen import is_kept, seen_of, seen_words
from common.trying import check_passes
from predictor_node.bandit import REST, LinUCB
from predictor_node.budget import ExplorationBudget
from predictor_node.control_arms import NAMES, RATE_UP, Candidate
from predictor_node.control_reward import worth_of
from predictor_node.experience import TRAIN_PASSES
from predictor_node.reward import UNDONE
from predictor_node.tempers import TEMPERS

CONTEXT_NAMES = (
    "one", "progress", "rate_over_peak", "log2_rate_factor", "log2_batch_factor", "noise_scale", "slope",
)  # fmt: skip
TRUST_RIDGE = 8.0  # one refusal does not end an arm: the judge refuses one good trial in six by noise alone
KEPT_TRIALS = 50
LUCK = 0.5  # of what was seen with a kept change counts as gained: those that are kept are the lucky ones
LATER = 4.0  # times as long the run must be before what was refused is tried again
CONTEXT_WAIT_WINDOWS = 4  # until a context that was refused its growth is asked for again


@dataclass(frozen=True, slots=True)
class Trial:
    """A proposal whose outcome is not known yet."""

    decision_id: str
    arm: str
    base_step: int
    attempt: int  # of its own steps
    clock: float
    before: Controls
    controls: Controls
    context: tuple[float, ...]
    gain: float  # forecast
    reason: str
    expected_passes: float
    is_exempt: bool
    is_return: bool = False  # it began at the first weights

    @property
    def is_beside_twin(self) -> bool:
        return is_beside_twin(self.controls, self.before)


class ControlTrials:
    def __init__(self, settings: RunSettings) -> None:
        trainer = settings.trainer
        self._trainer, self._temper = trainer, TEMPERS[settings.predictor.temper]
        self._step_passes = TRAIN_PASSES * trainer.batch.accumulation
        self.bandit = LinUCB(
            (REST, *NAMES), len(CONTEXT_NAMES), alpha=self._temper.optimism, ridge=TRUST_RIDGE
        )
        self.budget = ExplorationBudget(
            settings.predictor.control_share,
            planned_passes=self._step_passes * trainer.steps,
            worst_factor=1.0,
        )
        self.open: Trial | None = None
        self.over: tuple[dict[str, Any], ...] = ()  # newest last; what inspect shows
        self.not_before: dict[str, float] = {}  # kind of arm -> nominal step
        self.ruins_in_a_row = 0  # refused ways out of ruin
        self.climb_gain = math.nan
        self._applied, self._undone = 0, 0

    def stepped(self, batch_factor: float) -> None:
        self.budget.ran(self._step_passes * batch_factor)

    def chosen(
        self, candidates: Sequence[Candidate], context: tuple[float, ...], now: Controls
    ) -> Candidate | None:
        """The affordable one with the highest upper bound above 0, the first of equals."""
        best, best_upper = None, 0.0
        for candidate, (mean, width) in self._scored(candidates, context):
            upper = candidate.gain + mean + width
            if upper > best_upper and self.affordable(candidate, now):
                best, best_upper = candidate, upper
        return best

    def affordable(self, candidate: Candidate, now: Controls) -> bool:
        if candidate.is_exempt:
            return True
        worst = self._worst_passes(candidate.controls, now)
        return self.budget.allows(self.expected_passes(candidate, now), worst)

    def expected_passes(self, candidate: Candidate, now: Controls) -> float:
        """Beside a twin one of the two legs is lost, whatever the verdict."""
        worst, checks = self._worst_passes(candidate.controls, now), check_passes(self._trainer)
        if is_beside_twin(candidate.controls, now):
            return worst
        refusal = (self._undone + 1.0) / (self._applied + 3.0)
        return checks + refusal * (worst - checks)

    def _worst_passes(self, controls: Controls, now: Controls) -> float:
        """Of its checks and the steps that it loses. A twin takes as much time, in lockstep as much data."""
        steps = trial_steps(controls, now, self._trainer)
        return check_passes(self._trainer) + steps * self._step_passes * controls.batch_factor

    def _scored(
        self, candidates: Sequence[Candidate], context: tuple[float, ...]
    ) -> list[tuple[Candidate, tuple[float, float]]]:
        scores = self.bandit.score(context)
        return [(candidate, scores[candidate.arm]) for candidate in candidates]

    def settle(self, outcome: Outcome, *, ordinary_seconds: float = math.nan) -> Trial | None:
        """The trial that is over with this outcome, if it is one of ours.

        ordinary_seconds: of a step with the controls of before, in the unit of the outcome; NaN = as it says.
        """
        trial = self.open
        if trial is None or trial.decision_id != outcome.decision_id:
            return None
        self.open = None
        # Losses of other contexts do not compare, and beside a ruin every gain is beyond measure.
        seen, reward = math.nan, UNDONE if outcome.verdict in (Verdict.REFUSED, Verdict.RUINED) else None
        if trial.is_beside_twin and not trial.is_exempt:
            seen, reward = worth_of(outcome, ordinary_seconds=ordinary_seconds)
        is_judged = outcome.verdict in APPLIED_VERDICTS and outcome.verdict is not Verdict.ABORTED
        if is_judged:
            kept = is_kept(outcome)
            self._applied, self._undone = self._applied + 1, self._undone + (not kept)
            self._pace(trial, kept=kept, seen=seen)
            if reward is not None and not trial.is_exempt:
                self.bandit.update(trial.arm, trial.context, reward - trial.gain, trial.decision_id)
        elif outcome.verdict in (Verdict.MALFORMED, Verdict.FAILED):
            self._pace(trial, kept=False, seen=math.nan)
        if outcome.verdict in APPLIED_VERDICTS and not trial.is_exempt:
            self._pay(trial, outcome, seen)
        self._close(trial, outcome.verdict.value, _told(trial, outcome))
        return trial

    def _pay(self, trial: Trial, outcome: Outcome, seen: float) -> None:
        """A change that beat its twin has brought back a part of its cost."""
        cost, gain = max(0.0, outcome.passes), 0.0
        if not trial.is_beside_twin:
            self.budget.settle(trial.expected_passes, cost, gain)
            return
        if outcome.verdict is Verdict.ACCEPTED and math.isfinite(seen):
            steps_passes = outcome.probation_steps * self._step_passes * trial.before.batch_factor
            gain = LUCK * max(0.0, seen) * steps_passes
        self.budget.settle(cost - gain, cost, gain)

    def lose(self) -> None:
        """What became of the open trial was never told."""
        if self.open is not None:
            self._close(self.open, "lost", "")
            self.open = None

    def _pace(self, trial: Trial, *, kept: bool, seen: float) -> None:
        kind = kind_of(trial.arm)
        if kind == "rate:down" and (trial.is_exempt or kept):
            self.ruins_in_a_row = 0 if kept else self.ruins_in_a_row + 1
            self.climb_gain = math.nan
            self.not_before["rate:up"] = self._later(trial)  # what ruined a run once
            return
        if kind == "rate:up":
            self.climb_gain = seen if kept else math.nan
        if kept:
            return
        if kind.startswith("rate:"):
            self.not_before[trial.arm] = 2.0 * self._later(trial)  # first a smaller one
        self.not_before[kind] = self._later(trial)

    def _later(self, trial: Trial) -> float:
        """When the run is LATER times as long; a context that must grow is asked for sooner."""
        if kind_of(trial.arm) == "context" and trial.before.context_tokens:
            return trial.clock + CONTEXT_WAIT_WINDOWS * self._trainer.window_steps
        return LATER * trial.clock

    def _close(self, trial: Trial, verdict: str, seen: str) -> None:
        entry = {
            "decision_id": trial.decision_id,
            "step": trial.base_step,
            "arm": trial.arm,
            "change": words(trial.before, trial.controls),
            "reason": trial.reason,
            "verdict": verdict,
            "forecast": trial.gain,
            "seen": seen,
        }
        self.over = (*self.over[-(KEPT_TRIALS - 1) :], entry)

    def state(self) -> dict[str, Any]:
        return {
            "bandit": self.bandit.state(),
            "budget": self.budget.state(),
            "open": asdict(self.open) if self.open else None,
            "over": [dict(entry) for entry in self.over],
            "not_before": dict(self.not_before),
            "ruins_in_a_row": self.ruins_in_a_row,
            "climb_gain": self.climb_gain,
            "judged": [self._applied, self._undone],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError."""
        try:
            self.bandit.load(state["bandit"])
            self.budget.load(state["budget"])
            self.open = _trial_from(state["open"]) if state["open"] else None
            self.over = tuple(dict(entry) for entry in state["over"])
            self.not_before = {str(kind): float(clock) for kind, clock in state["not_before"].items()}
            self.ruins_in_a_row, self.climb_gain = int(state["ruins_in_a_row"]), float(state["climb_gain"])
            self._applied, self._undone = (int(count) for count in state["judged"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged trials of controls: {error!r}") from None


def _told(trial: Trial, outcome: Outcome) -> str:
    """What was seen, in the words of the page."""
    seen = seen_of(outcome, before=trial.before, after=trial.controls)
    return seen_words(seen, outcome, beside_twin=trial.is_beside_twin)


def kind_of(arm: str) -> str:
    """What is paced together."""
    if arm in RATE_UP:
        return "rate:up"
    if arm.startswith("rate:"):
        return "rate:down"
    return arm.split(":")[0] if arm.startswith("context:") else arm


def _trial_from(values: Mapping[str, Any]) -> Trial:
    controls = {name: Controls(**values[name]) for name in ("before", "controls")}
    return Trial(**{**values, **controls, "context": tuple(values["context"])})
