"""What the tests of recordings share: small entries, and files made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.bus import Entry, EntryId
from common.recording_writer import RecordingWriter
from common.streams import DECISIONS, HISTORY, ORDERS

STREAMS = (HISTORY, DECISIONS, ORDERS)


def open_writer(path: Path, run_id: str = "run") -> RecordingWriter:
    return RecordingWriter(path, run_id=run_id, created_unix_seconds=12.5)


def write(path: Path, entries: Sequence[Entry], *, seal: bool = True) -> bytes:
    path.unlink(missing_ok=True)
    writer = open_writer(path)
    for entry in entries:
        assert writer.append(entry)
    writer.seal() if seal else writer.close()
    return path.read_bytes()


def entry(sequence: int, *, stream: str = HISTORY, body: bytes = b"body", generation: int = 1) -> Entry:
    return Entry(stream, EntryId(generation, sequence), "RunEnded", body, 100.0 + sequence)


SMALL = [entry(1), entry(1, stream=DECISIONS, body=bytes(8)), entry(2, body=b""), entry(1, generation=2)]
