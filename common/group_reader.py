"""In which order a node takes entries from its group on one stream. Handles none of them.

    own unacknowledged (one by one), claimed from a dead consumer (one by one), new ones, tail

Own ones come first after every (re)connect: a lost reply leaves entries there (systems.md,
finding 4). Left-overs are read one by one because reading raises their delivery count: when a
poisoned entry kills the process again and again, its neighbours must not be counted out with it.
The tail is what an earlier process acknowledged after its last checkpoint: no group gives it out.
Creates the group when it is missing. Remembers nothing that a restart would have to restore.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.bus import Bus, Delivery, Entry, EntryId
from common.clock import Clock

BATCH_ENTRIES = 32


class GroupReader:
    """Every method may raise BusUnavailable, BusRefused, BusFull or GroupLost; then `recover`."""

    def __init__(
        self, bus: Bus, *, stream: str, group: str, consumer: str, clock: Clock, claim_idle_seconds: float
    ) -> None:
        self._bus = bus
        self._stream = stream
        self._group = group
        self._consumer = consumer
        self._clock = clock
        self._claim_idle_seconds = claim_idle_seconds
        self.recover()

    def recover(self) -> None:
        """Begin again as after a start: the server may be a new, empty one."""
        self._group_ready = False
        self._pending_left = True
        self._tail_left = True
        self._next_claim_seconds = self._clock.monotonic()

    @property
    def caught_up(self) -> bool:
        """All that was there at the (re)start has been given out."""
        return not self._tail_left

    def next(self, applied: EntryId, block_seconds: float) -> list[Delivery]:
        """The next entries, in the order of their ids; waits only when caught up.

        Ids at or below `applied` occur: they want an acknowledgement and nothing else.
        """
        if not self._group_ready:
            self._bus.ensure_group(self._stream, self._group, after=applied)
            self._group_ready = True
        if self._pending_left:
            if own := self._read(max_count=1, block_seconds=0.0, pending=True):
                return own
            self._pending_left = False
        if claimed := self._claim_when_due():
            return claimed
        fresh = self._read(
            max_count=BATCH_ENTRIES, block_seconds=0.0 if self._tail_left else block_seconds, pending=False
        )
        if fresh or not self._tail_left:
            return fresh
        tail = self.behind(applied)
        self._tail_left = bool(tail)
        return [Delivery(entry, 1) for entry in tail]

    def behind(self, applied: EntryId) -> list[Entry]:
        """What the stream still has right behind `applied`, whoever it was given to."""
        return self._bus.read_after({self._stream: applied}, max_count=BATCH_ENTRIES, block_seconds=0.0)

    def ack(self, ids: Sequence[EntryId]) -> None:
        if ids:
            self._bus.ack(self._stream, self._group, ids)

    def put_back(self) -> None:
        """Not all that `next` gave was acknowledged: give it out again."""
        self._pending_left = True

    def _read(self, *, max_count: int, block_seconds: float, pending: bool) -> list[Delivery]:
        return self._bus.read_group(
            self._stream,
            group=self._group,
            consumer=self._consumer,
            max_count=max_count,
            block_seconds=block_seconds,
            pending=pending,
        )

    def _claim_when_due(self) -> list[Delivery]:
        if self._clock.monotonic() < self._next_claim_seconds:
            return []
        claimed = self._bus.claim(
            self._stream,
            group=self._group,
            consumer=self._consumer,
            idle_seconds=self._claim_idle_seconds,
            max_count=1,
        )
        if not claimed:
            self._next_claim_seconds = self._clock.monotonic() + self._claim_idle_seconds / 2
        return claimed
