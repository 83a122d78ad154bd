"""MemoryBus is the slow, obviously right twin of RedisBus: whatever is done to both, they agree."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.bus import Bus, Entry, EntryId, GroupLost
from common.errors import Fenced
from common.memory_bus import MemoryBus, MemoryServer
from common.open_bus import open_bus
from common.streams import HISTORY
from tests.servers import unique_run_id

_IDS = st.builds(EntryId, st.integers(1, 3), st.integers(1, 8))
_CONSUMERS = st.sampled_from("ab")
_ACTIONS = st.one_of(
    st.tuples(st.just("publish"), _IDS, st.integers(1, 4)),
    st.tuples(st.just("read_after"), _IDS, st.integers(1, 5)),
    st.tuples(st.just("ensure_group"), _IDS, st.just(0)),
    st.tuples(st.just("read_new"), _CONSUMERS, st.integers(1, 3)),
    st.tuples(st.just("read_own"), _CONSUMERS, st.just(1000)),
    st.tuples(st.just("claim"), _CONSUMERS, st.just(1000)),
    st.tuples(st.just("ack"), _IDS, st.just(0)),
    st.tuples(st.just("trim"), _IDS, st.just(0)),
)


def act(bus: Bus, name: str, on: Any, number: int) -> Any:
    """What the action gives, and the state of the stream after it."""
    try:
        given_back = _act(bus, name, on, number)
    except (Fenced, GroupLost) as error:
        given_back = type(error)
    return given_back, bus.last_id(HISTORY), bus.length(HISTORY), bus.latest(HISTORY)


def _act(bus: Bus, name: str, on: Any, number: int) -> Any:
    if name == "publish":
        ids = [EntryId(on.generation, on.sequence + place) for place in range(number)]
        return bus.publish([Entry(HISTORY, id_, "Alert", str(id_).encode(), 0.5) for id_ in ids])
    if name == "read_after":
        return bus.read_after({HISTORY: on}, max_count=number, block_seconds=0)
    if name == "ensure_group":
        return bus.ensure_group(HISTORY, "g", after=on)
    if name == "claim":
        return bus.claim(HISTORY, group="g", consumer=on, idle_seconds=0, max_count=number)
    if name == "ack":
        return bus.ack(HISTORY, "g", [on])
    if name == "trim":
        return bus.trim(HISTORY, below=on)
    return bus.read_group(
        HISTORY, group="g", consumer=on, max_count=number, block_seconds=0, pending=name == "read_own"
    )


@given(actions=st.lists(_ACTIONS, max_size=25))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_memory_and_redis_give_the_same_answers(server_url: str, actions: list[tuple[str, Any, int]]) -> None:
    run_id = unique_run_id()
    memory = MemoryBus(MemoryServer(), run_id)
    redis_bus = open_bus(server_url, run_id, environment={})
    try:
        for action in actions:
            assert act(memory, *action) == act(redis_bus, *action), action
    finally:
        redis_bus.close()
