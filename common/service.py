"""The one event loop of a node: read, handle, publish replies, acknowledge.

Every entry of one stream has its effect exactly once and in order: `applied`, the last id whose
effect is in the node's state, is saved by the node with that state and given back to `start`.
What lies between `applied` and a delivered entry is read from the stream first; what the stream
no longer has is reported as a gap.

A handler that fails is tried again at once, since later entries may need its effect; after
`max_deliveries` tries the entry becomes a DeadLetter and the next one follows. One that kills the
process counts too, by the deliveries of the group; a damaged entry is not tried at all. Never
retries a handler that succeeded: its replies wait here until the bus takes them.
Not thread-safe. Reading order: common/group_reader.py.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import codec
from common.bus import DAMAGED, STREAM_START, Bus, Delivery, Entry, EntryId, GroupLost
from common.clock import Clock
from common.errors import BusFull, BusUnavailable, CodecError
from common.group_reader import GroupReader
from common.messages import DeadLetter, Message
from common.publisher import Backoff, Publisher
from common.streams import STREAMS, stream_of

Handler = Callable[[Any, Entry], Iterable[Message]]  # (message of the registered type, its entry)

BLOCK_SECONDS = 0.5  # how late `run` notices `stop`
LONGEST_PAUSE_SECONDS = 1.0
RETRY_PAUSE_SECONDS = 0.005  # before the second try; doubles
DEAD_BODY_BYTES = 64 * 1024  # of the body kept in a DeadLetter, which has to fit into an entry itself
ERROR_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceCounters:
    handled: int = 0  # entries whose handler returned
    ignored: int = 0  # of kinds without a handler
    skipped: int = 0  # delivered again after they were applied
    failed_tries: int = 0
    dead_letters: int = 0
    gaps: int = 0
    disconnects: int = 0
    groups_recreated: int = 0


class Service:
    """See the module's docstring. `start`, then `run`, or `run_once` in a loop of one's own."""

    def __init__(
        self,
        bus: Bus,
        *,
        node: str,
        stream: str,
        group: str,
        handlers: Mapping[type, Handler],
        publisher: Publisher,
        clock: Clock,
        max_deliveries: int = 5,
        claim_idle_seconds: float = 30.0,
        on_error: Callable[[Entry, Exception], None] = lambda entry, error: None,
        on_gap: Callable[[EntryId, EntryId], None] = lambda expected, got: None,
        put_note: Callable[[Message], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`on_error` hears of every failed try, `on_gap` of (first missing id, id read instead).

        `put_note` takes what belongs on the notes stream, e.g. `Outbox.put`: a stream has one
        writer, so a node whose heartbeats go through an outbox sends all notes there. Without it
        they go through `publisher`. `rng` only spreads reconnects.
        """
        self._bus = bus
        self._node = node
        self._stream = stream
        self._handlers = {kind.__name__: handler for kind, handler in handlers.items()}
        self._publisher = publisher
        self._clock = clock
        self._max_deliveries = max_deliveries
        self._on_error = on_error
        self._on_gap = on_gap
        self._put_note = put_note
        self._reader = GroupReader(
            bus, stream=stream, group=group, consumer=node, clock=clock, claim_idle_seconds=claim_idle_seconds
        )
        self._backoff = Backoff(rng or random.Random(), longest_seconds=LONGEST_PAUSE_SECONDS)
        self._stop = threading.Event()
        self._applied = STREAM_START
        self._unsent: list[Entry] = []
        self._counters = ServiceCounters()

    @property
    def applied(self) -> EntryId:
        """Last id whose effect is in the node's state. Inside a handler: the one before."""
        return self._applied

    @property
    def replies_waiting(self) -> int:
        """Replies that the bus has not taken. Always 0 inside a handler.

        Outside of one, state saved while this is above 0 loses them: the restored node counts
        their entries as applied and does not answer again.
        """
        return len(self._unsent)

    @property
    def caught_up(self) -> bool:
        """Everything that was there at the (re)start has been read."""
        return self._reader.caught_up

    @property
    def counters(self) -> ServiceCounters:
        return self._counters

    def start(self, after: EntryId) -> None:
        """Begin behind `after`. Does not touch the bus: it may be away when a node starts."""
        self._applied = after
        self._reader.recover()

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop`. Raises Fenced and BusRefused; outlives everything else."""
        self._stop = stop
        while not stop.is_set():
            self.run_once(BLOCK_SECONDS)

    def run_once(self, block_seconds: float) -> int:
        """Wait for entries for at most `block_seconds`, handle a batch; how many were handled.

        When the bus is away it pauses (0 to 1 s, by the clock) and returns.
        """
        handled = self._counters.handled
        try:
            self._step(block_seconds)
        except GroupLost:
            self._count(groups_recreated=1)
            self._reader.recover()
        except (BusUnavailable, BusFull):
            self._count(disconnects=1)
            self._reader.recover()
            self._clock.sleep(self._backoff.next_seconds())
        else:
            self._backoff.reset()
        return self._counters.handled - handled

    def drain(self) -> int:
        """Handle what is on the stream now, without waiting; how many were handled.

        For a graceful end: gives up quietly when the bus is away.
        """
        self._stop = threading.Event()
        handled = self._counters.handled
        try:
            last_id = self._bus.last_id(self._stream)
            while self._applied < last_id and self._step(0.0):
                pass
            self._send_unsent()
        except (BusUnavailable, BusFull, GroupLost):
            self._reader.recover()
        return self._counters.handled - handled

    def trim_applied(self, below: EntryId) -> None:
        """Drop entries below this id, but none that is not applied. Raises BusUnavailable."""
        self._bus.trim(self._stream, below=min(below, self._applied))

    def _step(self, block_seconds: float) -> bool:
        """One batch; False when caught up and there was none."""
        self._send_unsent()
        deliveries = self._reader.next(self._applied, block_seconds)
        done: list[EntryId] = []
        previous: EntryId | None = None
        for delivery in deliveries:
            if self._stop.is_set():
                self._reader.put_back()
                break
            self._take(delivery, previous)
            previous = delivery.entry.id
            done.append(previous)
        self._reader.ack(done)
        return bool(deliveries) or not self._reader.caught_up

    def _take(self, delivery: Delivery, previous: EntryId | None) -> None:
        """`previous`: the one before in its batch. The server gave the two as neighbours, so what is missing
        between them need not be looked for. Left-overs come one by one and have none.
        """
        arrived = delivery.entry.id
        while self._applied < arrived and self._applied != previous and not _follows(self._applied, arrived):
            between = [entry for entry in self._reader.behind(self._applied) if entry.id < arrived]
            if not between:
                break
            for entry in between:
                self._apply(Delivery(entry, 1))
        if self._applied < arrived:
            self._apply(delivery)
        else:
            self._count(skipped=1)

    def _apply(self, delivery: Delivery) -> None:
        """The effect of the entry that comes next in the stream."""
        entry = delivery.entry
        expected = _next_expected(self._applied, entry.id)
        if expected < entry.id:
            self._count(gaps=1)
            self._on_gap(expected, entry.id)
        handler = self._handlers.get(entry.kind)
        replies: Sequence[Message] = ()
        if entry.kind == DAMAGED:
            replies = [self._refuse(entry)]
        elif handler is None:  # a newer node may speak more
            self._count(ignored=1)
        else:
            replies = self._handle(handler, delivery)
        self._applied = entry.id  # before sending: from here on a retry must not handle it again
        for reply in replies:
            self._keep(reply, entry)
        self._send_unsent()

    def _handle(self, handler: Handler, delivery: Delivery) -> Sequence[Message]:
        """Replies of the handler, or a DeadLetter."""
        entry, tries = delivery.entry, delivery.deliveries
        failure: Exception = RuntimeError("delivered again and again, never acknowledged")
        while tries <= self._max_deliveries:
            try:
                replies = list(handler(codec.decode_entry(entry), entry))
                self._count(handled=1)
                return replies
            except Exception as error:  # whatever a handler does, the next entry follows
                self._count(failed_tries=1)
                self._on_error(entry, error)
                failure = error
            if isinstance(failure, CodecError):  # the same bytes fail the same way
                break
            if tries < self._max_deliveries:
                self._clock.sleep(RETRY_PAUSE_SECONDS * 2 ** (tries - 1))
            tries += 1
        self._count(dead_letters=1)
        return [_dead_letter(entry, min(tries, self._max_deliveries), failure)]

    def _refuse(self, entry: Entry) -> DeadLetter:
        error = CodecError("its checksum does not fit: damaged, or written by something else than a node")
        self._count(failed_tries=1, dead_letters=1)
        self._on_error(entry, error)
        return _dead_letter(entry, 1, error)

    def _keep(self, reply: Message, entry: Entry) -> None:
        """Hold a reply until the bus has taken it."""
        if self._put_note is not None and STREAMS[stream_of(reply, self._node)].droppable:
            self._put_note(reply)
            return
        try:
            self._unsent.append(self._publisher.prepare(reply))
        except CodecError as error:
            self._count(dead_letters=1)
            self._on_error(entry, error)
            self._keep(_dead_letter(entry, 1, error), entry)

    def _send_unsent(self) -> None:
        if self._unsent:
            self._publisher.send(self._unsent, give_up_seconds=0.0)  # the pauses are ours
            self._unsent = []

    def _count(self, **more: int) -> None:
        changes = {name: getattr(self._counters, name) + number for name, number in more.items()}
        self._counters = dataclasses.replace(self._counters, **changes)


def _follows(applied: EntryId, arrived: EntryId) -> bool:
    """Nothing can be between the two. Unknown across generations: the older one's end is not known."""
    return arrived == EntryId(applied.generation, applied.sequence + 1)


def _next_expected(applied: EntryId, arrived: EntryId) -> EntryId:
    """The first id that should come behind `applied` in the generation of `arrived`."""
    if applied.generation == arrived.generation:
        return EntryId(applied.generation, applied.sequence + 1)
    return EntryId(arrived.generation, 1)


def _dead_letter(entry: Entry, deliveries: int, failure: Exception) -> DeadLetter:
    text = " ".join(f"{type(failure).__name__}: {failure}".split())
    return DeadLetter(
        stream=entry.stream,
        entry_id=str(entry.id),
        kind=entry.kind,
        deliveries=deliveries,
        error=text[:ERROR_CHARACTERS],
        body=entry.body[:DEAD_BODY_BYTES],
    )
