"""The controls of one run as its messages tell them, in bounded memory. Pure; decides nothing.

Two witnesses. How rate, batch and context stand at a step is the trainer's word (features log2_rate_factor,
log2_batch_factor, context_share), so it holds for a resumed run whose decisions nobody has any more. What was
tried, why, and what became of it is the join of decisions and outcomes (control_trials.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from common import features
from common import messages as m
from common.control_rules import NEUTRAL
from common.streams import DECISIONS, STREAMS
from monitor_node import control_trials
from monitor_node.control_trials import (
    MOST_LOG2,
    Asked,
    Event,
    Factors,
    Kept,
    Key,
    Settled,
    Trial,
    Undone,
    append_event,
    asked_by,
    asked_under,
    change_words,
    fold,
)
from monitor_node.series import Curve, append_bounded

# Outcomes and restores; of older ones the trials stay, and what is in force. So far may decisions be behind:
# where old history was trimmed away, a monitor that starts late has read hundreds of outcomes before them.
MAX_EVENTS = 1024
MAX_TRIALS = 400  # the newest; jumps, which come by the hundred, drive none of them out
MAX_KEPT = 120  # changes kept by events that are gone; a restore behind all of them has the trainer's word
MAX_CHANGES = 240
MAX_ASKED = 4096  # decisions that ask for controls: few, and a monitor that starts late reads them far ahead
MAX_OTHERS = STREAMS[DECISIONS].fuse_entries  # all that can be on the stream
MAX_MISSED = 512
_MOST_LOG10 = 18.0

_RATE = features.INDEX["log2_rate_factor"]
_BATCH = features.INDEX["log2_batch_factor"]
_CONTEXT = features.INDEX["context_share"]
_HAS_NOISE = features.INDEX["has_noise_scale"]
_NOISE = features.INDEX["log10_noise_scale_over_batch"]
_PROGRESS = features.INDEX["progress"]

_Told = TypeVar("_Told")
# First step, rate factor, batch factor, context / configured (None = not told).
Change = tuple[int, float, float, float | None]


@dataclass(kw_only=True)
class ControlBook:
    noise: Curve = field(default_factory=lambda: Curve(max_buckets=240))  # (step, noise scale / batch)
    changes: list[Change] = field(default_factory=list)  # by step: how the controls stand from there on
    done_share: float | None = None  # of the run's nominal steps, by the trainer's clock
    _generation: int = 0  # of the trainer; 0 = not known
    _asked: dict[Key, Asked] = field(default_factory=dict)
    _others: dict[Key, None] = field(default_factory=dict)  # decisions that leave the controls as they stand
    _missed: dict[Key, m.Outcome] = field(default_factory=dict)  # points whose decision was not there in time
    _was_asked: bool = False  # for any value that is not as configured
    _kept_before: list[Kept] = field(default_factory=list)  # of events that are gone
    _events: list[Event] = field(default_factory=list)
    _settled: set[Key] = field(default_factory=set)  # those of these events
    _trials_before: list[Trial] = field(default_factory=list)  # of events that are gone
    _folded: tuple[list[Kept], list[Trial]] | None = None  # of these events

    def started(self, generation: int) -> None:
        self._generation = generation

    def observed(self, step: int, values: Sequence[float]) -> None:
        """`values`: the features of a step, in the order of common.features."""
        self.done_share = min(1.0, max(0.0, values[_PROGRESS])) if math.isfinite(values[_PROGRESS]) else None
        if values[_HAS_NOISE] > 0.5 and abs(values[_NOISE]) < _MOST_LOG10:
            self.noise.add(step, 10.0 ** values[_NOISE])
        log2_rate, log2_batch, share = values[_RATE], values[_BATCH], values[_CONTEXT]
        if not (abs(log2_rate) <= MOST_LOG2 and abs(log2_batch) <= MOST_LOG2):
            return
        stand = (_factor(log2_rate), _factor(log2_batch), share if 0.0 < share <= 1.0 else None)
        if not self.changes or self.changes[-1][1:] != stand:
            append_bounded(self.changes, (step, *stand), MAX_CHANGES)

    def decided(self, decision: m.PhaseDecision) -> None:
        key, asked = (decision.base_generation, decision.decision_id), asked_by(decision)
        if asked is None:
            if self._missed.pop(key, None) is None and not self._dropped(key):
                _remember(self._others, key, None, MAX_OTHERS)
            return
        self._was_asked |= asked.controls != NEUTRAL
        _remember(self._asked, key, asked, MAX_ASKED)
        self._folded = None
        missed = self._missed.pop(key, None) or self._missed.pop((0, key[1]), None)
        if missed is not None:
            self._settle(key, missed)

    def settled(self, outcome: m.Outcome) -> None:
        """An outcome that is told again changes nothing."""
        key = (self._generation, outcome.decision_id)
        if key in self._others:
            del self._others[key]
            return
        if key in self._settled:
            return
        if outcome.verdict in (m.Verdict.REST, m.Verdict.MISSING) and asked_under(key, self._asked) is None:
            _remember(self._missed, key, outcome, MAX_MISSED)  # nobody may ever have answered
            return
        self._settle(key, outcome)

    def _settle(self, key: Key, outcome: m.Outcome) -> None:
        self._log(Settled(key=key, outcome=outcome, factors=self._factors_at(outcome.base_step)))

    def cut_above(self, step: int) -> None:
        """Steps above this one were undone. What was tried stays, as proposals do."""
        self.noise.cut_above(step)
        while self.changes and self.changes[-1][0] > step:
            self.changes.pop()
        if self._kept_before or self._events:
            self._log(Undone(step=step))

    @property
    def is_used(self) -> bool:
        """Whether any control was ever proposed, or stands where the settings do not have it."""
        return self._was_asked or self.has_moved

    @property
    def has_moved(self) -> bool:
        """Whether any stands, or stood at a step that is kept, where the settings do not have it."""
        told = any(change[1:3] != (1.0, 1.0) or change[3] not in (None, 1.0) for change in self.changes)
        return told or self.in_force != NEUTRAL

    @property
    def trials(self) -> list[Trial]:
        """The newest MAX_TRIALS with a verdict, oldest first."""
        return [*self._trials_before, *self._fold()[1]][-MAX_TRIALS:]

    @property
    def in_force(self) -> m.Controls:
        """What is on trial included, where the trainer tells of it."""
        return control_trials.standing(self._fold()[0], self._factors_at(None))

    @property
    def context_share(self) -> float | None:
        """Context in force / configured; None = not told."""
        return self.changes[-1][3] if self.changes else None

    def on_trial(self, step: int, probation_steps: int) -> Asked | None:
        """The newest decision without a verdict that this step can be the trial of."""
        if not self._was_asked:
            return None
        for key, asked in reversed(self._asked.items()):
            if key in self._settled or (self._generation and key[0] != self._generation):
                continue
            if 0 < step - asked.base_step <= probation_steps:
                return asked
        return None

    def change_of(self, asked: Asked) -> str:
        """In words: against what was kept so far."""
        return change_words(control_trials.standing(self._fold()[0], None), asked.controls)

    def _dropped(self, key: Key) -> bool:
        """Whether an outcome was kept that turns out to be that of no trial: it goes."""
        if key not in self._settled:
            return False
        events, self._events = self._events, []
        for event in events:
            if not (isinstance(event, Settled) and event.key == key):
                append_event(self._events, event)
        self._settled.discard(key)
        self._folded = None
        return True

    def _factors_at(self, step: int | None) -> Factors | None:
        """By the trainer's word; None = the newest step."""
        told = [change for change in self.changes if step is None or change[0] <= step]
        return told[-1][1:3] if told else None

    def _log(self, event: Event) -> None:
        append_event(self._events, event)
        if isinstance(event, Settled):
            self._settled.add(event.key)
        self._folded = None
        if len(self._events) > MAX_EVENTS:
            gone = self._events[: MAX_EVENTS // 2]
            kept, trials = fold(self._kept_before, gone, self._asked)
            self._kept_before = kept[-MAX_KEPT:]
            self._trials_before = [*self._trials_before, *trials][-MAX_TRIALS:]
            del self._events[: len(gone)]
            for key in (event.key for event in gone if isinstance(event, Settled)):
                self._asked.pop(key, None)
                self._settled.discard(key)

    def _fold(self) -> tuple[list[Kept], list[Trial]]:
        if self._folded is None:
            self._folded = fold(self._kept_before, self._events, self._asked)
        return self._folded


def _factor(log2: float) -> float:
    """What the way through a logarithm added to a factor is taken off again."""
    return float(f"{2.0**log2:.9g}")


def _remember(told: dict[Key, _Told], key: Key, value: _Told, most: int) -> None:
    """The oldest goes beyond `most`."""
    told[key] = value
    if len(told) > most:
        del told[next(iter(told))]
