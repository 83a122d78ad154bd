"""The outbox: hands over at once, loses nothing that matters, counts what it drops."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import codec
from common import messages as m
from common.bus import STREAM_START, Bus, EntryId
from common.clock import SystemClock
from common.errors import BusError, BusFull, BusRefused, BusUnavailable, Fenced
from common.open_bus import open_bus
from common.outbox import KEPT_BYTES, Outbox
from common.publisher import Publisher
from common.streams import HISTORY, notes_of
from tests.common.message_samples import sample
from tests.common.scripted_bus import ScriptedBus
from tests.faults import FaultProxy, wait_until

NOTES = notes_of("trainer")
END = m.RunEnded(step=1, reason="finished")
NOTE = m.Alert(node="trainer", severity="info", kind="test", text="text", step=1)
DECISION_POINT: m.DecisionPoint = sample(m.DecisionPoint)

pytestmark = pytest.mark.timeout(60)


def observation(step: int, *, at_decision: bool = False) -> m.Observation:
    return m.Observation(
        step=step,
        attempt=0,
        phase=m.Phase.FULL,
        features=(0.5,),
        gradient_norms=(1.0,),
        decision_point=DECISION_POINT if at_decision else None,
    )


def outbox_on(
    bus: Bus,
    *,
    capacity: int = 1000,
    kept_bytes: int = KEPT_BYTES,
    generation: int = 1,
    on_fenced: Callable[[Fenced], None] | None = None,
) -> Outbox:
    publisher = Publisher(
        bus, writer="trainer", generation=generation, clock=SystemClock(), rng=random.Random(0)
    )
    return Outbox(publisher, capacity=capacity, kept_bytes=kept_bytes, on_fenced=on_fenced)


@pytest.fixture
def scripted() -> ScriptedBus:
    return ScriptedBus()


@pytest.fixture
def outbox(scripted: ScriptedBus) -> Iterator[Outbox]:
    box = outbox_on(scripted)
    yield box
    scripted.gate.set()
    box.close(0.0)


def hold_with_one_on_the_way(bus: ScriptedBus, box: Outbox) -> None:
    """From here on everything that is put waits; history 1 is on the way."""
    bus.gate.clear()
    box.put(END)
    wait_until(lambda: len(bus.tries) == 1)


def test_put_alone_is_enough_to_publish(scripted: ScriptedBus, outbox: Outbox) -> None:
    for step in range(1, 4):
        outbox.put(observation(step))
        wait_until(lambda step=step: scripted.length(HISTORY) == step)


def test_order_and_ids_are_those_of_put(scripted: ScriptedBus, outbox: Outbox) -> None:
    for step in range(350):
        outbox.put(observation(step, at_decision=step % 10 == 0))
        outbox.put(NOTE)
    assert outbox.flush(30)
    assert scripted.sequences(HISTORY) == list(range(1, 351))
    assert scripted.sequences(NOTES) == list(range(1, 351))
    assert outbox.counters().published == 700
    assert outbox.next_sequences == {HISTORY: 351, NOTES: 351}
    assert max(len(batch) for batch in scripted.tries) <= 100


def test_waiting_messages_go_out_in_the_order_of_put_over_all_streams(
    scripted: ScriptedBus, outbox: Outbox
) -> None:
    hold_with_one_on_the_way(scripted, outbox)
    for message in (NOTE, observation(1), END, observation(2, at_decision=True), NOTE, observation(3)):
        outbox.put(message)
    scripted.gate.set()
    assert outbox.flush(30)
    kinds = [entry.kind for entry in scripted.tries[1]]
    assert kinds == ["Alert", "Observation", "RunEnded", "Observation", "Alert", "Observation"]


def test_put_returns_while_the_bus_hangs(scripted: ScriptedBus, outbox: Outbox) -> None:
    hold_with_one_on_the_way(scripted, outbox)
    for step in range(500):
        outbox.put(observation(step))
    assert outbox.counters().queued == 501
    assert not outbox.flush(0.01)
    scripted.gate.set()
    assert outbox.flush(30)
    assert outbox.counters().queued == 0


@pytest.mark.parametrize("error", [BusUnavailable("away"), BusFull("full"), BusRefused("password")])
def test_nothing_is_lost_while_the_server_is_away(
    scripted: ScriptedBus, outbox: Outbox, error: BusError
) -> None:
    outbox.put(END)
    wait_until(lambda: outbox.counters().connected)
    scripted.always = error
    for step in range(250):
        outbox.put(observation(step))
    wait_until(lambda: outbox.counters().retries >= 3)
    away = outbox.counters()
    assert not away.connected
    assert away.last_error == str(error)
    scripted.always = None
    assert outbox.flush(30)
    assert scripted.sequences(HISTORY) == list(range(1, 252))
    back = outbox.counters()
    assert back.connected
    assert (back.published, back.last_error, back.dropped_observations) == (251, "", 0)


@given(st.lists(st.sampled_from("noOe"), max_size=40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_full_outbox_drops_oldest_notes_then_oldest_plain_observations_only(
    kinds: list[str], capacity: int
) -> None:
    """Against a slow twin. n note, o observation, O at a decision point, e end of run."""
    made = {"n": NOTE, "o": observation(1), "O": observation(2, at_decision=True), "e": END}
    bus = ScriptedBus()
    box = outbox_on(bus, capacity=capacity)
    hold_with_one_on_the_way(bus, box)
    waiting: list[tuple[str, int]] = []  # kind, sequence
    next_sequence = {HISTORY: 2, NOTES: 1}
    dropped = {"n": 0, "o": 0}
    for kind in kinds:
        box.put(made[kind])
        stream = NOTES if kind == "n" else HISTORY
        waiting.append((kind, next_sequence[stream]))
        next_sequence[stream] += 1
        if len(waiting) + 1 > capacity:
            droppable = next((kind for kind in "no" if kind in dict(waiting)), None)
            if droppable is not None:
                waiting.remove(next(item for item in waiting if item[0] == droppable))
                dropped[droppable] += 1
    bus.gate.set()
    assert box.close(30)
    assert bus.sequences(NOTES) == [sequence for kind, sequence in waiting if kind == "n"]
    assert bus.sequences(HISTORY) == [1] + [sequence for kind, sequence in waiting if kind != "n"]
    counters = box.counters()
    assert (counters.dropped_notes, counters.dropped_observations) == (dropped["n"], dropped["o"])
    assert counters.published == 1 + len(waiting)


OUTCOME: m.Outcome = sample(m.Outcome)
POINT = observation(2, at_decision=True)


@given(st.lists(st.sampled_from("nOce"), max_size=30), st.integers(0, 12_000))
@settings(max_examples=60, deadline=None)
def test_points_and_outcomes_wait_within_a_bound_and_the_oldest_points_go_first(
    kinds: list[str], kept_bytes: int
) -> None:
    """Against a slow twin. n note, O observation at a decision point, c outcome, e end of run."""
    made = {"n": NOTE, "O": POINT, "c": OUTCOME, "e": END}
    size = {"O": len(codec.encode(POINT)), "c": len(codec.encode(OUTCOME))}
    bus = ScriptedBus()
    box = outbox_on(bus, kept_bytes=kept_bytes)
    hold_with_one_on_the_way(bus, box)
    waiting: list[tuple[str, int]] = []  # kind, sequence
    dropped = {"O": 0, "c": 0}
    for sequence, kind in enumerate(kinds):
        box.put(made[kind])
        waiting.append((kind, sequence))
        while sum(size.get(kind, 0) for kind, _ in waiting) > kept_bytes:
            victim = next(kind for kind in "Oc" if kind in dict(waiting))
            waiting.remove(next(item for item in waiting if item[0] == victim))
            dropped[victim] += 1
    bus.gate.set()
    assert box.close(30)
    sent = [entry.kind for entry in bus.read_after({HISTORY: STREAM_START}, max_count=99, block_seconds=0)]
    assert sent == ["RunEnded", *(type(made[kind]).__name__ for kind, _ in waiting if kind != "n")]
    counters = box.counters()
    assert (counters.dropped_points, counters.dropped_outcomes) == (dropped["O"], dropped["c"])
    assert counters.published == 1 + len(waiting)
    assert box._waiting_bytes == 0


def test_message_that_cannot_be_encoded_is_counted_and_leaves_a_gap(
    scripted: ScriptedBus, outbox: Outbox
) -> None:
    outbox.put(END)
    outbox.put(m.RunEnded(step="x", reason="finished"))  # type: ignore[arg-type]
    outbox.put(END)
    assert outbox.flush(30)
    outbox.put(dataclasses.replace(POINT, features="x"))  # its size is asked for when it is put
    outbox.put(END)
    assert outbox.flush(30)
    assert scripted.sequences(HISTORY) == [1, 3, 5]
    assert outbox.counters().unencodable == 2


def test_fenced_outbox_stops_for_good_and_tells_once(scripted: ScriptedBus) -> None:
    told: list[Fenced] = []
    box = outbox_on(scripted, on_fenced=told.append)
    box.put(END)
    assert box.flush(30)
    newer = Publisher(scripted, writer="trainer", generation=2, clock=SystemClock(), rng=random.Random(0))
    newer.send([newer.prepare(END)], give_up_seconds=1)
    box.put(END)
    assert not box.flush(30)
    assert box.fenced
    tries = len(scripted.tries)
    box.put(END)
    box.put(NOTE)
    assert not box.close(30)
    assert len(scripted.tries) == tries
    assert len(told) == 1
    assert box.counters().fenced
    assert scripted.last_id(HISTORY) == EntryId(2, 1)


def test_close_gives_up_when_the_server_stays_away(scripted: ScriptedBus) -> None:
    scripted.always = BusUnavailable("away")
    box = outbox_on(scripted)
    box.put(END)
    assert not box.close(0.05)
    wait_until(lambda: not box._thread.is_alive())
    box.put(END)
    assert box.counters().queued == 1


def test_stream_behind_a_failing_network_is_complete_and_single(server_url: str, run_id: str) -> None:
    near = open_bus(server_url, run_id, environment={})
    with FaultProxy(server_url) as proxy:
        far = open_bus(proxy.url, run_id, environment={})
        box = outbox_on(far, capacity=5000)
        proxy.drop_reply(b"XADD", times=2)
        proxy.cut_request(b"XADD", at=2000, times=2)
        for step in range(2000):
            box.put(observation(step))
            if step == 1000:
                proxy.cut()
        assert box.close(40)
        assert proxy.fired == 4
        assert box.counters().retries >= 4
        found = near.read_after({HISTORY: STREAM_START}, max_count=10_000, block_seconds=0)
        far.close()
    near.close()
    assert [entry.id for entry in found] == [EntryId(1, sequence) for sequence in range(1, 2001)]
