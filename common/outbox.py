"""Background publisher: the trainer hands a message over and goes on training.

`put` assigns the id and returns; encoding, batching and retrying happen in one daemon thread.
Order is kept whatever happens. While the server is away entries wait; above `capacity` the oldest
droppable notes go first, then the oldest observations without a decision point. Decision points and
outcomes wait within `kept_bytes`: above it the oldest decision points go, whose time is long over, and
outcomes when no point is left. Starts, ends, checkpoints and orders are few, and never dropped.
A dropped entry keeps its id, so readers see the gap; everything dropped is counted.
A newer generation on the stream (Fenced) ends publishing for good: this process is the stale one.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from common import codec
from common.bus import Entry
from common.errors import BusError, CodecError, Fenced
from common.messages import Message, Observation, Outcome
from common.publisher import Publisher
from common.streams import STREAMS

_BATCH_ENTRIES = 100  # batch 10 -> 119 k entries/s, 100 -> 168 k (systems.md 1.6)
KEPT_BYTES = 64 << 20  # encoded; a decision point of a usual run is 2 KiB: days of one
_STOP_JOIN_SECONDS = 0.1  # after the deadline; the thread may sit in a dead socket, and is a daemon


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboxCounters:
    queued: int  # waiting or on the way
    published: int
    dropped_notes: int
    dropped_observations: int
    dropped_points: int  # observations at a decision point
    dropped_outcomes: int
    unencodable: int  # refused by the codec: a mistake of ours, `last_error` says which
    retries: int  # failed tries to publish a batch
    fenced: bool
    connected: bool  # the last try succeeded
    last_error: str


@dataclass(frozen=True, slots=True)
class _Waiting:
    order: int  # over all streams: the order of `put`
    envelope: Entry
    message: Message | None  # None: the envelope has its body already


class Outbox:
    """Publishes from a thread. `put`, `flush`, `close` and `counters` may be called from any thread."""

    def __init__(
        self,
        publisher: Publisher,
        *,
        capacity: int,
        kept_bytes: int = KEPT_BYTES,
        on_fenced: Callable[[Fenced], None] | None = None,
    ) -> None:
        """`capacity` in entries, over everything; `kept_bytes` for decision points and outcomes that wait."""
        self._publisher = publisher
        self._capacity, self._kept_bytes = capacity, kept_bytes
        self._on_fenced = on_fenced
        self._changed = threading.Condition()  # guards everything below
        self._order = itertools.count()
        # One queue per class of importance: dropping the oldest of a class costs the same at any length.
        self._kept: deque[_Waiting] = deque()
        self._outcomes: deque[_Waiting] = deque()
        self._points: deque[_Waiting] = deque()
        self._waiting_bytes = 0  # of these two
        self._observations: deque[_Waiting] = deque()
        self._notes: deque[_Waiting] = deque()
        self._queues = (self._kept, self._outcomes, self._points, self._observations, self._notes)
        self._on_the_way = 0
        self._stopped = False
        self._counters = OutboxCounters(
            queued=0,
            published=0,
            dropped_notes=0,
            dropped_observations=0,
            dropped_points=0,
            dropped_outcomes=0,
            unencodable=0,
            retries=0,
            fenced=False,
            connected=False,
            last_error="",
        )
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Hand over; never blocks on the bus. Ignored once fenced or closed."""
        with self._changed:
            if self._stopped:
                return
            self._append(self._publisher.reserve(message), message)
            if self._num_queued() > self._capacity:
                self._drop_oldest()
            while self._waiting_bytes > self._kept_bytes:
                self._drop_oldest_kept()
            self._changed.notify_all()

    @property
    def fenced(self) -> bool:
        return self._counters.fenced

    @property
    def next_sequences(self) -> dict[str, int]:
        """See Publisher.next_sequences."""
        with self._changed:
            return self._publisher.next_sequences

    def counters(self) -> OutboxCounters:
        with self._changed:
            return dataclasses.replace(self._counters, queued=self._num_queued())

    def flush(self, deadline_seconds: float) -> bool:
        """Wait until everything put so far is published; False if that did not happen in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._num_queued(), deadline_seconds)
            return not self._num_queued() and not self._counters.fenced

    def close(self, deadline_seconds: float) -> bool:
        """Flush, then stop the thread. The bus stays open: it is the caller's."""
        flushed = self.flush(deadline_seconds)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(deadline_seconds if flushed else _STOP_JOIN_SECONDS)
        return flushed

    def _queue_for(self, envelope: Entry, message: Message) -> deque[_Waiting]:
        if STREAMS[envelope.stream].droppable:
            return self._notes
        if isinstance(message, Observation):
            return self._observations if message.decision_point is None else self._points
        return self._outcomes if isinstance(message, Outcome) else self._kept

    def _append(self, envelope: Entry, message: Message) -> None:
        queue = self._queue_for(envelope, message)
        waiting = _Waiting(next(self._order), envelope, message)
        if queue is self._points or queue is self._outcomes:
            # Encoded now, a few times a window: only then its size is known.
            entry = self._encoded(waiting)
            if entry is None:
                return
            waiting = _Waiting(waiting.order, entry, None)
            self._waiting_bytes += len(entry.body)
        queue.append(waiting)

    def _num_queued(self) -> int:
        return sum(map(len, self._queues)) + self._on_the_way

    def _drop_oldest(self) -> None:
        if self._notes:
            self._notes.popleft()
            self._count(dropped_notes=self._counters.dropped_notes + 1)
        elif self._observations:
            self._observations.popleft()
            self._count(dropped_observations=self._counters.dropped_observations + 1)

    def _drop_oldest_kept(self) -> None:
        queue = self._points or self._outcomes
        self._waiting_bytes -= len(queue.popleft().envelope.body)
        if queue is self._points:
            self._count(dropped_points=self._counters.dropped_points + 1)
        else:
            self._count(dropped_outcomes=self._counters.dropped_outcomes + 1)

    def _count(self, **changes: int | bool | str) -> None:
        self._counters = dataclasses.replace(self._counters, **changes)  # type: ignore[arg-type]

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._publish(self._entries(batch))
        finally:  # also after a mistake of ours: nobody may wait for a thread that is gone
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def _take(self) -> list[_Waiting]:
        """The next batch in the order of `put`; [] when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._num_queued())
            batch: list[_Waiting] = []
            if self._stopped:  # what is on the way stays counted: it was not published
                return batch
            while len(batch) < _BATCH_ENTRIES:
                queues = [queue for queue in self._queues if queue]
                if not queues:
                    break
                batch.append(min(queues, key=lambda queue: queue[0].order).popleft())
                if batch[-1].message is None:
                    self._waiting_bytes -= len(batch[-1].envelope.body)
            self._on_the_way = len(batch)
            return batch

    def _entries(self, batch: list[_Waiting]) -> list[Entry]:
        entries = []
        for waiting in batch:
            entry = self._encoded(waiting)
            if entry is not None:
                entries.append(entry)
            else:
                with self._changed:
                    self._on_the_way -= 1
                    self._changed.notify_all()
        return entries

    def _encoded(self, waiting: _Waiting) -> Entry | None:
        """None, and counted, for what the codec refuses."""
        if waiting.message is None:
            return waiting.envelope
        try:
            return dataclasses.replace(waiting.envelope, body=codec.encode(waiting.message))
        except CodecError as error:
            with self._changed:
                self._count(unencodable=self._counters.unencodable + 1, last_error=str(error))
            return None

    def _publish(self, entries: list[Entry]) -> None:
        """Try until it works or the outbox stops."""
        self._publisher.backoff.reset()
        while entries and not self._stopped:
            try:
                self._publisher.bus.publish(entries)
            except Fenced as error:
                self._fence(error)
            except BusError as error:
                self._pause(error)
            else:
                with self._changed:
                    self._on_the_way = 0
                    self._count(
                        published=self._counters.published + len(entries), connected=True, last_error=""
                    )
                    self._changed.notify_all()
                return

    def _pause(self, error: BusError) -> None:
        with self._changed:
            self._count(retries=self._counters.retries + 1, connected=False, last_error=str(error))
            self._changed.wait_for(lambda: self._stopped, self._publisher.backoff.next_seconds())

    def _fence(self, error: Fenced) -> None:
        with self._changed:
            self._stopped = True
            self._count(fenced=True, connected=False, last_error=str(error))
            self._changed.notify_all()
        if self._on_fenced is not None:
            self._on_fenced(error)
