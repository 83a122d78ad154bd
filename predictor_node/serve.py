"""The predictor as a process: bus, service, heartbeats and log around node.Predictor.

Starts behind the newest valid state of its own, if the server still has the history that it is
from. Outlives the server: retries until told to stop. Ends when `stop` is set, when a newer
predictor serves the run (Fenced), or when it reads a RunEnded that was written after it started,
unless a parent decides when to end. Decides nothing.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from common.bus import STREAM_START, Bus, Entry, EntryId
from common.clock import Clock
from common.errors import BusUnavailable, Fenced, UserError
from common.heartbeat import Heartbeats, NodeStatus
from common.log import NodeLog
from common.messages import (
    CheckpointWritten,
    Message,
    Metric,
    Observation,
    Outcome,
    RunEnded,
    RunStarted,
)
from common.outbox import Outbox
from common.publisher import Backoff, Publisher
from common.service import Handler, Service
from common.streams import DECISIONS, HISTORY, PREDICTOR, notes_of
from predictor_node.catch_up import CatchUp
from predictor_node.node import Predictor
from predictor_node.state import StateStore

OPEN_SECONDS = 10.0  # for a server that is still starting; afterwards it may be away for ever
NOTES_CAPACITY = 1000
CLOSE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a test replaces."""

    clock: Clock
    rng: random.Random  # spreads retries only
    log: NodeLog
    heartbeat_seconds: float
    stays_after_end: bool = False  # the parent decides when to end, not RunEnded


def serve(bus: Bus, run_id: str, store: StateStore, stop: threading.Event, around: Surroundings) -> None:
    """Serve one run until its end. Raises BusUnavailable (at the start only), BusRefused,
    Fenced, and CheckpointError or EnvironmentFault when `store` cannot be used.
    """
    newest_id, generation = _open(bus, store.last_generation() + 1, stop, around)
    if stop.is_set():
        return
    store.remember_generation(generation)
    predictor = Predictor(store)
    _restore(predictor, store, run_id, newest_id, around.log)
    decisions, notes = (
        Publisher(bus, writer=PREDICTOR, generation=generation, clock=around.clock, rng=around.rng)
        for _ in ("decisions", "notes")  # one thread each, and each stream has one of them
    )
    outbox = Outbox(notes, capacity=NOTES_CAPACITY)
    ended = threading.Event() if around.stays_after_end else stop
    catch_up = CatchUp(predictor, lambda: bus.last_id(HISTORY))
    service = _service(bus, decisions, outbox, _handlers(catch_up, ended, newest_id), around)
    service.start(predictor.applied)
    heartbeats = Heartbeats(
        outbox,
        node=PREDICTOR,
        generation=generation,
        seconds=around.heartbeat_seconds,
        status=lambda: _status(predictor, service),
        clock=around.clock,
    )
    around.log.event("serving", generation=generation, behind=str(predictor.applied))
    try:
        service.run(stop)
        service.drain()
    except Fenced as error:
        raise Fenced(f"a newer predictor serves run {run_id}: {error}") from None
    finally:
        heartbeats.close()
        outbox.close(CLOSE_SECONDS)
        around.log.event("stopped", behind=str(predictor.applied), step=predictor.last_step)


def _open(bus: Bus, at_least: int, stop: threading.Event, around: Surroundings) -> tuple[EntryId, int]:
    """(newest id of the history, our generation), as soon as the server answers."""
    backoff = Backoff(around.rng, longest_seconds=1.0)
    deadline_seconds = around.clock.monotonic() + OPEN_SECONDS
    while not stop.is_set():
        try:
            # A server that lost its counters may still hold what our predecessor wrote since.
            written = max(bus.last_id(stream).generation for stream in (DECISIONS, notes_of(PREDICTOR)))
            at_least = max(at_least, written + 1)
            return bus.last_id(HISTORY), bus.next_generation(PREDICTOR, at_least=at_least)
        except BusUnavailable as error:
            if around.clock.monotonic() >= deadline_seconds:
                raise BusUnavailable(f"no server for {OPEN_SECONDS:.0f} s: {error}") from None
            around.clock.sleep(backoff.next_seconds())
    return STREAM_START, 0


def _restore(predictor: Predictor, store: StateStore, run_id: str, newest_id: EntryId, log: NodeLog) -> None:
    """Take over the newest state. One ahead of the server's history is from another life of the run."""
    state = store.newest(run_id)
    if state is None:
        return
    if state.applied > newest_id:
        log.event("state_ahead_of_history", state=state.name, applied=str(state.applied))
        return
    try:
        predictor.restore(state)
    except UserError as error:
        log.event("state_not_restored", level="warning", state=state.name, error=str(error))
        return
    log.event("state_restored", state=state.name, behind=str(state.applied))


def _handlers(predictor: CatchUp, ended: threading.Event, newest_id: EntryId) -> Mapping[type, Handler]:
    def handle(message: Message, entry: Entry) -> list[Message]:
        return predictor.handle(message, entry.id)

    def end(message: RunEnded, entry: Entry) -> list[Message]:
        answers = predictor.handle(message, entry.id)
        if entry.id > newest_id:  # an older one ended an earlier start of this run
            ended.set()
        return answers

    kinds = (RunStarted, Observation, Outcome, CheckpointWritten)
    return {**dict.fromkeys(kinds, handle), RunEnded: end}


def _service(
    bus: Bus, publisher: Publisher, outbox: Outbox, handlers: Mapping[type, Handler], around: Surroundings
) -> Service:
    log = around.log
    return Service(
        bus,
        node=PREDICTOR,
        stream=HISTORY,
        group=PREDICTOR,
        handlers=handlers,
        publisher=publisher,
        clock=around.clock,
        on_error=lambda entry, error: log.event(
            "entry_failed", level="error", entry=str(entry.id), kind=entry.kind, error=str(error)
        ),
        on_gap=lambda expected, got: log.event(
            "entries_missing", level="warning", first=str(expected), read_instead=str(got)
        ),
        put_note=outbox.put,
        rng=around.rng,
    )


def _status(predictor: Predictor, service: Service) -> NodeStatus:
    counts = {
        **predictor.counters,
        "applied_generation": service.applied.generation,  # also past what was given up
        "applied_sequence": service.applied.sequence,
        "saved_generation": predictor.saved.generation,
        "saved_sequence": predictor.saved.sequence,
        "dead_letters": service.counters.dead_letters,
        "failed_tries": service.counters.failed_tries,
        "gaps": service.counters.gaps,
        "disconnects": service.counters.disconnects,
    }
    metrics = tuple(Metric(name=name, value=float(count), unit="1") for name, count in counts.items())
    return NodeStatus(state="running", step=predictor.last_step, counters=metrics)
