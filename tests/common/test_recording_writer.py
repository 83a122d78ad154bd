"""Writing recordings: what goes in comes out, in any number of sittings and on a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import codec, recording
from common.bus import Entry, EntryId
from common.errors import BodyTooLarge, EnvironmentFault, RecordingError
from common.recording import read_recording
from tests.common.small_recording import SMALL, STREAMS, entry, open_writer, write


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("sealed") / "recording.hpt"
    return path, write(path, SMALL)


@st.composite
def entry_lists(draw: st.DrawFn) -> list[Entry]:
    """Interleaved streams, each with rising ids, bodies of any bytes."""
    last = dict.fromkeys(STREAMS, EntryId(1, 0))
    entries = []
    for _ in range(draw(st.integers(0, 12))):
        stream = draw(st.sampled_from(STREAMS))
        generation, sequence = last[stream]
        if draw(st.booleans()):
            last[stream] = EntryId(generation, sequence + draw(st.integers(1, 3)))
        else:
            last[stream] = EntryId(generation + draw(st.integers(1, 1 << 40)), draw(st.integers(1, 1 << 62)))
        kind, body = draw(st.text(max_size=20)), draw(st.binary(max_size=100))
        seconds = draw(st.floats(allow_nan=False))
        entries.append(Entry(stream, last[stream], kind, body, seconds))
    return entries


@settings(max_examples=60, deadline=None)
@given(entry_lists(), st.data())
def test_what_is_written_in_any_number_of_sittings_is_read(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("recording") / "recording.hpt"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(entries)), max_size=3)))
    for start, end in zip([0, *cuts], [*cuts, len(entries)], strict=True):
        writer = open_writer(path)
        for one in entries[max(0, start - 2) : end]:  # a sitting repeats what the last one had
            assert writer.append(one) == (one in entries[start:end])
        writer.seal() if data.draw(st.booleans()) else writer.close()
    with_footer = open_writer(path)
    with_footer.seal()
    assert path.read_bytes() == write(path.with_name("at once"), entries)
    found = read_recording(path)
    assert found.entries == tuple(entries)
    assert (found.run_id, found.created_unix_seconds, found.sealed) == ("run", 12.5, True)
    assert found.last_ids == {one.stream: one.id for one in entries}


def test_torn_file_is_gone_on_with_behind_its_last_whole_entry(sealed: tuple[Path, bytes]) -> None:
    path, good = sealed
    for num_bytes in range(60, len(good)):
        path.write_bytes(good[:num_bytes])
        held = read_recording(path).entries
        writer = open_writer(path)
        assert writer.num_entries == len(held)
        assert [writer.append(one) for one in SMALL] == [one not in held for one in SMALL]
        writer.seal()
        assert path.read_bytes() == good


def test_damage_in_the_middle_is_never_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    changed = bytearray(write(path, SMALL, seal=False))
    changed[70] ^= 1
    path.write_bytes(changed)
    with pytest.raises(RecordingError, match="damaged"):
        open_writer(path)
    assert path.read_bytes() == changed


def test_sealed_file_of_a_resumed_run_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    write(path, SMALL)
    writer = open_writer(path)
    assert not read_recording(path).sealed
    assert writer.append(entry(2, generation=2))
    writer.seal()
    writer.seal()
    writer.close()
    assert read_recording(path).entries == (*SMALL, entry(2, generation=2))


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    writer = open_writer(path)
    with pytest.raises(RecordingError, match="another process"):
        open_writer(path)
    writer.close()
    open_writer(path).close()


def test_file_of_another_run_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    before = write(path, SMALL)
    with pytest.raises(RecordingError, match="of run run, not other"):
        open_writer(path, run_id="other")
    assert path.read_bytes() == before


def test_entry_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    writer = open_writer(path)
    writer.append(entry(1))
    with pytest.raises(BodyTooLarge):
        writer.append(entry(2, body=bytes(recording.MAX_FRAME_BYTES)))
    writer.append(entry(3, body=bytes(codec.MAX_BODY_BYTES)))
    writer.seal()
    assert [one.id.sequence for one in read_recording(path).entries] == [1, 3]


@pytest.mark.parametrize("when", ["append", "seal"])
def test_full_disk_leaves_a_readable_file_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = tmp_path / "recording.hpt"
    writer = open_writer(path)
    writer.append(SMALL[0])
    writer.flush()
    real_write, left_bytes = os.write, [20]

    def write_with_little_room(descriptor: int, data: bytes) -> int:
        if not left_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(descriptor, data[: left_bytes.pop()])

    if when == "append":
        for one in SMALL[1:]:
            writer.append(one)
    monkeypatch.setattr(os, "write", write_with_little_room)
    with pytest.raises(EnvironmentFault, match="No space left on device; free space"):
        writer.flush() if when == "append" else writer.seal()
    monkeypatch.undo()
    assert read_recording(path).entries == (SMALL[0],)
    if when == "seal":
        for one in SMALL[1:]:
            writer.append(one)
    writer.seal()
    assert read_recording(path).entries == tuple(SMALL)
    assert read_recording(path).sealed


def test_seal_that_could_not_be_synced_leaves_no_footer_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "recording.hpt"
    writer = open_writer(path)
    writer.append(SMALL[0])
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(EnvironmentFault, match="Input/output error"):
        writer.seal()
    assert not read_recording(path).sealed
    with pytest.raises(EnvironmentFault):
        writer.seal()
    monkeypatch.undo()
    for one in SMALL[1:]:
        writer.append(one)
    writer.seal()
    assert read_recording(path).entries == tuple(SMALL)
