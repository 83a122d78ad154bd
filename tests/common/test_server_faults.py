"""A real server that is emptied, restarted, loading, full or frozen: what its writers and readers keep."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from common import messages as m
from common import redis_link
from common.bus import STREAM_START, Bus, EntryId
from common.clock import SystemClock
from common.errors import BusFull, BusUnavailable
from common.follower import Follower, decoded
from common.open_bus import open_bus
from common.outbox import Outbox
from common.publisher import Publisher
from common.streams import HISTORY
from tests.campaign.servers import CampaignServer
from tests.common.message_samples import sample
from tests.common.small_node import RUN, Node, entry_of, publish, requested
from tests.faults import FaultProxy, wait_until
from tests.servers import REAL_SERVERS, binary_of

END = m.RunEnded(step=1, reason="finished")


@pytest.fixture(scope="module", params=REAL_SERVERS)
def shared_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CampaignServer]:
    binary = binary_of(request.param)
    if binary is None:
        pytest.skip(f"{request.param} is not installed")
    # On a busy disk "everysec" holds writes back for up to two seconds, and a kill takes them along.
    options = {"appendfsync": "always", "key-load-delay": "150"}  # microseconds: large files take minutes
    folder = tmp_path_factory.mktemp("server") / request.param
    with CampaignServer(binary, folder, options=options) as started:
        yield started


@pytest.fixture
def server(shared_server: CampaignServer) -> CampaignServer:
    shared_server.flush()
    return shared_server


@pytest.fixture
def bus(server: CampaignServer) -> Iterator[Bus]:
    opened = open_bus(server.url, RUN, environment={})
    yield opened
    opened.close()


def started_node(bus: Bus) -> Node:
    node = Node(bus)
    node.service.start(STREAM_START)
    node.settle()
    return node


def lose_all_by_flush(server: CampaignServer) -> None:
    server.flush()


def lose_all_by_restart(server: CampaignServer) -> None:
    server.restart(keep_data=False)


@pytest.mark.parametrize("lose_all", [lose_all_by_flush, lose_all_by_restart])
def test_emptied_server_costs_what_was_on_it_and_the_group_goes_on_from_the_remembered_id(
    server: CampaignServer, bus: Bus, lose_all: Callable[[CampaignServer], None]
) -> None:
    publish(bus, 1, 2, 3)
    node = started_node(bus)
    lose_all(server)
    node.settle()
    publish(bus, 5, 6)  # 4 was lost with the server
    node.settle()
    assert node.steps == [1, 2, 3, 5, 6]
    assert node.gaps == [("1-4", "1-5")]
    assert node.service.counters.groups_recreated >= 1
    assert requested(bus) == [5, 6]


def test_killed_server_that_keeps_its_data_costs_nothing(server: CampaignServer, bus: Bus) -> None:
    publish(bus, 1, 2, 3)
    node = started_node(bus)
    publish(bus, 4)
    server.restart(keep_data=True)
    wait_until(lambda: node.service.run_once(0.0) >= 0 and node.steps == [1, 2, 3, 4])
    assert requested(bus) == [1, 2, 3, 4]
    assert node.gaps == []


def test_loading_server_is_unavailable_and_then_has_everything(server: CampaignServer, bus: Bus) -> None:
    sent = [entry_of(step) for step in range(1, 2501)]
    for start in range(0, len(sent), 500):
        bus.publish(sent[start : start + 500])
    told: list[str] = []

    def is_back() -> bool:
        try:
            return bus.last_id(HISTORY) == EntryId(1, 2500)
        except BusUnavailable as error:
            told.append(str(error))
            return False

    for _ in range(10):  # a busy machine may not let us ask in time
        server.restart(keep_data=True, wait=False)
        wait_until(is_back, deadline_seconds=30)
        if any("loading" in text for text in told):
            break
    assert any("loading" in text for text in told)
    assert bus.read_after({HISTORY: STREAM_START}, max_count=3000, block_seconds=0) == sent


def test_full_server_costs_plain_observations_and_nothing_else(server: CampaignServer, bus: Bus) -> None:
    publisher = Publisher(bus, writer="trainer", generation=1, clock=SystemClock(), rng=random.Random(0))
    outbox = Outbox(publisher, capacity=20)
    point: m.DecisionPoint = sample(m.DecisionPoint)
    outcome: m.Outcome = sample(m.Outcome)
    written: m.CheckpointWritten = sample(m.CheckpointWritten)
    server.limit_memory(1)
    kept: list[m.Message] = []
    for step in range(60):
        plain = m.Observation(
            step=step, attempt=0, phase=m.Phase.FULL, features=(), gradient_norms=(), decision_point=None
        )
        outbox.put(plain)
        if step % 10 == 9:
            at_point = m.Observation(
                step=step, attempt=1, phase=m.Phase.FULL, features=(), gradient_norms=(), decision_point=point
            )
            for message in (at_point, outcome, written):
                outbox.put(message)
                kept.append(message)
    wait_until(lambda: outbox.counters().retries > 0)
    dropped = outbox.counters().dropped_observations
    assert 0 < dropped < 60
    assert "more memory" in outbox.counters().last_error
    server.unlimit_memory()
    assert outbox.close(30)
    entries = bus.read_after({HISTORY: STREAM_START}, max_count=1000, block_seconds=0)
    found = [message for _, message in decoded(entries)]
    assert [message for message in found if message in kept] == kept
    assert len(found) == 78 - dropped
    assert [entry.id.sequence for entry in entries] == sorted({entry.id.sequence for entry in entries})


def test_node_on_a_full_server_answers_each_entry_once_when_there_is_room(
    server: CampaignServer, bus: Bus
) -> None:
    node = started_node(bus)
    publish(bus, 1, 2, 3)
    server.limit_memory(1)
    with pytest.raises(BusFull):
        bus.next_generation("trainer", at_least=1)
    for _ in range(5):
        node.service.run_once(0.0)
    assert node.steps == [1]
    assert node.service.replies_waiting == 1
    server.unlimit_memory()
    wait_until(lambda: node.service.run_once(0.0) == 0 and node.steps == [1, 2, 3])
    assert requested(bus) == [1, 2, 3]


def test_frozen_server_is_told_in_time_and_nothing_is_lost_or_doubled(
    server: CampaignServer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "COMMAND_SECONDS", 0.1)
    node = started_node(bus)
    server.stop_signal()
    try:
        with pytest.raises(BusUnavailable):
            publish(bus, 1, 2)  # the server does it when it goes on
        node.service.run_once(0.0)
    finally:
        server.go_on()
    wait_until(lambda: bus.length(HISTORY) == 2)
    publish(bus, 1, 2, 3)
    wait_until(lambda: node.service.run_once(0.0) == 0 and node.steps == [1, 2, 3])
    assert requested(bus) == [1, 2, 3]


def test_follower_starts_over_on_an_emptied_server(server: CampaignServer, bus: Bus) -> None:
    publish(bus, 1, 2, 3)
    follower = Follower(bus, [HISTORY], clock=SystemClock(), rng=random.Random(1))
    assert len(follower.read(0.0)) == 3
    server.kill()
    assert follower.read(0.0) == []
    server.restart(keep_data=False)
    again = entry_of(1)
    bus.publish([again])
    wait_until(lambda: follower.read(0.0) == [again])
    assert follower.resets == 1


def test_lost_replies_do_not_make_a_healthy_entry_look_like_a_killer(
    server: CampaignServer, bus: Bus
) -> None:
    with FaultProxy(server.url) as proxy:
        far_bus = open_bus(proxy.url, RUN, environment={})
        node = started_node(far_bus)
        publish(bus, 1)
        proxy.drop_reply(b"XREADGROUP", times=8)  # each is a delivery to the server
        wait_until(lambda: node.service.run_once(0.0) >= 0 and proxy.fired == 8)
        node.settle()
        assert node.steps == [1]
        assert node.service.counters.dead_letters == 0
        far_bus.close()
