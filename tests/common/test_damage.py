"""Bits that flip on the wire or on the server: nothing wrong is believed, no crash, and the rest survives."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from common import redis_link
from common.bus import DAMAGED, STREAM_START, Bus, Entry, EntryId
from common.clock import SystemClock
from common.codec import decode_entry
from common.errors import BusError, BusUnavailable, CodecError
from common.follower import Follower, decoded
from common.open_bus import open_bus
from common.recorder import Recorder
from common.recording import read_recording
from common.recording_writer import RecordingWriter
from common.redis_bus import RedisBus
from common.redis_link import RedisLink
from common.stream_records import entry_of, fields_of
from common.streams import HISTORY
from tests.common.small_node import Node, dead_letters, requested
from tests.common.small_node import entry_of as entry_of_step
from tests.faults import FaultProxy

ENTRY = Entry(HISTORY, EntryId(3, 14), "Observation", bytes(range(256)), 1.5e9 + 0.25)
TRIES = 400  # more than any law here needs at the shares given


@pytest.fixture
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped length makes a client wait for bytes that never come."""
    monkeypatch.setattr(redis_link, "COMMAND_SECONDS", 0.2)
    monkeypatch.setattr(redis_link, "BLOCK_MARGIN_SECONDS", 0.2)


def until_it_works(call: Callable[[], object]) -> None:
    for _ in range(TRIES):
        try:
            call()
            return
        except BusUnavailable:
            continue
    pytest.fail("not one try in so many got through")


# One record


def test_a_whole_record_is_the_entry_that_was_written() -> None:
    assert entry_of(ENTRY.stream, ENTRY.id, fields_of(ENTRY)) == ENTRY


