"""A predictor that dies at chosen moments of its work, and is started again until it has read everything.

Owns a bus and a state store that stop the process dead (an exception that nothing catches, as kill -9 leaves
no time for anything) before or after their n-th effect on the world: reading, publishing a decision, saving
a state, acknowledging. Between two effects there is nothing that a crash could lose, so these are all the
points there are. Each life is the real predictor_node.serve; the history is on the bus before the first.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common import codec
from common.bus import Delivery, Entry, EntryId
from common.clock import FakeClock
from common.log import NodeLog
from common.memory_bus import MemoryBus, MemoryServer
from common.messages import Alert, Message, PhaseDecision
from common.streams import DECISIONS, HISTORY, PREDICTOR, notes_of
from predictor_node.serve import Surroundings, serve
from predictor_node.state import SavedState, StateStore, files_of
from tests.predictor.bus_trainer import entries_on
from tests.predictor.scripted import RUN_ID

T = TypeVar("T")
Key = tuple[int, str]  # (trainer generation, decision id)


class Died(BaseException):
    """kill -9: no handler, no retry and no clean-up of the node may catch it."""


@dataclass
class Fuse:
    """Burns one moment before and one after every effect; the process dies when it is through."""

    moments_left: int

    def around(self, effect: Callable[[], T]) -> T:
        self.burn()
        result = effect()
        self.burn()
        return result

    def burn(self) -> None:
        self.moments_left -= 1
        if self.moments_left == 0:
            raise Died


class DyingBus(MemoryBus):
    """Also gives out again, before each batch, the last `repeated` entries that it gave out before."""

    def __init__(self, server: MemoryServer, fuse: Fuse, repeated: int = 0) -> None:
        super().__init__(server, RUN_ID)
        self._fuse, self._repeated = fuse, repeated
        self._given: list[Delivery] = []

    def publish(self, entries: Sequence[Entry]) -> None:
        if entries[0].stream == DECISIONS:  # heartbeats come from another thread, when they like
            self._fuse.around(lambda: super(DyingBus, self).publish(entries))
        else:
            super().publish(entries)

    def ack(self, stream: str, group: str, ids: Sequence[EntryId]) -> None:
        self._fuse.around(lambda: super(DyingBus, self).ack(stream, group, ids))

    def read_group(self, stream: str, **options: Any) -> list[Delivery]:
        fresh = self._fuse.around(lambda: super(DyingBus, self).read_group(stream, **options))
        again = self._given[len(self._given) - self._repeated :] if fresh else []
        self._given = [*self._given, *fresh][-32:]
        return [*again, *fresh]


class DyingStore:
    """A store whose `save` may be the last thing that a process did, or almost did."""

    def __init__(self, store: StateStore, fuse: Fuse) -> None:
        self._store, self._fuse = store, fuse
        self.stop = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def save(self, state: SavedState, *, keep: int) -> None:
        self._fuse.around(lambda: self._store.save(state, keep=keep))

    def remember_generation(self, generation: int) -> None:
        self._store.remember_generation(generation)
        self.stop.set()  # handle what is there, then end


@dataclass
class Lives:
    """What all lives of a predictor together have left behind."""

    server: MemoryServer
    store: StateStore
    num_lives: int = 0
    events: list[str] = field(default_factory=list)  # lines of the log

    def bodies(self) -> dict[Key, set[bytes]]:
        """Every answer that was ever given to a decision point; more than one = they differ."""
        found: dict[Key, set[bytes]] = {}
        for entry in entries_on(self._bus, DECISIONS):
            decision = codec.decode_entry(entry)
            assert isinstance(decision, PhaseDecision)
            found.setdefault((decision.base_generation, decision.decision_id), set()).add(entry.body)
        return found

    def alerts(self) -> list[Alert]:
        notes = [codec.decode_entry(entry) for entry in entries_on(self._bus, notes_of(PREDICTOR))]
        return [note for note in notes if isinstance(note, Alert)]

    @property
    def _bus(self) -> MemoryBus:
        return MemoryBus(self.server, RUN_ID)


def server_with(history: Sequence[tuple[EntryId, Message]]) -> MemoryServer:
    server = MemoryServer()
    MemoryBus(server, RUN_ID).publish(
        [Entry(HISTORY, id_, type(m).__name__, codec.encode(m), 0.0) for id_, m in history]
    )
    return server


def live_through(
    server: MemoryServer,
    store: StateStore,
    deaths: Sequence[int],
    *,
    repeated: int = 0,
    between: Callable[[int], object] = lambda life: None,
) -> Lives:
    """Lives that end after so many moments each, and one that reads to the end; `between` follows a death."""
    lives = Lives(server, store)
    for moments in [*deaths, 1 << 60]:
        lives.num_lives += 1
        fuse = Fuse(moments)
        try:
            _live(DyingBus(server, fuse, repeated), DyingStore(store, fuse), lives)
        except Died:
            between(lives.num_lives)
            continue
        break
    return lives


def _live(bus: DyingBus, store: DyingStore, lives: Lives) -> None:
    written = io.StringIO()
    around = Surroundings(
        clock=FakeClock(),
        rng=random.Random(0),
        log=NodeLog(PREDICTOR, RUN_ID, written),
        heartbeat_seconds=3600.0,
    )
    try:
        serve(bus, RUN_ID, store, store.stop, around)
    finally:
        lives.events += written.getvalue().splitlines()


def digest_of(state: SavedState) -> str:
    """Of all that later decisions depend on, and of the position."""
    digest = hashlib.sha256()
    for name, content in sorted(files_of(state).items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
