"""The inbox hands the loop what is new and in force, and never makes it wait for the dead."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest

from common.bus import Bus, EntryId
from common.clock import SystemClock
from common.memory_bus import MemoryBus, MemoryServer
from common.messages import (
    CheckpointRequest,
    Controls,
    DeadLetter,
    Heartbeat,
    Message,
    Phase,
    PhaseDecision,
    PhaseVeto,
    RunEnded,
)
from common.publisher import Publisher
from trainer_node.inbox import Inbox

DEADLINE_SECONDS = 10.0


def decision(step: int, *, attempt: int = 0, generation: int = 3) -> PhaseDecision:
    return PhaseDecision(
        decision_id=f"{step}.{attempt}",
        phase=Phase.FULL,
        horizon_steps=0,
        num_groups=1,
        num_directions=4,
        coefficients=(),
        controls=Controls(),
        forecast=None,
        base_generation=generation,
        base_step=step,
        base_attempt=attempt,
        base_fingerprint="",
        valid_until_step=step,
        reason="",
    )


def heartbeat() -> Heartbeat:
    return Heartbeat(
        node="predictor", generation=1, process_id=1, state="running", step=0, uptime_seconds=0.0, counters=()
    )


class Sender:
    """Predictor and monitor in one: publishes on the right streams."""

    def __init__(self, bus: Bus) -> None:
        self._publishers = {
            writer: Publisher(bus, writer=writer, generation=1, clock=SystemClock(), rng=random.Random(0))
            for writer in ("predictor", "monitor")
        }

    def __call__(self, message: Message, writer: str = "predictor") -> None:
        publisher = self._publishers[writer]
        publisher.send([publisher.prepare(message)], give_up_seconds=1.0)


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


@pytest.fixture
def send(server: MemoryServer) -> Sender:
    return Sender(MemoryBus(server, "run"))


@pytest.fixture
def open_inbox(server: MemoryServer) -> Iterator[Callable[..., Inbox]]:
    opened: list[Inbox] = []

    def open_one(*, silent_seconds: float = DEADLINE_SECONDS, stop: threading.Event | None = None) -> Inbox:
        opened.append(
            Inbox(
                MemoryBus(server, "run"),
                generation=3,
                silent_seconds=silent_seconds,
                stop=stop or threading.Event(),
                clock=SystemClock(),
                rng=random.Random(0),
            )
        )
        return opened[-1]

    yield open_one
    for inbox in opened:
        inbox.close()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = SystemClock().monotonic() + DEADLINE_SECONDS
    while SystemClock().monotonic() < deadline:
        if condition():
            return True
        threading.Event().wait(0.002)
    return False


def test_a_decision_that_comes_while_waiting_is_taken(open_inbox, send: Sender) -> None:
    inbox = open_inbox()
    timer = threading.Timer(0.02, send, [decision(16)])
    timer.start()
    assert inbox.wait_decision(step=16, attempt=0, seconds=DEADLINE_SECONDS) == decision(16)
    timer.join()


def test_no_decision_in_time_is_none(open_inbox) -> None:
    assert open_inbox().wait_decision(step=16, attempt=0, seconds=0.01) is None


def test_late_and_foreign_decisions_count_as_stale_and_are_never_handed_out(open_inbox, send: Sender) -> None:
    inbox = open_inbox()
    assert inbox.wait_decision(step=32, attempt=0, seconds=0.0) is None
    send(decision(16))
    send(decision(32))
    send(decision(48, generation=2))
    assert eventually(lambda: inbox.stale == 3)
    assert inbox.wait_decision(step=48, attempt=0, seconds=0.0) is None


def test_after_a_set_back_the_same_step_is_a_new_decision_point(open_inbox, send: Sender) -> None:
    inbox = open_inbox()
    assert inbox.wait_decision(step=32, attempt=0, seconds=0.0) is None
    send(decision(16, attempt=1))
    assert inbox.wait_decision(step=16, attempt=1, seconds=DEADLINE_SECONDS) == decision(16, attempt=1)


def test_lockstep_waits_while_the_predictor_lives_and_gives_up_when_it_is_silent(
    open_inbox, send: Sender
) -> None:
    inbox = open_inbox(silent_seconds=0.3)
    send(heartbeat())
    assert inbox.wait_for_predictor(DEADLINE_SECONDS)
    assert inbox.wait_decision(step=16, attempt=0, seconds=None) is None


def test_lockstep_without_any_predictor_does_not_wait(open_inbox) -> None:
    assert open_inbox().wait_decision(step=16, attempt=0, seconds=None) is None


def test_a_stop_ends_every_wait(open_inbox, send: Sender) -> None:
    stop = threading.Event()
    inbox = open_inbox(stop=stop)
    send(heartbeat())
    assert inbox.wait_for_predictor(DEADLINE_SECONDS)
    stop.set()
    assert inbox.wait_decision(step=16, attempt=0, seconds=None) is None


def test_the_newest_veto_counts_and_lapses(open_inbox, send: Sender) -> None:
    inbox = open_inbox()
    veto = PhaseVeto(veto_id="1", active=True, reason="memory", valid_seconds=3600.0)
    send(veto, "monitor")
    assert eventually(lambda: inbox.veto() == "memory")
    send(PhaseVeto(veto_id="2", active=False, reason="", valid_seconds=3600.0), "monitor")
    assert eventually(lambda: inbox.veto() is None)
    send(PhaseVeto(veto_id="3", active=True, reason="short", valid_seconds=0.05), "monitor")
    send(CheckpointRequest(request_id="after", emergency=False, reason=""), "monitor")
    assert eventually(lambda: bool(inbox.take_orders()))
    assert eventually(lambda: inbox.veto() is None)


def test_orders_are_taken_once(open_inbox, send: Sender) -> None:
    inbox = open_inbox()
    request = CheckpointRequest(request_id="1", emergency=True, reason="memory")
    send(request, "monitor")
    taken: list[object] = []
    assert eventually(lambda: bool(taken.extend(inbox.take_orders()) or taken))
    assert taken == [request]
    assert inbox.take_orders() == []


def test_what_was_said_before_the_trainer_came_is_not_for_it(open_inbox, send: Sender) -> None:
    send(decision(16))
    send(CheckpointRequest(request_id="old", emergency=True, reason=""), "monitor")
    inbox = open_inbox()
    send(decision(17))
    assert inbox.wait_decision(step=17, attempt=0, seconds=DEADLINE_SECONDS) is not None
    assert inbox.take_orders() == []
    assert inbox.wait_decision(step=16, attempt=0, seconds=0.0) is None


def test_a_decision_point_that_the_predictor_could_not_read_ends_the_wait(open_inbox, send: Sender) -> None:
    """The predictor lives, but no decision will come: lockstep must not wait for ever."""
    inbox = open_inbox()
    send(heartbeat())
    assert inbox.wait_for_predictor(DEADLINE_SECONDS)
    letter = DeadLetter(
        stream="history", entry_id="3-16", kind="Observation", deliveries=5, error="x", body=b""
    )
    timer = threading.Timer(0.02, send, [letter])
    timer.start()
    assert inbox.wait_decision(step=16, attempt=0, seconds=None) is None
    timer.join()


@pytest.mark.parametrize("is_going_on", [True, False])
def test_an_emptied_server_is_seen_though_no_connection_broke(
    is_going_on: bool, server: MemoryServer, open_inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody who comes later learns which run this is: the trainer says it again on a reset."""
    monkeypatch.setattr("trainer_node.inbox.CHECK_SECONDS", 0.02)
    publisher = Publisher(
        MemoryBus(server, "run"), writer="trainer", generation=3, clock=SystemClock(), rng=random.Random(0)
    )

    def publish() -> EntryId:
        entry = publisher.prepare(RunEnded(step=1, reason="finished"))
        publisher.send([entry], give_up_seconds=1.0)
        return entry.id

    publish()
    inbox = open_inbox()
    newest = publish()
    assert eventually(lambda: inbox._newest_known == newest)
    assert inbox.resets == 0, "more came, and nothing is lost"
    server.flush()
    if is_going_on:
        publish()  # the next id, as if nothing had happened
    assert eventually(lambda: inbox.resets == 1)
    newest = publish()
    assert eventually(lambda: inbox._newest_known == newest)
    assert inbox.resets == 1, "told once"