def test_no_flipped_bit_of_any_field_is_believed() -> None:
    fields = fields_of(ENTRY)
    for name, value in fields.items():
        for bit in range(8 * len(value)):
            flipped = bytearray(value)
            flipped[bit // 8] ^= 1 << bit % 8
            found = entry_of(ENTRY.stream, ENTRY.id, {**fields, name: bytes(flipped)})
            assert found.kind == DAMAGED
            with pytest.raises(CodecError):
                decode_entry(found)


def test_a_record_under_another_id_or_stream_is_not_believed() -> None:
    fields = fields_of(ENTRY)
    for stream, id_ in (("orders", ENTRY.id), (HISTORY, EntryId(3, 15)), (HISTORY, EntryId(31, 4))):
        assert entry_of(stream, id_, fields).kind == DAMAGED


@pytest.mark.parametrize("name", [b"k", b"b", b"u", b"c"])
def test_a_record_that_lacks_a_field_is_not_believed(name: bytes) -> None:
    fields = {key: value for key, value in fields_of(ENTRY).items() if key != name}
    assert entry_of(ENTRY.stream, ENTRY.id, fields).kind == DAMAGED
    assert entry_of(ENTRY.stream, ENTRY.id, None).kind == DAMAGED


# Damaged on the server


def damaged_on_server(bus: Bus, proxy: FaultProxy, *, steps: int, at: int) -> list[Entry]:
    sent = [entry_of_step(step) for step in range(1, steps + 1)]
    for entry in sent:
        if entry.id.sequence == at:
            proxy.damage_request(b"XADD")
        bus.publish([entry])
    assert proxy.fired_by_kind["damaged_request"] == 1
    return sent


def test_damaged_entry_becomes_a_dead_letter_and_the_stream_goes_on(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy
) -> None:
    damaged_on_server(far_bus, proxy, steps=5, at=3)
    node = Node(near_bus)
    node.service.start(STREAM_START)
    node.settle()
    assert node.steps == [1, 2, 4, 5]
    (letter,) = dead_letters(near_bus)
    assert (letter.entry_id, letter.kind, letter.deliveries) == ("1-3", DAMAGED, 1)
    assert "checksum" in letter.error
    assert node.service.counters.dead_letters == 1
    assert node.service.applied == EntryId(1, 5)


def test_damaged_entry_reaches_no_follower_and_no_recording_and_is_counted(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy, tmp_path: Path
) -> None:
    sent = damaged_on_server(far_bus, proxy, steps=5, at=3)
    whole = [entry for entry in sent if entry.id.sequence != 3]
    follower = Follower(near_bus, [HISTORY], clock=SystemClock(), rng=random.Random(1))
    assert [entry for entry, _ in decoded(follower.read(0.0))] == whole
    assert follower.damaged == 1
    path = tmp_path / "recording.hpt"
    writer = RecordingWriter(path, run_id="run", created_unix_seconds=0.0)
    recorder = Recorder(near_bus, writer, [HISTORY], clock=SystemClock())
    assert recorder.drain() == 4
    recorder.seal()
    assert list(read_recording(path).entries) == whole
    assert recorder.counters.damaged == 1


# Damaged on the way


def test_a_follower_reads_again_what_was_damaged_on_the_way(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy
) -> None:
    near_bus.publish([ENTRY])
    proxy.damage_reply(b"XREAD")
    assert far_bus.read_after({HISTORY: STREAM_START}, max_count=9, block_seconds=0) == [ENTRY]
    proxy.damage_reply(b"XREVRANGE")
    assert far_bus.latest(HISTORY) == ENTRY
    assert proxy.fired_by_kind["damaged_reply"] == 2


def test_a_group_gives_out_again_what_was_damaged_on_the_way(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy
) -> None:
    near_bus.publish([ENTRY])
    near_bus.ensure_group(HISTORY, "g", after=STREAM_START)

    def read(*, pending: bool) -> list[Entry]:
        found = far_bus.read_group(
            HISTORY, group="g", consumer="p", max_count=9, block_seconds=0, pending=pending
        )
        return [delivery.entry for delivery in found]

    proxy.damage_reply(b"XREADGROUP")
    with pytest.raises(BusUnavailable, match="pending"):
        read(pending=False)
    proxy.damage_reply(b"XREADGROUP")
    assert read(pending=True) == [ENTRY]
    proxy.damage_reply(b"XAUTOCLAIM")
    with pytest.raises(BusUnavailable, match="pending"):
        far_bus.claim(HISTORY, group="g", consumer="q", idle_seconds=0.0, max_count=9)
    assert proxy.fired_by_kind["damaged_reply"] == 3


def test_two_different_damages_are_not_taken_for_the_truth(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy
) -> None:
    near_bus.publish([ENTRY])
    proxy.damage_reply(b"XREAD", share=1.0)
    with pytest.raises(BusUnavailable, match="other damage"):
        far_bus.read_after({HISTORY: STREAM_START}, max_count=9, block_seconds=0)
    proxy.heal()
    assert far_bus.read_after({HISTORY: STREAM_START}, max_count=9, block_seconds=0) == [ENTRY]


@pytest.mark.usefixtures("_short_waits")
def test_a_damaged_yes_to_our_password_is_no_refusal(proxy: FaultProxy, run_id: str) -> None:
    proxy.damage_reply(b"AUTH", anywhere=True)
    bus = open_bus(proxy.url, run_id, environment={})
    with pytest.raises(BusUnavailable):
        bus.last_id(HISTORY)
    assert bus.last_id(HISTORY) == STREAM_START
    bus.close()


def test_a_refusal_is_believed_when_it_is_repeated_and_only_then() -> None:
    asked = []

    def refuse(client: object) -> None:
        asked.append(client)
        raise redis_link.redis.ResponseError("unknown command" if len(asked) < turns else "unkn own command")

    link = RedisLink("somewhere", lambda seconds: redis_link.redis.Redis())
    for turns, kind in ((9, redis_link.BusRefused), (3, BusUnavailable), (2, BusUnavailable)):
        asked.clear()
        with pytest.raises(BusError) as told:
            link.call(refuse)
        assert type(told.value) is kind
        assert len(asked) == min(turns, 3)


class ScriptedClient:
    """Answers each pipeline with the next of its replies, whatever was asked."""

    def __init__(self, *replies: list[object]) -> None:
        self._replies = list(replies)
        self.connection_pool = self

    def pipeline(self, transaction: bool) -> ScriptedClient:
        return self

    def execute(self, raise_on_error: bool = True) -> list[object]:
        return self._replies.pop(0)

    def __enter__(self) -> ScriptedClient:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None  # what is only queued, and `disconnect`


def scripted_bus(*replies: list[object]) -> RedisBus:
    client = ScriptedClient(*replies)
    return RedisBus(RedisLink("scripted", lambda seconds: client), "run")  # type: ignore[arg-type, return-value]


def newest(text: bytes) -> dict[str, bytes]:
    return {"last-generated-id": text}


@pytest.mark.parametrize(
    ("ask", "good", "answer", "damaged"),
    [
        (lambda bus: bus.next_generation("trainer", at_least=1), [5, b"5"], 5, [7, b"5"]),
        (lambda bus: bus.next_generation("trainer", at_least=1), [5, b"5"], 5, [5, b"4"]),
        (lambda bus: bus.length(HISTORY), [5, 5], 5, [5, 13]),
        (
            lambda bus: bus.last_id(HISTORY),
            [newest(b"3-14"), newest(b"3-14")],
            ENTRY.id,
            [newest(b"7-14"), newest(b"3-14")],
        ),
        (lambda bus: bus.publish([ENTRY]), [b"3-14"], None, [b"3-15"]),
        (lambda bus: bus.publish([ENTRY]), [b"3-14"], None, [b"QUEUED"]),
    ],
)
def test_no_flipped_digit_of_an_answer_is_believed(
    ask: Callable[[Bus], object], good: list[object], answer: object, damaged: list[object]
) -> None:
    assert ask(scripted_bus(good)) == answer
    with pytest.raises(BusUnavailable):
        ask(scripted_bus(damaged))


@pytest.mark.usefixtures("_short_waits")
def test_no_damaged_reply_changes_order_or_number_of_effects(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy
) -> None:
    for command in (b"XADD", b"XREAD", b"XREADGROUP", b"XINFO", b"XACK", b"XAUTOCLAIM", b"XPENDING"):
        proxy.damage_reply(command, share=0.1, anywhere=True)
    node = Node(far_bus)
    node.service.start(STREAM_START)
    for step in range(1, 41):
        until_it_works(lambda step=step: far_bus.publish([entry_of_step(step)]))  # type: ignore[misc]
        node.service.run_once(0.0)
    for _ in range(TRIES):
        if node.steps == list(range(1, 41)) and not node.service.replies_waiting:
            break
        node.service.run_once(0.0)
    assert node.steps == requested(near_bus) == list(range(1, 41))
    assert dead_letters(near_bus) == []
    assert node.gaps == []
    assert proxy.fired_by_kind["damaged_reply"] > 10
