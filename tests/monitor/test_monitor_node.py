"""The monitor as a node: what it reads, when it speaks, and that it outlives the server."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from common import messages as m
from common.bus import Bus, Entry, EntryId
from common.clock import FakeClock
from common.errors import BusUnavailable, EnvironmentFault, Fenced
from common.log import NodeLog
from common.memory_bus import MemoryBus, MemoryServer
from common.publisher import Publisher
from common.streams import MONITOR, TRAINER
from monitor_node.device import Device, ScriptedDevice
from monitor_node.feed import Feed
from monitor_node.node import MonitorNode
from monitor_node.process_device import ProcessDevice
from monitor_node.serve import read_run
from tests.monitor import fake_run as fake

GIB = 1 << 30


class SpyOutbox:
    def __init__(self) -> None:
        self.fenced = False
        self.said: list[m.Message] = []

    def put(self, message: m.Message) -> None:
        self.said.append(message)

    def close(self, deadline_seconds: float) -> bool:
        return True

    def take(self, *kinds: type) -> list[Any]:
        """What was said since the last call, of these kinds."""
        said, self.said = self.said, []
        return [message for message in said if isinstance(message, kinds)]


class BreakableBus(MemoryBus):
    away = False

    def read_after(self, after: Mapping[str, EntryId], **options: Any) -> list[Entry]:
        if self.away:
            raise BusUnavailable("no connection")
        return super().read_after(after, **options)

    def length(self, stream: str) -> int:
        if self.away:
            raise BusUnavailable("no connection")
        return super().length(stream)


class Scene:
    """A monitor on a bus, and a trainer that a test speaks for; one clock for all."""

    def __init__(self, device: Device, *, server: MemoryServer | None = None) -> None:
        self.clock = FakeClock(1000.0)
        self.server = server or MemoryServer(self.clock)
        self.bus = BreakableBus(self.server, "run")
        self.outbox = SpyOutbox()
        self.feed = Feed("boot")
        self.preferences: list[str] = []
        self._publishers: dict[str, Publisher] = {}

        def choose(preference: str) -> Device:
            self.preferences.append(preference)
            return device

        self.node = MonitorNode(
            bus=self.bus,
            outbox=self.outbox,
            run_id="run",
            generation=1,
            clock=self.clock,
            choose_device=choose,
            feed=self.feed,
            log=NodeLog(MONITOR, "run", Silence()),  # type: ignore[arg-type]
        )

    def say(self, *messages: m.Message, writer: str = TRAINER) -> None:
        publisher = self._publishers.get(writer)
        if publisher is None:
            bus: Bus = MemoryBus(self.server, "run")
            publisher = Publisher(bus, writer=writer, generation=1, clock=self.clock, rng=random.Random(0))
            self._publishers[writer] = publisher
        publisher.send([publisher.prepare(message) for message in messages], give_up_seconds=0.0)

    def turn(self, seconds: float = 0.0, *, times: int = 1) -> None:
        for _ in range(times):
            self.clock.advance(seconds)
            self.node.turn(block_seconds=0.0)

    @property
    def page(self) -> dict[str, Any]:
        return self.feed.snapshot()


class Silence:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...


@pytest.fixture
def scene() -> Scene:
    return Scene(ScriptedDevice([fake.sample(2 * GIB, source="nvml")], is_gpu=True))


def test_the_page_follows_the_run(scene: Scene) -> None:
    scene.say(fake.started("run"), fake.heartbeat(step=1), fake.observation(1, 4.5))
    scene.turn(0.3, times=3)
    assert scene.page["run"]["status"] == "running"
    assert scene.page["progress"]["loss"] == 4.5
    assert scene.page["streams"]["history"] == 2
    assert scene.page["server"] == {"connected": True, "away_seconds": 0}


def test_who_begins_to_look_sees_what_is_known_now(scene: Scene) -> None:
    """While nobody looks a snapshot may be two seconds old."""
    scene.say(fake.started("run"), fake.observation(1, 4.5))
    scene.turn(0.3, times=3)
    scene.say(fake.observation(2, 4.25))
    scene.turn(times=2)
    assert scene.page["progress"]["loss"] == 4.5
    with scene.feed.watched():
        scene.turn()
        assert scene.page["progress"]["loss"] == 4.25


def test_memory_is_sampled_at_the_interval_of_the_run(scene: Scene) -> None:
    scene.say(fake.started("run"))
    scene.turn(0.1, times=55)
    assert len(scene.outbox.take(m.VramSample)) == 6
    assert scene.preferences == ["auto"]


def test_a_full_device_orders_a_cleanup_a_veto_and_an_emergency_checkpoint() -> None:
    scene = Scene(ScriptedDevice([fake.sample(15 * GIB, source="nvml")], is_gpu=True))
    scene.say(fake.started("run"), fake.heartbeat())
    scene.turn(0.1, times=3)
    orders = scene.outbox.take(m.MemoryOrder, m.CheckpointRequest, m.PhaseVeto)
    assert [type(order) for order in orders] == [m.MemoryOrder, m.CheckpointRequest, m.PhaseVeto]


def say_steps(scene: Scene, first: int, losses: list[float]) -> None:
    scene.say(*(fake.observation(first + n, loss) for n, loss in enumerate(losses)))


def test_a_diverging_run_is_told_once_and_vetoed_while_it_lasts(scene: Scene) -> None:
    scene.say(fake.started("run"), fake.heartbeat())
    say_steps(scene, 1, [4.0] * 20)
    scene.turn(0.1, times=3)
    assert scene.outbox.take(m.Alert, m.PhaseVeto) == []
    say_steps(scene, 21, [math.nan] * 3)
    scene.turn(0.1)
    alert, veto = scene.outbox.take(m.Alert, m.PhaseVeto)
    assert (alert.kind, alert.severity, alert.step) == ("not_finite", "error", 21)
    assert veto.active
    assert scene.page["divergence"]["level"] == "critical"
    scene.turn(1.0, times=10)
    renewed = scene.outbox.take(m.Alert, m.PhaseVeto)
    assert len(renewed) >= 2
    assert all(said.active for said in renewed)
    say_steps(scene, 24, [4.0] * 20)
    scene.turn(0.3, times=2)
    (lifted,) = scene.outbox.take(m.Alert, m.PhaseVeto)
    assert not lifted.active
    assert scene.page["divergence"] == {
        "level": "normal",
        "kinds": dict.fromkeys(scene.page["divergence"]["kinds"], "normal"),
        "excursions": 1,
        "text": "",
    }


def test_a_second_monitor_does_not_repeat_what_the_first_one_told(scene: Scene) -> None:
    scene.say(fake.started("run"), fake.heartbeat())
    say_steps(scene, 1, [4.0] * 20 + [math.nan])
    scene.turn(0.1, times=3)
    (alert,) = scene.outbox.take(m.Alert)
    scene.say(alert, writer=MONITOR)
    second = Scene(ScriptedDevice([fake.sample(2 * GIB, source="nvml")], is_gpu=True), server=scene.server)
    second.turn(0.1, times=3)
    assert second.outbox.take(m.Alert) == []
    assert second.page["divergence"]["level"] == "critical"


def test_a_process_is_not_sampled_before_the_trainer_said_who_it_is() -> None:
    scene = Scene(ProcessDevice())
    scene.turn(1.0, times=10)
    assert scene.outbox.take(m.VramSample, m.Alert) == []
    scene.say(fake.heartbeat())
    scene.turn(1.0, times=2)
    (sample,) = scene.outbox.take(m.VramSample)[:1]
    assert sample.used_bytes is None
    assert "not on this host" in sample.unknown_reason


def test_a_lost_node_is_reported_once_and_its_return_too(scene: Scene) -> None:
    scene.turn(0.0, times=2)
    scene.say(fake.heartbeat(step=3))
    scene.turn(0.5, times=20)
    (lost,) = scene.outbox.take(m.NodeLost)
    assert (lost.node, lost.last_step) == ("trainer", 3)
    scene.say(fake.heartbeat(step=3))
    scene.turn(0.1, times=3)
    assert [alert.kind for alert in scene.outbox.take(m.Alert)] == ["node_back"]


def test_old_heartbeats_read_at_the_start_do_not_count_as_alive(scene: Scene) -> None:
    scene.say(fake.started("run"), fake.heartbeat(step=3))
    scene.clock.advance(600.0)
    scene.turn(0.0, times=3)
    assert [lost.silent_seconds for lost in scene.outbox.take(m.NodeLost)] == [600.0]
    assert scene.page["run"]["status"] == "crashed"


def test_nobody_is_called_lost_because_the_server_was_away(scene: Scene) -> None:
    scene.say(fake.heartbeat(step=3))
    scene.turn(0.1, times=3)
    scene.bus.away = True
    scene.turn(1.0, times=30)
    assert scene.outbox.take(m.NodeLost) == []
    assert scene.page["server"]["connected"] is False
    assert scene.page["server"]["away_seconds"] >= 29
    scene.bus.away = False
    scene.turn(2.0)
    assert scene.outbox.take(m.NodeLost) == []
    assert scene.page["server"]["connected"] is True
    scene.turn(4.0)
    assert len(scene.outbox.take(m.NodeLost)) == 1


def test_memory_is_sampled_while_the_server_is_away(scene: Scene) -> None:
    scene.turn(0.1, times=3)
    scene.bus.away = True
    scene.outbox.take()
    scene.turn(1.0, times=5)
    assert len(scene.outbox.take(m.VramSample)) == 5


def test_a_run_that_ended_is_neither_sampled_nor_missed(scene: Scene) -> None:
    scene.say(fake.started("run"), fake.heartbeat(step=9), m.RunEnded(step=9, reason="finished"))
    scene.turn(0.1, times=3)
    scene.outbox.take()
    scene.turn(5.0, times=5)
    assert scene.outbox.take(m.VramSample, m.NodeLost, m.Alert) == []
    assert scene.page["run"]["status"] == "finished"


def test_a_veto_for_memory_ends_with_the_run() -> None:
    """A monitor that serves on would else renew it for ever: nothing measures memory after the end."""
    scene = Scene(ScriptedDevice([fake.sample(15 * GIB, source="nvml")], is_gpu=True))
    scene.say(fake.started("run"), fake.heartbeat(step=1), fake.observation(1, 4.5))
    scene.turn(1.0, times=3)
    assert scene.outbox.take(m.PhaseVeto)[-1].active
    scene.say(m.RunEnded(step=1, reason="finished"))
    scene.turn(1.0, times=10)
    assert [veto.active for veto in scene.outbox.take(m.PhaseVeto)][-1:] == [False]
    scene.turn(5.0, times=10)
    assert scene.outbox.take(m.PhaseVeto) == []
    scene.say(fake.started("run"), fake.heartbeat(step=1))
    scene.turn(1.0, times=2)
    assert scene.outbox.take(m.PhaseVeto)[-1].active


def test_an_entry_that_is_no_message_of_ours_is_passed_over(scene: Scene) -> None:
    broken = Entry(stream="history", id=EntryId(1, 1), kind="Outcome", body=b"\xff", sent_unix_seconds=1.0)
    scene.bus.publish([broken])
    scene.say(m.Alert(node="trainer", severity="info", kind="x", text="here", step=0))
    scene.turn(0.3, times=3)
    assert scene.page["alerts"][0]["text"] == "here"


def test_a_fenced_monitor_stops(scene: Scene) -> None:
    scene.outbox.fenced = True
    with pytest.raises(Fenced, match="newer monitor"):
        scene.node.run(threading.Event())


def test_a_monitor_that_is_told_to_stop_says_so(scene: Scene) -> None:
    stop = threading.Event()
    stop.set()
    scene.node.run(stop)
    beats = scene.outbox.take(m.Heartbeat)
    assert [beats[0].state, beats[-1].state] == ["running", "stopping"]


def test_status_reads_everything_that_is_there(scene: Scene) -> None:
    fake.publish(scene.bus, fake.fake_run("run", steps=600), now_unix_seconds=1000.0, ago_seconds=90.0)
    view = read_run(scene.bus, "run", scene.clock)
    assert view.step >= 600
    assert view.stream_lengths["history"] > 600


@pytest.mark.parametrize("is_away", [True, False])
def test_status_of_no_run_or_no_server_is_a_fault_of_the_environment(scene: Scene, is_away: bool) -> None:
    scene.bus.away = is_away
    with pytest.raises(EnvironmentFault, match="no connection" if is_away else "no run 'run'"):
        read_run(scene.bus, "run", scene.clock)
