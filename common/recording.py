"""A run's streams as one file, `recording.hpt`: append-only, checked, readable after a crash.

    magic, header frame, entry frames ..., footer frame (only when sealed)
    frame   = length u32, crc32 of payload u32, crc32 of these 8 bytes u32, payload (little endian)
    header  = msgpack ["header", format version, run_id, created unix seconds]
    entry   = msgpack [stream, generation, sequence, kind, body, sent unix seconds]
    footer  = msgpack ["footer", number of entries, sha256 of all bytes before this frame]

Entries of one stream are in the order of their ids; across streams in the order of arrival at the
recorder. A file that ends within a frame was torn by a crash: it is readable up to there and not
`sealed`. Everything else that does not fit is damage, and a RecordingError. The frame head has a
checksum of its own because otherwise a flipped bit in a length would look like a tear.
Reads and writes entries as opaque bytes; only `messages_of` looks into them.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

from common import codec
from common.bus import STREAM_START, Entry, EntryId
from common.errors import BodyTooLarge, CodecError, RecordingError
from common.messages import Message

FORMAT_VERSION = 1
MAGIC = b"\x89HPTREC\n"  # not valid UTF-8, so that no tool takes it for text
MAX_FRAME_BYTES = 300 * 1024  # codec.MAX_BODY_BYTES and room for the envelope
_ENTRY_FIELDS = 6
_HEAD = struct.Struct("<III")
_ZERO_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    run_id: str
    created_unix_seconds: float
    entries: tuple[Entry, ...]
    sealed: bool  # False: the recorder did not end properly; the last entries may be missing
    last_ids: Mapping[str, EntryId]


@dataclass(slots=True)
class Scan:
    """What reading a file from its start has found so far. `good_bytes` ends the last whole entry."""

    run_id: str
    created_unix_seconds: float
    good_bytes: int
    digest: Any  # hashlib object over the first `good_bytes`
    num_entries: int
    last_ids: dict[str, EntryId]
    sealed: bool = False


def read_recording(path: Path) -> Recording:
    """All entries of a file. Raises RecordingError with one line that names the cure."""
    try:
        with path.open("rb") as file:
            scan = open_scan(file, path)
            entries = tuple(scan_entries(file, path, scan))
    except OSError as error:
        raise RecordingError(_unreadable(path, error)) from None
    return Recording(
        run_id=scan.run_id,
        created_unix_seconds=scan.created_unix_seconds,
        entries=entries,
        sealed=scan.sealed,
        last_ids=dict(scan.last_ids),
    )


def entries_of(recording: Recording, stream: str) -> list[Entry]:
    """The entries of one stream, in the order of their ids."""
    return [entry for entry in recording.entries if entry.stream == stream]


def messages_of(recording: Recording, stream: str) -> list[Message]:
    """The messages of one stream. Raises RecordingError if one is not of this program's schema."""
    messages: list[Message] = []
    for entry in entries_of(recording, stream):
        try:
            messages.append(codec.decode_entry(entry))
        except CodecError as error:
            raise RecordingError(
                f"{stream} {entry.id}: {error}; read the recording with the version that wrote it"
            ) from None
    return messages


def open_scan(file: BinaryIO, path: Path) -> Scan:
    """Check magic and header; the file is then at its first entry."""
    magic = file.read(len(MAGIC))
    if not magic:
        raise RecordingError(f"{path}: is empty; nothing was recorded, record the run again")
    if magic != MAGIC:
        raise RecordingError(f"{path}: not a recording; give the recording.hpt of a run folder")
    payload = _read_frame(file, path, len(MAGIC))
    if payload is None:
        raise RecordingError(f"{path}: ends within its header; nothing was recorded, record the run again")
    header = _unpacked(payload, path, len(MAGIC))
    if len(header) < 2 or header[0] != "header" or type(header[1]) is not int:
        raise _damaged(path, len(MAGIC), "no header")
    if header[1] != FORMAT_VERSION:
        raise RecordingError(
            f"{path}: recording format {header[1]}, this program reads {FORMAT_VERSION};"
            " use the version that wrote it"
        )
    if [type(part) for part in header[2:]] != [str, float]:
        raise _damaged(path, len(MAGIC), "wrong header")
    good_bytes = len(MAGIC) + _HEAD.size + len(payload)
    digest = hashlib.sha256(MAGIC + frame_of(payload))
    return Scan(
        run_id=header[2],
        created_unix_seconds=header[3],
        good_bytes=good_bytes,
        digest=digest,
        num_entries=0,
        last_ids={},
    )


