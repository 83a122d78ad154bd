"""Reading recordings: no damage goes unnoticed, a tear costs no whole entry."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import codec, recording
from common.errors import EnvironmentFault, RecordingError
from common.messages import RunEnded
from common.recording import entries_of, messages_of, read_recording
from common.streams import DECISIONS, HISTORY, ORDERS
from tests.common.small_recording import SMALL, entry, open_writer, write


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("sealed") / "recording.hpt"
    return path, write(path, SMALL)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_changed_byte_of_a_sealed_file_is_noticed(
    sealed: tuple[Path, bytes], data: st.DataObject
) -> None:
    path, good = sealed
    position = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != good[position]))
    path.write_bytes(good[:position] + bytes([value]) + good[position + 1 :])
    with pytest.raises(RecordingError, match=r"damaged at byte \d+|not a recording|digest") as caught:
        read_recording(path)
    assert "\n" not in str(caught.value)


def test_every_single_flipped_bit_of_a_sealed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    good = write(path, SMALL)
    for bit in range(8 * len(good)):
        flipped = good[bit // 8] ^ 1 << bit % 8
        overwrite(path, bit // 8, flipped)
        with pytest.raises(RecordingError):
            read_recording(path)
        overwrite(path, bit // 8, good[bit // 8])
    assert path.read_bytes() == good


def overwrite(path: Path, position: int, value: int) -> None:
    with path.open("r+b") as file:  # in place: much faster than a new file
        file.seek(position)
        file.write(bytes([value]))


def test_file_torn_anywhere_is_read_up_to_the_tear(sealed: tuple[Path, bytes]) -> None:
    path, good = sealed
    numbers = []
    header_bytes = len(framed(["header", 1, "run", 12.5]))
    path.write_bytes(good)
    for num_bytes in range(len(good) - 1, header_bytes - 1, -1):
        os.truncate(path, num_bytes)
        found = read_recording(path)
        assert not found.sealed
        assert found.entries == tuple(SMALL[: len(found.entries)])
        numbers.append(len(found.entries))
    assert numbers == sorted(numbers, reverse=True)
    assert set(numbers) == set(range(len(SMALL) + 1))
    for num_bytes in range(header_bytes - 1, -1, -1):
        os.truncate(path, num_bytes)
        with pytest.raises(RecordingError, match=r"is empty|not a recording|within its header"):
            read_recording(path)


def test_zeros_after_a_power_cut_are_a_tear(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    whole = write(path, SMALL, seal=False)
    path.write_bytes(whole + bytes(5000))
    assert len(read_recording(path).entries) == len(SMALL)
    open_writer(path).close()
    assert path.read_bytes() == whole
    path.write_bytes(whole + bytes(5000) + b"x")
    with pytest.raises(RecordingError, match=f"damaged at byte {len(whole)}"):
        read_recording(path)


def test_messages_of_a_stream_come_decoded_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    messages = [RunEnded(step=step, reason="test") for step in (1, 2)]
    first, second = (entry(one.step, body=codec.encode(one)) for one in messages)
    write(path, [first, entry(1, stream=ORDERS), second])
    found = read_recording(path)
    assert messages_of(found, HISTORY) == messages
    assert entries_of(found, HISTORY) == [first, second]
    assert messages_of(found, DECISIONS) == []
    with pytest.raises(RecordingError, match=r"orders 1-1: .*version that wrote it"):
        messages_of(found, ORDERS)


def framed(*payloads: Any) -> bytes:
    return recording.MAGIC + b"".join(recording.frame_of(msgpack.packb(payload)) for payload in payloads)


HEADER = ["header", 1, "run", 0.0]
WRONG_ENTRY = [HISTORY, 1, 1, "RunEnded", "text", 0.0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"{}", "not a recording"),
        (recording.MAGIC, "ends within its header"),
        (framed(HEADER)[:-1], "ends within its header"),
        (framed(["header", 2, "run", 0.0]), "format 2"),
        (framed(["header", 1, "run"]), "wrong header"),
        (framed(["header", 1, 5, 0.0]), "wrong header"),
        (framed({"run": 1}), "not an entry"),
        (framed(HEADER, WRONG_ENTRY), "not an entry"),
        (framed(HEADER, [HISTORY, True, 1, "RunEnded", b"", 0.0]), "not an entry"),
        (framed(HEADER, [HISTORY, -1, 1, "RunEnded", b"", 0.0]), "out of order"),
        (framed(HEADER, *[[HISTORY, 1, 1, "RunEnded", b"", 0.0]] * 2), "history 1-1 is out of order"),
        (framed(HEADER, ["footer", 0, hashlib.sha256(b"").digest()]), "digest at its end differs"),
        (framed(HEADER, ["footer", 1, hashlib.sha256(framed(HEADER)).digest()]), "digest at its end differs"),
        (framed(HEADER) + recording.frame_of(b"\xc1"), "not msgpack"),
        (framed(HEADER) + recording.frame_of(b"\x91" * 5000), "not msgpack"),
    ],
    ids=itertools.count(),
)
def test_what_is_no_recording_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "recording.hpt"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=reason) as caught:
        read_recording(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_name_the_cure(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="no such file"):
        read_recording(tmp_path / "recording.hpt")
    with pytest.raises(RecordingError, match="is a folder"):
        read_recording(tmp_path)
    with pytest.raises(EnvironmentFault, match="cannot be opened: Is a directory"):
        open_writer(tmp_path)


def test_data_behind_the_footer_is_damage(sealed: tuple[Path, bytes]) -> None:
    path, good = sealed
    path.write_bytes(good + b"\0")
    with pytest.raises(RecordingError, match=f"damaged at byte {len(good)} .data behind the end"):
        read_recording(path)


def test_entries_taken_out_of_a_sealed_file_are_missed(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    good = write(path, SMALL)
    frame = recording.frame_of(recording.entry_payload(SMALL[1]))
    assert frame in good
    path.write_bytes(good.replace(frame, b""))
    with pytest.raises(RecordingError, match="digest at its end differs"):
        read_recording(path)


def test_absurd_length_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "recording.hpt"
    head = struct.pack("<II", 0xFFFF_FFF0, 0)
    with path.open("wb") as file:
        file.write(framed(HEADER) + head + struct.pack("<I", zlib.crc32(head)))
        file.truncate(1 << 32)  # sparse
    tracemalloc.start()
    with pytest.raises(RecordingError, match="a frame of 4294967280 bytes"):
        read_recording(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
