"""The recorder brings every entry of a run into the file, once and in order, through all faults."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.bus import Bus, Entry, EntryId
from common.clock import FakeClock, SystemClock
from common.errors import BusRefused, BusUnavailable, EnvironmentFault
from common.memory_bus import MemoryBus, MemoryServer
from common.open_bus import open_bus
from common.recorder import Recorder
from common.recording import entries_of, read_recording
from common.recording_writer import RecordingWriter
from common.streams import DECISIONS, HISTORY, ORDERS, STREAMS
from tests.common.small_node import FaultyBus
from tests.common.small_recording import entry, open_writer
from tests.faults import FaultProxy, wait_until


@pytest.fixture
def memory_bus() -> MemoryBus:
    return MemoryBus(MemoryServer(), "run")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recording.hpt"


@pytest.fixture
def start(path: Path) -> Callable[..., tuple[Recorder, RecordingWriter, FakeClock]]:
    def start_one(bus: Any, **options: Any) -> tuple[Recorder, RecordingWriter, FakeClock]:
        clock, writer = FakeClock(), open_writer(path)
        recorder = Recorder(bus, writer, tuple(STREAMS), clock=clock, rng=random.Random(0), **options)
        return recorder, writer, clock

    return start_one


Start = Callable[..., tuple[Recorder, RecordingWriter, FakeClock]]


def history(first: int, last: int, *, generation: int = 1) -> list[Entry]:
    return [entry(sequence, generation=generation) for sequence in range(first, last + 1)]


def test_all_streams_are_recorded_and_sealed(bus: Bus, path: Path, start: Start) -> None:
    recorder, _, _ = start(bus)
    bus.publish(history(1, 700))  # more than one batch
    bus.publish([entry(1, stream=DECISIONS), entry(1, stream=ORDERS)])
    assert recorder.run_once(0.0) > 0
    bus.publish([entry(1, stream="notes.trainer"), *history(1, 2, generation=2)])
    assert recorder.drain() > 0
    recorder.seal()
    found = read_recording(path)
    assert found.sealed
    assert entries_of(found, HISTORY) == [*history(1, 700), *history(1, 2, generation=2)]
    assert entries_of(found, DECISIONS) == [entry(1, stream=DECISIONS)]
    assert entries_of(found, "notes.trainer") == [entry(1, stream="notes.trainer")]
    assert recorder.counters.recorded == len(found.entries) == 705


def test_recorder_that_died_goes_on_where_the_file_ends(
    memory_bus: MemoryBus, path: Path, start: Start
) -> None:
    recorder, writer, _ = start(memory_bus)
    memory_bus.publish(history(1, 3))
    recorder.run_once(0.0)
    writer.close()
    path.write_bytes(path.read_bytes()[:-1])  # torn
    memory_bus.publish(history(4, 5))
    recorder, writer, _ = start(memory_bus)
    assert recorder.drain() == 3
    recorder.seal()
    assert read_recording(path).entries == tuple(history(1, 5))


def test_emptied_server_does_not_end_the_recording(path: Path, start: Start) -> None:
    server = MemoryServer()
    bus = MemoryBus(server, "run")
    recorder, _, _ = start(bus)
    bus.publish(history(1, 3))
    recorder.run_once(0.0)
    server.flush()
    bus.publish(history(5, 6))
    recorder.run_once(0.0)
    recorder.seal()
    assert read_recording(path).entries == (*history(1, 3), *history(5, 6))


@pytest.mark.parametrize("when", ["before", "after"])
def test_bus_that_fails_is_waited_for(memory_bus: MemoryBus, path: Path, start: Start, when: str) -> None:
    faulty, errors = FaultyBus(memory_bus), []
    recorder, _, clock = start(faulty, on_error=errors.append)
    memory_bus.publish(history(1, 3))
    faulty.faults = [(call, when) for call in range(40)]
    for _ in range(40):
        assert recorder.run_once(0.0) == 0
    assert {type(error) for error in errors} == {BusUnavailable}
    assert recorder.counters.disconnects == 40
    assert 5.0 < clock.monotonic() < 80.0
    assert recorder.run_once(0.0) == 3
    recorder.seal()
    assert read_recording(path).entries == tuple(history(1, 3))


def test_refused_password_is_not_waited_out(memory_bus: MemoryBus, start: Start) -> None:
    faulty = FaultyBus(memory_bus)
    faulty.error = BusRefused
    faulty.faults = [(0, "before")]
    recorder, writer, _ = start(faulty)
    with pytest.raises(BusRefused):
        recorder.run(threading.Event())
    writer.close()


def test_lost_reply_of_a_real_server_loses_nothing(server_url: str, run_id: str, path: Path) -> None:
    with FaultProxy(server_url) as proxy:
        bus = open_bus(proxy.url, run_id, environment={})
        direct = open_bus(server_url, run_id, environment={})
        recorder = Recorder(bus, open_writer(path), (HISTORY,), clock=SystemClock())
        stop = threading.Event()
        thread = threading.Thread(target=recorder.run, args=(stop,))
        thread.start()
        direct.publish(history(1, 5))
        wait_until(lambda: recorder.counters.recorded == 5)
        proxy.drop_reply(b"XREAD")
        proxy.cut()
        direct.publish(history(6, 9))
        wait_until(lambda: recorder.counters.recorded == 9)
        stop.set()
        thread.join()
        recorder.seal()
        bus.close()
        direct.close()
    assert recorder.counters.disconnects > 0
    assert read_recording(path).entries == tuple(history(1, 9))


def test_full_disk_is_waited_for_and_nothing_more_is_read(
    memory_bus: MemoryBus, path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = []
    recorder, writer, _ = start(memory_bus, on_error=errors.append)
    memory_bus.publish(history(1, 3))

    def full(*, sync: bool = True) -> None:
        raise EnvironmentFault("no space")

    monkeypatch.setattr(writer, "flush", full)
    for _ in range(5):
        assert recorder.run_once(0.0) == 0
        memory_bus.publish(history(memory_bus.length(HISTORY) + 1, memory_bus.length(HISTORY) + 600))
    assert recorder.counters.failed_writes == len(errors) == 5
    assert writer.num_entries == 3
    monkeypatch.undo()
    recorder.drain()
    recorder.seal()
    assert read_recording(path).entries == tuple(history(1, 3003))


def test_synced_at_intervals_only(
    memory_bus: MemoryBus, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, writer, clock = start(memory_bus, sync_seconds=1.0)
    syncs: list[float] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: syncs.append(clock.monotonic()))
    for sequence in range(1, 31):
        memory_bus.publish(history(sequence, sequence))
        clock.advance(0.125)
        recorder.run_once(0.0)
    assert syncs == [1.0, 2.0, 3.0]
    for _ in range(5):  # the last entries, then nothing new to bring to safety
        clock.advance(5.0)
        recorder.run_once(0.0)
    assert len(syncs) == 4
    writer.close()


def test_entry_too_large_is_left_out_and_counted(memory_bus: MemoryBus, path: Path, start: Start) -> None:
    recorder, _, _ = start(memory_bus)
    memory_bus.publish([entry(1), entry(2, body=bytes(400_000)), entry(3)])
    recorder.drain()
    recorder.seal()
    assert recorder.counters.too_large == 1
    assert [one.id for one in read_recording(path).entries] == [EntryId(1, 1), EntryId(1, 3)]
