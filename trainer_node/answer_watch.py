"""When waiting for an answer in lockstep is in vain although the predictor lives. Pure.

The question or the answer can be lost: on a server that lost its data, or damaged on the way. Heartbeats
then go on for ever and no decision comes. Three signs end the wait: the predictor gave the question up, it
has been past it for some time, or the server has for some time not held it. Reads no clock and no bus.
"""

from __future__ import annotations

from collections import deque

from common.bus import STREAM_START, EntryId
from common.messages import DeadLetter, Heartbeat


class AnswerWatch:
    """`ask` at each decision point; then `is_in_vain` tells. Times are monotonic seconds."""

    def __init__(self, *, grace_seconds: float) -> None:
        """`grace_seconds`: an answer may be this much later than the sign that there will be none."""
        self._grace_seconds = grace_seconds
        self._asked = (
            STREAM_START  # entry of the history that asks; STREAM_START: not known, nothing is judged
        )
        self._given_up = False
        self._dead: deque[str] = deque(maxlen=64)  # a letter may come before its question is asked here
        self._passed_seconds: float | None = None  # since when the predictor is known to be past it
        self._absent_seconds: float | None = None  # since when the server is known not to hold it

    def ask(self, question: EntryId) -> None:
        """`question`: the newest entry of the history that was handed over when the wait began."""
        if question != self._asked:
            self._asked = question
            self._given_up = str(question) in self._dead
            self._passed_seconds, self._absent_seconds = None, None

    def end(self) -> None:
        """The wait is over, whatever it brought."""
        self._given_up = False

    def note_dead_letter(self, letter: DeadLetter) -> None:
        """The predictor could not read an entry. One that is not the question costs no answer."""
        self._dead.append(letter.entry_id)
        if self._asked == STREAM_START or letter.entry_id == str(self._asked):
            self._given_up = True

    def note_heartbeat(self, heartbeat: Heartbeat, now_seconds: float) -> None:
        """Of the predictor: up to where it has applied the history."""
        values = {metric.name: metric.value for metric in heartbeat.counters}
        generation, sequence = values.get("applied_generation"), values.get("applied_sequence")
        if generation is None or sequence is None or (generation, sequence) < self._asked:
            self._passed_seconds = None  # also after a restart, when it comes back to the question
        elif self._passed_seconds is None:
            self._passed_seconds = now_seconds

    def note_newest(self, newest: EntryId, now_seconds: float) -> None:
        """The newest id that the server ever held in the history, as it says now."""
        if newest >= self._asked:
            self._absent_seconds = None
        elif self._absent_seconds is None:
            self._absent_seconds = now_seconds

    def is_in_vain(self, now_seconds: float) -> bool:
        if self._given_up:
            return True
        since = [s for s in (self._passed_seconds, self._absent_seconds) if s is not None]
        return self._asked != STREAM_START and any(now_seconds - s >= self._grace_seconds for s in since)
