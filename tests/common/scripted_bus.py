"""A MemoryBus whose `publish` can be held up or made to fail, for tests of the sending side."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from common.bus import STREAM_START, Entry
from common.errors import BusError
from common.memory_bus import MemoryBus, MemoryServer


class ScriptedBus(MemoryBus):
    """`failures` are raised one per publish, `always` on every one; `gate` holds publishing up."""

    def __init__(self) -> None:
        super().__init__(MemoryServer(), "run")
        self.failures: deque[BusError] = deque()
        self.always: BusError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.tries: list[list[Entry]] = []

    def publish(self, entries: Sequence[Entry]) -> None:
        self.tries.append(list(entries))
        assert self.gate.wait(60)
        if self.always is not None:
            raise self.always
        if self.failures:
            raise self.failures.popleft()
        super().publish(entries)

    def sequences(self, stream: str) -> list[int]:
        found = self.read_after({stream: STREAM_START}, max_count=1_000_000, block_seconds=0)
        return [entry.id.sequence for entry in found]