def scan_entries(file: BinaryIO, path: Path, scan: Scan) -> Iterator[Entry]:
    """Entries up to the footer, the end or a tear; `scan` follows. Raises RecordingError on damage."""
    while (payload := _read_frame(file, path, scan.good_bytes)) is not None:
        fields = _unpacked(payload, path, scan.good_bytes)
        if fields and fields[0] == "footer" and len(fields) == 3:
            _check_footer(file, path, scan, fields)
            scan.sealed = True
            return
        entry = _entry_of(fields, path, scan.good_bytes)
        if entry.id <= scan.last_ids.get(entry.stream, STREAM_START):
            raise _damaged(
                path, scan.good_bytes, f"{ascii(entry.stream[:80])[1:-1]} {entry.id} is out of order"
            )
        scan.last_ids[entry.stream] = entry.id
        scan.digest.update(frame_of(payload))
        scan.num_entries += 1
        scan.good_bytes += _HEAD.size + len(payload)
        yield entry


def frame_of(payload: bytes) -> bytes:
    head = struct.pack("<II", len(payload), zlib.crc32(payload))
    return head + struct.pack("<I", zlib.crc32(head)) + payload


def header_payload(run_id: str, created_unix_seconds: float) -> bytes:
    return _packed(["header", FORMAT_VERSION, run_id, float(created_unix_seconds)])


def footer_payload(scan: Scan) -> bytes:
    return _packed(["footer", scan.num_entries, scan.digest.digest()])


def entry_payload(entry: Entry) -> bytes:
    """Raises BodyTooLarge for what no reader would take."""
    fields = [entry.stream, entry.id.generation, entry.id.sequence, entry.kind, entry.body]
    payload = _packed([*fields, float(entry.sent_unix_seconds)])
    if len(payload) > MAX_FRAME_BYTES:
        raise BodyTooLarge(f"{entry.stream} {entry.id} takes {len(payload)} bytes in a recording")
    return payload


def _packed(fields: list[Any]) -> bytes:
    packed = msgpack.packb(fields)
    assert isinstance(packed, bytes)
    return packed


def _unpacked(payload: bytes, path: Path, position: int) -> list[Any]:
    try:
        fields = msgpack.unpackb(payload, max_array_len=_ENTRY_FIELDS, max_map_len=_ENTRY_FIELDS)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        raise _damaged(path, position, "not msgpack") from None
    if type(fields) is not list:
        raise _damaged(path, position, "not an entry")
    return fields


def _entry_of(fields: list[Any], path: Path, position: int) -> Entry:
    if [type(part) for part in fields] != [str, int, int, str, bytes, float]:
        raise _damaged(path, position, "not an entry")
    stream, generation, sequence, kind, body, sent_unix_seconds = fields
    return Entry(stream, EntryId(generation, sequence), kind, body, sent_unix_seconds)


def _read_frame(file: BinaryIO, path: Path, position: int) -> bytes | None:
    """Payload of the frame that begins here; None at the end of the file or at a tear."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    num_bytes, payload_crc, head_crc = _HEAD.unpack(head)
    if zlib.crc32(head[:8]) != head_crc:
        if not any(head) and _only_zeros(file):  # what some file systems leave after a power cut
            return None
        raise _damaged(path, position, "wrong checksum")
    if num_bytes > MAX_FRAME_BYTES:  # before anything of that size is read
        raise _damaged(path, position, f"a frame of {num_bytes} bytes")
    payload = file.read(num_bytes)
    if len(payload) < num_bytes:
        return None
    if zlib.crc32(payload) != payload_crc:
        if not any(payload) and _only_zeros(file):
            return None
        raise _damaged(path, position, "wrong checksum")
    return payload


def _only_zeros(file: BinaryIO) -> bool:
    while piece := file.read(_ZERO_PIECE_BYTES):
        if any(piece):
            return False
    return True


def _check_footer(file: BinaryIO, path: Path, scan: Scan, fields: list[Any]) -> None:
    if fields[1] != scan.num_entries or fields[2] != scan.digest.digest():
        raise RecordingError(f"{path}: the digest at its end differs; it was changed, copy it again")
    if file.read(1):
        raise _damaged(path, file.tell() - 1, "data behind the end")


def _damaged(path: Path, position: int, what: str) -> RecordingError:
    return RecordingError(f"{path}: damaged at byte {position} ({what}); copy it again or record again")


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file; a run's recording is runs/RUN_ID/recording.hpt"
    if isinstance(error, IsADirectoryError):
        return f"{path}: is a folder; give the recording.hpt in it"
    return f"{path}: cannot be read: {error.strerror or error}"
