"""Ids are contiguous per stream; sending is tried again only where that helps."""

from __future__ import annotations

import random

import pytest

from common import messages as m
from common.bus import STREAM_START, EntryId
from common.clock import FakeClock
from common.codec import decode_entry
from common.errors import BusFull, BusRefused, BusUnavailable, Fenced, SchemaMismatch
from common.publisher import Backoff, Publisher
from common.streams import HISTORY, notes_of
from tests.common.scripted_bus import ScriptedBus

END = m.RunEnded(step=1, reason="finished")
ALERT = m.Alert(node="trainer", severity="info", kind="test", text="text", step=1)


def publisher_on(bus: ScriptedBus, clock: FakeClock, **options: object) -> Publisher:
    return Publisher(bus, writer="trainer", generation=3, clock=clock, rng=random.Random(0), **options)  # type: ignore[arg-type]


@pytest.fixture
def scripted() -> ScriptedBus:
    return ScriptedBus()


def test_ids_are_contiguous_per_stream(scripted: ScriptedBus, fake_clock: FakeClock) -> None:
    publisher = publisher_on(scripted, fake_clock)
    prepared = [publisher.prepare(message) for message in (END, ALERT, END, END, ALERT)]
    assert [(entry.stream, entry.id) for entry in prepared] == [
        (HISTORY, EntryId(3, 1)),
        (notes_of("trainer"), EntryId(3, 1)),
        (HISTORY, EntryId(3, 2)),
        (HISTORY, EntryId(3, 3)),
        (notes_of("trainer"), EntryId(3, 2)),
    ]
    assert publisher.next_sequences == {HISTORY: 4, notes_of("trainer"): 3}
    assert decode_entry(prepared[1]) == ALERT
    assert prepared[0].sent_unix_seconds == fake_clock.unix()


def test_sequences_go_on_from_a_checkpoint(scripted: ScriptedBus, fake_clock: FakeClock) -> None:
    publisher = publisher_on(scripted, fake_clock, first_sequences={HISTORY: 9})
    assert publisher.prepare(END).id == EntryId(3, 9)
    assert publisher.prepare(ALERT).id == EntryId(3, 1)


def test_message_that_cannot_be_encoded_uses_no_id(scripted: ScriptedBus, fake_clock: FakeClock) -> None:
    publisher = publisher_on(scripted, fake_clock)
    with pytest.raises(SchemaMismatch):
        publisher.prepare(m.RunEnded(step="x", reason="finished"))  # type: ignore[arg-type]
    assert publisher.prepare(END).id == EntryId(3, 1)


def test_send_tries_again_until_the_server_is_back(scripted: ScriptedBus, fake_clock: FakeClock) -> None:
    publisher = publisher_on(scripted, fake_clock)
    scripted.failures.extend([BusUnavailable("away"), BusFull("full"), BusUnavailable("away")])
    sent = [publisher.prepare(END), publisher.prepare(END)]
    publisher.send(sent, give_up_seconds=60)
    assert scripted.tries == [sent] * 4
    assert scripted.read_after({HISTORY: STREAM_START}, max_count=9, block_seconds=0) == sent


@pytest.mark.parametrize("error", [BusUnavailable("away"), BusFull("full")])
def test_send_gives_up_in_time_with_the_reason(
    scripted: ScriptedBus, fake_clock: FakeClock, error: BusUnavailable
) -> None:
    publisher = publisher_on(scripted, fake_clock)
    scripted.always = error
    began_seconds = fake_clock.monotonic()
    with pytest.raises(type(error)):
        publisher.send([publisher.prepare(END)], give_up_seconds=10)
    assert 5 < fake_clock.monotonic() - began_seconds <= 10
    assert 5 <= len(scripted.tries) <= 40


@pytest.mark.parametrize("error", [Fenced("newer"), BusRefused("password")])
def test_what_trying_again_cannot_mend_is_raised_at_once(
    scripted: ScriptedBus, fake_clock: FakeClock, error: Fenced
) -> None:
    publisher = publisher_on(scripted, fake_clock)
    scripted.always = error
    with pytest.raises(type(error)):
        publisher.send([publisher.prepare(END)], give_up_seconds=10)
    assert len(scripted.tries) == 1


def test_pauses_grow_with_full_jitter_up_to_the_cap() -> None:
    ceilings = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    runs = []
    for seed in range(200):
        backoff = Backoff(random.Random(seed))
        runs.append([backoff.next_seconds() for _ in ceilings])
    for pauses, ceiling in zip(zip(*runs, strict=True), ceilings, strict=True):
        assert 0 <= min(pauses) < 0.1 * ceiling
        assert 0.9 * ceiling < max(pauses) <= ceiling
    backoff.reset()
    assert backoff.next_seconds() <= 0.05
