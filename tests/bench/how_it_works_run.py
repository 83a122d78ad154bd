"""One real run with all that the figures of docs/how-it-works.md need: how_it_works.py draws them.

The learned policy in lockstep, predictor in the same process. The guard loss is read after every step, and at
every proposal the road without the jump is taken too (race/twin.py); the run itself notices neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common import features
from common.clock import SystemClock
from common.config import dump_settings
from common.messages import Message, Observation, Outcome, Phase, PhaseDecision, Verdict
from common.settings import RunSettings
from predictor_node.node import Predictor, in_memory_predictor
from trainer_node import observer
from trainer_node.assembly import build_loop, prepare_task, run_started
from trainer_node.loop import Loop
from trainer_node.race.in_process import InProcessPredictor
from trainer_node.race.twin import Crossroads, nothing

JUDGED = (Verdict.ACCEPTED, Verdict.REFUSED, Verdict.RUINED)


@dataclass
class Seen:
    """All that was told and measured. Guard losses by (attempt, step); twins by decision id."""

    steps: list[Observation] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    decisions: dict[str, PhaseDecision] = field(default_factory=dict)
    guard: dict[tuple[int, int], float] = field(default_factory=dict)
    twins: dict[str, list[float]] = field(default_factory=dict)
    budget: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)  # by decision id

    def arm_of(self, outcome: Outcome) -> str:
        return self.decisions[outcome.decision_id].arm

    def guard_at(self, step: int, attempt: int) -> float:
        """After this step as it stood in this attempt: the newest taking of it that is no later."""
        return self.guard[max((a, s) for a, s in self.guard if s == step and a <= attempt)]

    @property
    def jumps(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.verdict in JUDGED]


class Watcher(InProcessPredictor):
    """Passes everything on; reads the guard loss after every step and takes the other road at proposals."""

    def __init__(self, predictor: Predictor, seen: Seen) -> None:
        super().__init__(predictor, SystemClock())
        self._core, self._seen = predictor, seen
        self.loop: Loop | None = None

    def emit(self, message: Message) -> None:
        super().emit(message)
        seen = self._seen
        if isinstance(message, Observation):
            seen.steps.append(message)
            if self.loop is not None:
                seen.guard[message.attempt, message.step] = self.loop.guard_loss()
        elif isinstance(message, Outcome):
            seen.outcomes.append(message)
            self._look_at_the_policy(message)

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        decision = super().wait_decision(step=step, attempt=attempt, seconds=seconds)
        if decision is not None:
            self._seen.decisions[decision.decision_id] = decision
            if decision.phase is Phase.PREDICT and self.loop is not None:
                with Crossroads(self.loop) as here:
                    stops = range(self.loop.rules.probation_steps + 1)
                    road = here.road(nothing, list(stops))
                self._seen.twins[decision.decision_id] = [road[stop].guard for stop in stops if stop in road]
        return decision

    def _look_at_the_policy(self, outcome: Outcome) -> None:
        policy = self._core.learned.policy
        assert policy is not None
        values: Any = policy.values
        self._seen.budget.append((outcome.base_step, values["budget"]))
        for entry in values["decisions"]:
            if entry["reward"] is not None:
                self._seen.rewards[entry["decision_id"]] = entry["reward"]


def live(settings: RunSettings) -> tuple[Seen, Loop]:
    task, seen = prepare_task(settings.trainer), Seen()
    watcher = Watcher(in_memory_predictor(), seen)
    observer.TOLD_TOGETHER = 1, 0.0  # the guard loss is read when a step is told
    loop = build_loop(
        task,
        settings,
        links=watcher,
        emit=watcher.emit,
        housekeeping=lambda loop: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    watcher.emit(
        run_started(
            loop,
            run_id="how-it-works",
            settings_toml=dump_settings(settings),
            resumed_from="",
            feature_version=features.VERSION,
        )
    )
    watcher.loop = loop
    loop.run()
    return seen, loop
