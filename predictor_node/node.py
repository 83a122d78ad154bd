"""The predictor without a process around it: one entry of `history` in, messages out.

Owns what was learned and when it is saved. Never reads a clock: what it answers depends only on
the entries, in their order, and on the state it started from. Idempotent: an entry at or below
`applied` is ignored, so is a step or an outcome that is known. A handler that raises changes
nothing. Never touches weights and never reads the held-out loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from common import features
from common.bus import STREAM_START, EntryId
from common.config import settings_from_toml
from common.errors import CheckpointError, EnvironmentFault
from common.messages import (
    Alert,
    CheckpointWritten,
    DecisionPoint,
    Message,
    Observation,
    Outcome,
    Phase,
    RunEnded,
    RunStarted,
)
from common.settings import RunSettings
from common.streams import PREDICTOR
from predictor_node.history import History
from predictor_node.holes import ENTRIES, LEFT_OUT, STEPS, Holes
from predictor_node.policies import policy_for
from predictor_node.policy import DecisionInput, Policy, rest
from predictor_node.state import Learned, MemoryStore, RunFacts, SavedState, StateStore, facts_of

STATE_LOST = "predictor_state_lost"  # kinds of alerts
START_LOST = "run_start_lost"
WARM_START_UNUSED = "warm_start_unused"
NOTHING_LEARNED = Learned(history=History(), policy=None, counters={}, last_outcome_id="")


class Predictor:
    """Handles the `history` stream of one run. `store` keeps its checkpoints."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._facts: RunFacts | None = None
        self._settings: RunSettings | None = None
        self._policy: Policy | None = None
        self._history = History()
        self._counters: Mapping[str, int] = {}
        self._last_outcome_id = ""
        self.applied: EntryId = STREAM_START
        self.lost_entries = 0  # holes in the entry ids; not part of the state
        self.passed_over = 0  # observations that were not looked at, to catch up; not part of the state
        self._passed_now = 0  # of these, since the last one that was looked at
        self._holes = Holes()
        self.saved = STREAM_START  # last entry that is in a saved state
        self.ended: EntryId | None = None  # the newest RunEnded, until a run starts again

    @property
    def last_step(self) -> int:
        last = self._history.last
        return last.step if last else 0

    @property
    def counters(self) -> Mapping[str, int]:
        """What was done since the run began, by name."""
        return {
            **self._counters,
            "missing_steps": self._history.missing_steps,
            "repeats": self._history.repeats,
            "lost_entries": self.lost_entries,
            "passed_over": self.passed_over,
        }

    @property
    def may_pass_over(self) -> bool:
        """In lockstep the trainer waits for each answer, and decisions are to be reproducible."""
        return self._settings is not None and self._settings.trainer.decision_mode == "live"

    def restore(self, state: SavedState) -> None:
        """Go on behind the last entry that `state` has seen. Raises CheckpointError, SettingsError."""
        self._adopt(state.facts, state.learned)
        self.applied = self.saved = state.applied

    def handle(self, message: Message, entry_id: EntryId) -> list[Message]:
        """Answers to one entry, in order. Messages of other streams are ignored."""
        if entry_id <= self.applied:
            return []
        answers: list[Message] = []
        if self._is_without_start(message, entry_id):
            answers.append(self._forget_the_older_start(entry_id))
        is_start_lost, known_holes = bool(answers), self._holes.total
        match message:
            case RunStarted():
                answers += self.on_run_started(message)
            case Observation():
                answers += self.on_observation(message, entry_id.generation)
            case Outcome():
                self.on_outcome(message)
            case CheckpointWritten():
                answers += self.on_checkpoint_written(message, entry_id)
            case RunEnded():
                self.on_run_ended(entry_id)
        lost_entries = self._advance(entry_id)
        if lost_entries and not is_start_lost and self._holes.total == known_holes:
            self._holes.add(ENTRIES, lost_entries)
        # No sum may wait longer than a saved state: a restart behind it would not know of it.
        is_last = isinstance(message, RunStarted | CheckpointWritten | RunEnded)
        return [*answers, *self._holes.tell(self.last_step, entry_id, is_last=is_last)]

    def pass_over(self, entry_id: EntryId) -> None:
        """Take an observation as seen without looking at it; the next one that is looked at tells of it."""
        if entry_id > self.applied:
            self._advance(entry_id)
            self.passed_over += 1
            self._passed_now += 1

    def _advance(self, entry_id: EntryId) -> int:
        """`applied` moves on; how many entries before this one never came."""
        first = entry_id.generation > self.applied.generation
        lost_entries = entry_id.sequence - (1 if first else self.applied.sequence + 1)
        self.lost_entries += lost_entries
        self.applied = entry_id
        return lost_entries

    def on_run_started(self, message: RunStarted) -> list[Message]:
        if self._facts and self._facts.generation == message.generation:
            return []  # said again, e.g. to a server that lost its data
        facts = facts_of(message)
        alerts = _version_alerts(message)
        try:
            learned = self._resumed(message) if message.resumed_from else None
            if learned is not None:
                self._adopt(facts, learned)
        except CheckpointError as error:
            alerts.append(_state_lost(message, error))
            learned = None
        if learned is None:
            alerts += self._start_afresh(facts, message.first_step)
        self.ended = None
        return alerts

    def _start_afresh(self, facts: RunFacts, first_step: int) -> list[Message]:
        try:
            self._adopt(facts, NOTHING_LEARNED)
        except CheckpointError as error:
            self._adopt(facts, NOTHING_LEARNED, is_warm=False)
            text = f"predictor.state is not used, this run learns from nothing: {error}"
            return [_alert("error", WARM_START_UNUSED, text, first_step)]
        return []

    def on_observation(self, message: Observation, generation: int) -> list[Message]:
        history = self._history.append(message) if self._features_fit(message) else self._history
        if self._history.is_repeat(message):
            self._history = history
            return []
        answers: list[Message] = []
        if self._policy is not None and self._features_fit(message):
            self._policy.observe(message, history)
        if message.decision_point is not None and message.phase is Phase.FULL:
            answers.append(self._decide(message, message.decision_point, generation, history))
        missing_steps = history.missing_steps - self._history.missing_steps
        if self._passed_now:
            self._holes.add(LEFT_OUT, self._passed_now)
            self._passed_now = 0
        elif missing_steps:
            self._holes.add(STEPS, missing_steps)
        self._history = history
        return answers

    def on_outcome(self, message: Outcome) -> None:
        if message.decision_id != self._last_outcome_id:
            if self._policy is not None:
                self._policy.settle(message)
            self._history = self._history.after(message)
            self._count(message.verdict.value)
            self._last_outcome_id = message.decision_id

    def on_checkpoint_written(self, message: CheckpointWritten, entry_id: EntryId) -> list[Message]:
        if self._facts is None or self._settings is None:
            return []
        state = SavedState(name=message.name, applied=entry_id, facts=self._facts, learned=self.learned)
        try:
            self._store.save(state, keep=self._settings.trainer.checkpoint.keep)
        except (EnvironmentFault, CheckpointError) as error:
            text = f"the predictor's state was not saved ({error}); a resume from {message.name} relearns it"
            return [_alert("error", "predictor_save_failed", text, message.step)]
        self.saved = entry_id
        return []

    def on_run_ended(self, entry_id: EntryId) -> None:
        self.ended = entry_id

    def _is_without_start(self, message: Message, entry_id: EntryId) -> bool:
        """A newer start of the trainer is under way, and its RunStarted never came."""
        is_newer = self._facts is not None and entry_id.generation > self._facts.generation
        return is_newer and not isinstance(message, RunStarted)

    def _forget_the_older_start(self, entry_id: EntryId) -> Alert:
        """Where the newer one began is not known: steps that it takes again would pass for repeats."""
        text = (
            f"the start of the trainer's generation {entry_id.generation} never arrived (trimmed away or"
            " dropped): no proposals until the trainer starts again"
        )
        alert = _alert("error", START_LOST, text, self.last_step)
        self._facts = self._settings = self._policy = self.ended = None
        self._history, self._counters, self._last_outcome_id = History(), {}, ""
        return alert

    @property
    def learned(self) -> Learned:
        """A snapshot; shares nothing that changes."""
        return Learned(
            history=self._history,
            policy=self._policy.state() if self._policy else None,
            counters=self._counters,
            last_outcome_id=self._last_outcome_id,
        )

    def _features_fit(self, message: Observation) -> bool:
        fits = self._facts is not None and self._facts.feature_version == features.VERSION
        return fits and len(message.features) == len(features.NAMES)

    def _adopt(self, facts: RunFacts, learned: Learned, *, is_warm: bool = True) -> None:
        settings = settings_from_toml(facts.settings_toml)
        if not is_warm:
            settings = replace(settings, predictor=replace(settings.predictor, state=""))
        policy = policy_for(settings, facts, learned.policy)
        self._facts, self._settings, self._policy = facts, settings, policy
        self._history, self._counters = learned.history, learned.counters
        self._last_outcome_id = learned.last_outcome_id

    def _resumed(self, message: RunStarted) -> Learned:
        """What was learned up to the checkpoint that the trainer goes on from."""
        state = self._store.load(message.resumed_from)
        if state.facts.run_id != message.run_id:
            raise CheckpointError(f"{message.resumed_from} belongs to run {state.facts.run_id}")
        if state.facts.feature_version != message.feature_version:
            raise CheckpointError(f"{message.resumed_from} has feature version {state.facts.feature_version}")
        return replace(state.learned, history=state.learned.history.resume_at(message.first_step))

    def _decide(
        self, message: Observation, point: DecisionPoint, generation: int, history: History
    ) -> Message:
        facts = self._facts
        decision_input = DecisionInput(
            observation=message,
            point=point,
            generation=generation,
            history=history,
            num_groups=facts.num_groups if facts else len(message.gradient_norms),
            directions=facts.directions if facts else (),
        )
        if self._policy is None:
            return rest(decision_input, reason="the start of this run was not seen", forecast=None)
        if not self._features_fit(message):
            return rest(decision_input, reason="features of another version", forecast=None)
        decision = self._policy.decide(decision_input)
        self._count("proposals" if decision.phase is Phase.PREDICT else "rests")
        return decision

    def _count(self, name: str) -> None:
        # A new dict: the heartbeat thread may be reading the old one.
        self._counters = {**self._counters, name: self._counters.get(name, 0) + 1}


def in_memory_predictor() -> Predictor:
    """A predictor for use inside another process (race, library): its checkpoints are kept in memory."""
    return Predictor(MemoryStore())


def _alert(severity: str, kind: str, text: str, step: int) -> Alert:
    return Alert(node=PREDICTOR, severity=severity, kind=kind, text=text, step=step)


def _version_alerts(message: RunStarted) -> list[Message]:
    if message.feature_version == features.VERSION:
        return []
    text = (
        f"the trainer sends features of version {message.feature_version}, this predictor knows"
        f" {features.VERSION}: it rests; install the same release on both"
    )
    return [_alert("error", "feature_version", text, message.first_step)]


def _state_lost(message: RunStarted, error: CheckpointError) -> Alert:
    text = (
        f"the predictor has no valid state for {message.resumed_from} ({error}): it starts afresh,"
        " rests for a window, and its later decisions differ from those of an unbroken run"
    )
    return _alert("warning", STATE_LOST, text, message.first_step)
