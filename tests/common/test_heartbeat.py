"""Heartbeats: regular, never failing, and a last one at the end."""

from __future__ import annotations

from common.clock import FakeClock
from common.heartbeat import Heartbeats, NodeStatus
from common.messages import Heartbeat, Message, Metric
from common.streams import MONITOR
from tests.faults import wait_until


class Sink:
    """An outbox that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[Heartbeat] = []

    def put(self, message: Message) -> None:
        assert isinstance(message, Heartbeat)
        self.messages.append(message)


def test_heart_beats_until_closed_and_says_so() -> None:
    sink, clock = Sink(), FakeClock(50.0)
    status = NodeStatus(state="running", step=7, counters=(Metric(name="x", value=1.0, unit=""),))
    heartbeats = Heartbeats(
        sink, node=MONITOR, generation=3, seconds=0.001, status=lambda: status, clock=clock
    )
    clock.advance(2.0)
    wait_until(lambda: len(sink.messages) > 3 and sink.messages[-1].uptime_seconds == 2.0)
    heartbeats.close()
    heartbeats.close()
    number = len(sink.messages)
    first, last = sink.messages[0], sink.messages[-1]
    assert (first.node, first.generation, first.state, first.step) == (MONITOR, 3, "running", 7)
    assert first.counters == status.counters
    assert last.state == "stopping"
    assert not heartbeats.alive
    assert len(sink.messages) == number


def test_heart_goes_on_when_the_status_cannot_be_told() -> None:
    def status() -> NodeStatus:
        if calls:
            raise RuntimeError("dictionary changed size during iteration")
        calls.append(1)
        return NodeStatus(state="running", step=7, counters=())

    calls: list[int] = []
    sink = Sink()
    heartbeats = Heartbeats(sink, node=MONITOR, generation=1, seconds=0.001, status=status, clock=FakeClock())
    wait_until(lambda: len(sink.messages) > 3)
    heartbeats.close()
    assert sink.messages[2].step == 7
    assert sink.messages[2].counters[-1].name == "status_errors"
