"""The predictor's process over a bus: the same bytes as the pure core, whatever dies in between."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from common import codec
from common.bus import STREAM_START, Bus, EntryId
from common.clock import FakeClock, SystemClock
from common.errors import BusUnavailable, Fenced
from common.log import NodeLog
from common.memory_bus import MemoryBus, MemoryServer
from common.messages import Alert, Heartbeat, Observation, PhaseDecision
from common.publisher import Publisher
from common.streams import DECISIONS, HISTORY, PREDICTOR, TRAINER, notes_of
from predictor_node.node import Predictor
from predictor_node.replay import replay
from predictor_node.serve import OPEN_SECONDS, Surroundings, serve
from predictor_node.state import MemoryStore, StateStore
from tests.predictor.bus_trainer import DEADLINE_SECONDS, BusTrainer, entries_on
from tests.predictor.scripted import RUN_ID, Log, ScriptedTrainer, small_settings


def surroundings(**changes: Any) -> Surroundings:
    defaults = {
        "clock": SystemClock(),
        "rng": random.Random(0),
        "log": NodeLog(PREDICTOR, RUN_ID, io.StringIO()),
        "heartbeat_seconds": 0.05,
    }
    return Surroundings(**{**defaults, **changes})


@dataclass
class Served:
    """A predictor in a thread."""

    bus: Bus
    store: StateStore
    around: Surroundings = field(default_factory=surroundings)
    stop: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            serve(self.bus, RUN_ID, self.store, self.stop, self.around)
        except Exception as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(DEADLINE_SECONDS)
        assert not self.thread.is_alive()

    def end(self) -> None:
        self.stop.set()
        self.join()


@contextmanager
def served(bus: Bus, store: StateStore, **changes: Any) -> Iterator[Served]:
    predictor = Served(bus, store, surroundings(**changes))
    try:
        yield predictor
    finally:
        predictor.end()


def expected_bodies() -> list[bytes]:
    log = Log(Predictor(MemoryStore()).handle)
    ScriptedTrainer(small_settings()).run(log.publish)
    return [codec.encode(decision) for decision in log.decisions]


EXPECTED = expected_bodies()


def bodies_on(bus: Bus) -> list[bytes]:
    return [entry.body for entry in entries_on(bus, DECISIONS)]


@pytest.fixture
def bus() -> MemoryBus:
    return MemoryBus(MemoryServer(), RUN_ID)


def test_process_decides_as_the_pure_core_and_ends_with_the_run(bus: MemoryBus) -> None:
    with served(bus, MemoryStore()) as predictor:
        ScriptedTrainer(small_settings()).run(BusTrainer(bus).publish)
        predictor.join()
    assert predictor.error is None
    assert bodies_on(bus) == EXPECTED


def test_heartbeats_tell_step_and_counters(bus: MemoryBus) -> None:
    with served(bus, MemoryStore()) as predictor:
        ScriptedTrainer(small_settings()).run(BusTrainer(bus).publish)
        predictor.join()
    beats = [codec.decode_entry(entry) for entry in entries_on(bus, notes_of(PREDICTOR))]
    last = beats[-1]
    assert isinstance(last, Heartbeat)
    assert (last.state, last.step) == ("stopping", 400)
    counters = {metric.name: metric.value for metric in last.counters}
    assert counters["proposals"] > 10
    assert counters["saved_sequence"] > 300
    assert counters["missing_steps"] == counters["dead_letters"] == counters["gaps"] == 0


@pytest.mark.parametrize("keeps_state", [True, False])
def test_predictor_killed_and_started_again_reproduces_every_decision(
    bus: MemoryBus, keeps_state: bool
) -> None:
    """With or without a state to go on from: the history is still on the bus."""
    first_store = MemoryStore(keep_all=True)
    predictors = [Served(bus, first_store)]
    trainer = BusTrainer(bus)

    def restart(observation: Observation) -> None:
        if observation.step in (144, 232):
            predictors[-1].end()
            predictors.append(Served(bus, first_store if keeps_state else MemoryStore()))

    trainer.on_point = restart
    ScriptedTrainer(small_settings()).run(trainer.publish)
    predictors[-1].join()
    assert len(predictors) >= 3
    assert [predictor.error for predictor in predictors] == [None] * len(predictors)
    assert set(bodies_on(bus)) == set(EXPECTED)
    result = replay([*entries_on(bus, HISTORY), *entries_on(bus, DECISIONS)], is_sealed=True)
    assert result.difference == ""
    assert result.duplicates == len(bodies_on(bus)) - len(EXPECTED)
    generations = {entry.id.generation for entry in entries_on(bus, DECISIONS)}
    assert generations == set(range(1, len(predictors) + 1))


def test_run_resumed_on_a_new_server_goes_on_from_the_named_state(bus: MemoryBus) -> None:
    store = MemoryStore(keep_all=True)
    scripted = ScriptedTrainer(small_settings())
    with served(bus, store):
        scripted.run(BusTrainer(bus).publish, until_step=200)
    name = list(scripted.checkpoints)[1]
    new_bus = MemoryBus(MemoryServer(), RUN_ID)
    with served(new_bus, store) as predictor:
        scripted.resumed(name, generation=2).run(BusTrainer(new_bus, generation=2).publish)
        predictor.join()
    assert not [entry for entry in entries_on(new_bus, notes_of(PREDICTOR)) if entry.kind == Alert.__name__]
    ids = [entry.id for stream in (bus, new_bus) for entry in entries_on(stream, DECISIONS)]
    assert ids == sorted(set(ids)), "a recording goes on across servers: ids must rise"
    # The state on disk was of entry 1-n, which the new server has never seen.
    assert len(entries_on(new_bus, DECISIONS)) == len(
        [body for body in EXPECTED if _step(body) > scripted.checkpoints[name].step]
    )


def _step(body: bytes) -> int:
    decision = codec.decode(PhaseDecision.__name__, body)
    assert isinstance(decision, PhaseDecision)
    return decision.base_step


def test_end_of_an_earlier_start_does_not_end_the_service(bus: MemoryBus) -> None:
    with served(bus, MemoryStore()) as first:
        trainer = ScriptedTrainer(small_settings())
        trainer.run(BusTrainer(bus).publish)
        first.join()
    with served(bus, MemoryStore(keep_all=True)) as second:
        again = ScriptedTrainer(small_settings(), generation=2)
        again.run(BusTrainer(bus, generation=2).publish)
        second.join()
    fresh = [entry.body for entry in entries_on(bus, DECISIONS) if entry.id.generation == 2]
    assert len(fresh) == 2 * len(EXPECTED), "the whole history again, then the new run"


def test_with_a_parent_the_end_of_the_run_does_not_end_the_process(bus: MemoryBus) -> None:
    with served(bus, MemoryStore(), stays_after_end=True) as predictor:
        ScriptedTrainer(small_settings()).run(BusTrainer(bus).publish)
        ScriptedTrainer(small_settings(), generation=2).run(BusTrainer(bus, generation=2).publish)
        assert predictor.thread.is_alive()
    assert len(bodies_on(bus)) == 2 * len(EXPECTED)


def test_state_ahead_of_the_servers_history_is_left_alone(bus: MemoryBus) -> None:
    """The same run id, begun again on an empty server: old ids would hide all of the new history."""
    store = MemoryStore()
    with served(bus, store) as predictor:
        ScriptedTrainer(small_settings()).run(BusTrainer(bus).publish)
        predictor.join()
    new_bus = MemoryBus(MemoryServer(), RUN_ID)
    with served(new_bus, store) as predictor:
        ScriptedTrainer(small_settings()).run(BusTrainer(new_bus).publish)
        predictor.join()
    assert bodies_on(new_bus) == EXPECTED


def test_told_to_stop_it_first_handles_what_is_there(bus: MemoryBus) -> None:
    log = Log(Predictor(MemoryStore()).handle)
    ScriptedTrainer(small_settings()).run(log.publish)
    trainer = Publisher(bus, writer=TRAINER, generation=1, clock=SystemClock(), rng=random.Random(0))
    trainer.send([trainer.prepare(message) for _, message in log.entries], give_up_seconds=1.0)
    stop = threading.Event()

    class StoppingStore(MemoryStore):
        def remember_generation(self, generation: int) -> None:
            stop.set()

    serve(bus, RUN_ID, StoppingStore(), stop, surroundings())
    assert bodies_on(bus) == EXPECTED


def test_generation_is_above_what_is_written_even_when_the_server_lost_its_counters(
    bus: MemoryBus,
) -> None:
    log = Log(Predictor(MemoryStore()).handle)
    ScriptedTrainer(small_settings()).run(log.publish, until_step=32)
    earlier = Publisher(bus, writer=PREDICTOR, generation=5, clock=SystemClock(), rng=random.Random(0))
    earlier.send([earlier.prepare(log.decisions[0])], give_up_seconds=1.0)
    with served(bus, MemoryStore()) as predictor:
        ScriptedTrainer(small_settings()).run(BusTrainer(bus).publish)
        predictor.join()
    assert predictor.error is None
    assert {entry.id.generation for entry in entries_on(bus, DECISIONS)} == {5, 6}


class AbsentBus(MemoryBus):
    """Answers after a number of failed calls."""

    def __init__(self, server: MemoryServer, *, failures: int) -> None:
        super().__init__(server, RUN_ID)
        self.failures = failures

    def last_id(self, stream: str) -> EntryId:
        if self.failures > 0:
            self.failures -= 1
            raise BusUnavailable("redis at here: no usable answer")
        return super().last_id(stream)


def test_server_that_never_comes_is_one_clear_line() -> None:
    clock = FakeClock()
    with pytest.raises(BusUnavailable, match="no server for 10 s: redis at here") as caught:
        serve(
            AbsentBus(MemoryServer(), failures=1_000_000),
            RUN_ID,
            MemoryStore(),
            threading.Event(),
            surroundings(clock=clock),
        )
    assert "\n" not in str(caught.value)
    assert OPEN_SECONDS <= clock.monotonic() <= OPEN_SECONDS + 1.0


def test_server_that_comes_late_is_waited_for() -> None:
    server = MemoryServer()
    with served(AbsentBus(server, failures=5), MemoryStore()) as predictor:
        bus = MemoryBus(server, RUN_ID)
        ScriptedTrainer(small_settings()).run(BusTrainer(bus).publish)
        predictor.join()
    assert bodies_on(bus) == EXPECTED


def test_newer_predictor_ends_the_older_one(bus: MemoryBus) -> None:
    with served(bus, MemoryStore()) as predictor:
        notes = {notes_of(PREDICTOR): STREAM_START}
        assert bus.read_after(notes, max_count=1, block_seconds=DEADLINE_SECONDS), "no heartbeat"
        log = Log(Predictor(MemoryStore()).handle)
        ScriptedTrainer(small_settings()).run(log.publish, until_step=64)
        newer = Publisher(bus, writer=PREDICTOR, generation=9, clock=SystemClock(), rng=random.Random(0))
        newer.send([newer.prepare(log.decisions[0])], give_up_seconds=1.0)
        trainer = Publisher(bus, writer=TRAINER, generation=1, clock=SystemClock(), rng=random.Random(0))
        trainer.send([trainer.prepare(message) for _, message in log.entries], give_up_seconds=1.0)
        predictor.thread.join(DEADLINE_SECONDS)
    assert isinstance(predictor.error, Fenced)
    assert "a newer predictor serves run scripted" in str(predictor.error)
