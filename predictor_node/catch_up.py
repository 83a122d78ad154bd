"""What a predictor does that falls behind for good: pass over observations, and say so.

Owns the look at how far behind it is. A long absence is worked off entry by entry while that gains on the
trainer: nothing is lost then. Where more comes in than half of what is handled, working it off would answer
decision points that expired long ago, until the server drops unread entries anyway: then all observations
but the newest KEPT_ENTRIES are passed over. Starts, outcomes, checkpoints and the end of a run never are; nor
is anything in lockstep, where the trainer waits for each answer. Counts entries, reads no clock, decides no
phase.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from common.bus import EntryId
from common.messages import Message, Observation

MOST_BEHIND_ENTRIES = 4096  # a few seconds of handling them, checkpoints of the world model included
KEPT_ENTRIES = 1024  # two histories (history.LIMIT_STEPS): whole windows to decide from
LOOK_ENTRIES = 256  # between two questions to the server, 0.2 ms each


class Handles(Protocol):
    """What this needs of node.Predictor."""

    @property
    def may_pass_over(self) -> bool: ...
    def handle(self, message: Message, entry_id: EntryId) -> list[Message]: ...
    def pass_over(self, entry_id: EntryId) -> None: ...


class CatchUp:
    """Stands before a predictor; `handle` as there."""

    def __init__(self, predictor: Handles, newest: Callable[[], EntryId]) -> None:
        """`newest` asks the server for the newest id of the history; it may raise what a bus raises."""
        self._predictor, self._newest = predictor, newest
        self._look_in = 0  # entries until the next look
        self._known: EntryId | None = None  # the newest at the last look
        self._pass_up_to: EntryId | None = None

    def handle(self, message: Message, entry_id: EntryId) -> list[Message]:
        if isinstance(message, Observation) and self._passes_over(entry_id):
            self._predictor.pass_over(entry_id)
            return []
        return self._predictor.handle(message, entry_id)

    def _passes_over(self, entry_id: EntryId) -> bool:
        if not self._predictor.may_pass_over:
            return False
        if self._pass_up_to is not None and entry_id <= self._pass_up_to:
            return True
        was_passing = self._pass_up_to is not None
        self._look_in -= 1
        if self._look_in > 0 and not was_passing:
            return False
        newest = self._newest()
        self._pass_up_to = pass_up_to(entry_id, newest, self._known, is_passing=was_passing)
        self._known, self._look_in = newest, LOOK_ENTRIES
        return self._pass_up_to is not None and entry_id <= self._pass_up_to


def pass_up_to(
    at: EntryId, newest: EntryId, newest_before: EntryId | None, *, is_passing: bool
) -> EntryId | None:
    """The last id whose observations are to be passed over by a predictor that stands at `at`.

    None = handle them. `newest_before` was the newest LOOK_ENTRIES entries ago, None = never looked.
    Of an older generation only the newer one's length is known: it is not less behind than that.
    """
    behind_entries = newest.sequence - (at.sequence if at.generation == newest.generation else 0)
    if behind_entries <= MOST_BEHIND_ENTRIES:
        return None
    if not is_passing:
        if newest_before is None:
            return None
        came = newest.sequence - (
            newest_before.sequence if newest_before.generation == newest.generation else 0
        )
        if came <= LOOK_ENTRIES // 2:
            return None
    return EntryId(newest.generation, newest.sequence - KEPT_ENTRIES)
