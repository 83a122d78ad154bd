"""`publish` for ScriptedTrainer that talks to a predictor over a bus, in lockstep."""

from __future__ import annotations

import random
from collections.abc import Callable

from common import codec
from common.bus import STREAM_START, Bus, Entry
from common.clock import SystemClock
from common.messages import Message, Observation, Phase, PhaseDecision
from common.publisher import Publisher
from common.streams import DECISIONS, TRAINER

DEADLINE_SECONDS = 20.0


class BusTrainer:
    """`publish` for ScriptedTrainer: lockstep over a bus."""

    def __init__(self, bus: Bus, *, generation: int = 1) -> None:
        self.bus = bus
        self._generation = generation
        self._publisher = Publisher(
            bus, writer=TRAINER, generation=generation, clock=SystemClock(), rng=random.Random(0)
        )
        self._read = bus.last_id(DECISIONS)
        self.on_point: Callable[[Observation], None] = lambda observation: None

    def publish(self, message: Message) -> PhaseDecision | None:
        self._publisher.send([self._publisher.prepare(message)], give_up_seconds=1.0)
        if not isinstance(message, Observation) or message.decision_point is None:
            return None
        assert message.phase is Phase.FULL
        self.on_point(message)
        wanted = (self._generation, message.step, message.attempt)
        while True:
            entries = self.bus.read_after(
                {DECISIONS: self._read}, max_count=1, block_seconds=DEADLINE_SECONDS
            )
            assert entries, f"no decision for step {message.step}"
            self._read = entries[0].id
            decision = codec.decode_entry(entries[0])
            assert isinstance(decision, PhaseDecision)
            if (decision.base_generation, decision.base_step, decision.base_attempt) == wanted:
                return decision


def entries_on(bus: Bus, stream: str) -> list[Entry]:
    return bus.read_after({stream: STREAM_START}, max_count=100_000, block_seconds=0.0)
