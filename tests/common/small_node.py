"""What the tests of the event loop share: a node small enough to check, and a bus that fails."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from common import codec
from common.bus import STREAM_START, Bus, Entry, EntryId
from common.clock import FakeClock
from common.errors import BusUnavailable
from common.messages import CheckpointRequest, DeadLetter, Message, RunEnded
from common.publisher import Publisher
from common.service import Service
from common.streams import HISTORY, MONITOR, ORDERS, notes_of

RUN = "run"


class FaultyBus:
    """Passes calls on; the n-th next call fails before or after it took effect."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.faults: list[tuple[int, str]] = []  # (calls until then, "before" or "after")
        self.error: type[Exception] = BusUnavailable

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._bus, name)

        def call(*arguments: Any, **named: Any) -> Any:
            due = [when for left, when in self.faults if left == 0]
            self.faults = [(left - 1, when) for left, when in self.faults if left > 0]
            if "before" in due:
                raise self.error(f"{name} did not reach the server")
            result = method(*arguments, **named)
            if "after" in due:
                raise self.error(f"the reply to {name} was lost")
            return result

        return call


class Node:
    """A node whose state is the list of steps that it heard of; it asks for a checkpoint at each."""

    def __init__(self, bus: Any, *, generation: int = 1, **options: Any) -> None:
        self.clock = FakeClock(100.0)
        self.steps: list[int] = []
        self.failing: dict[int, int] = {}  # step -> how often its handler fails
        self.errors: list[str] = []
        self.gaps: list[tuple[str, str]] = []
        self.publisher = Publisher(
            bus, writer=MONITOR, generation=generation, clock=self.clock, rng=random.Random(0)
        )
        arguments: dict[str, Any] = {
            "node": MONITOR,
            "stream": HISTORY,
            "group": "test",
            "handlers": {RunEnded: self.on_run_ended},
            "publisher": self.publisher,
            "clock": self.clock,
            "on_error": lambda entry, error: self.errors.append(f"{entry.id} {error}"),
            "on_gap": lambda expected, got: self.gaps.append((str(expected), str(got))),
            "rng": random.Random(0),
        }
        self.service = Service(bus, **{**arguments, **options})

    def on_run_ended(self, message: RunEnded, entry: Entry) -> Iterable[Message]:
        if self.failing.get(message.step, 0):
            self.failing[message.step] -= 1
            raise ValueError(f"cannot stand\nstep {message.step}")
        self.steps.append(message.step)
        yield CheckpointRequest(request_id=str(message.step), emergency=False, reason="")

    def settle(self, rounds: int = 40) -> None:
        """Run until several rounds in a row brought nothing."""
        idle = 0
        for _ in range(rounds):
            idle = 0 if self.service.run_once(0.0) else idle + 1
            if idle > 5 and self.service.caught_up:
                return


def entry_of(step: int, *, generation: int = 1, sequence: int | None = None) -> Entry:
    message = RunEnded(step=step, reason="test")
    return Entry(HISTORY, EntryId(generation, sequence or step), "RunEnded", codec.encode(message), 0.0)


def publish(bus: Bus, *steps: int, generation: int = 1) -> None:
    bus.publish([entry_of(step, generation=generation) for step in steps])


def published(bus: Bus, stream: str) -> list[Message]:
    entries = bus.read_after({stream: STREAM_START}, max_count=1000, block_seconds=0.0)
    return [codec.decode_entry(entry) for entry in entries]


def requested(bus: Bus) -> list[int]:
    messages = published(bus, ORDERS)
    return [int(message.request_id) for message in messages if isinstance(message, CheckpointRequest)]


def dead_letters(bus: Bus) -> list[DeadLetter]:
    return [message for message in published(bus, notes_of(MONITOR)) if isinstance(message, DeadLetter)]


def pending(bus: Bus) -> Sequence[Any]:
    return bus.read_group(
        HISTORY, group="test", consumer=MONITOR, max_count=100, block_seconds=0.0, pending=True
    )
