"""Writes the file of common/recording.py: append, flush, seal; goes on with an existing file.

An existing file is verified from start to end first. Its torn end or its footer is cut off, and
recording goes on behind the last whole entry; `last_ids` tells from where. Entries that are there
already are skipped, so reading a stream again does no harm. One writer per file (a lock says so).
A write that fails leaves the file as it was and the entries in memory: flush again later.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from common import recording
from common.bus import STREAM_START, Entry, EntryId
from common.errors import EnvironmentFault, RecordingError
from common.recording import MAGIC, Scan, frame_of


class RecordingWriter:
    """Not thread-safe. Ends with `seal`, or with `close` for a file that is to be gone on with."""

    def __init__(self, path: Path, *, run_id: str, created_unix_seconds: float) -> None:
        """Raises RecordingError for a file that is damaged, in use or of another run, EnvironmentFault."""
        self.path = path
        self._buffer = bytearray()
        self._unsynced = False
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as error:
            raise self._fault("cannot be opened", error) from None
        try:
            _lock(self._descriptor, path)
            if os.fstat(self._descriptor).st_size:
                self._scan = self._reopened(run_id)
            else:
                self._scan = self._begun(run_id, created_unix_seconds)
        except OSError as error:
            os.close(self._descriptor)
            raise self._fault("cannot be gone on with", error) from None
        except BaseException:
            os.close(self._descriptor)
            raise
        self._open = True

    @property
    def last_ids(self) -> Mapping[str, EntryId]:
        """Last recorded id of each stream."""
        return dict(self._scan.last_ids)

    @property
    def num_entries(self) -> int:
        return self._scan.num_entries

    @property
    def waiting_bytes(self) -> int:
        """Appended but not in the file yet."""
        return len(self._buffer)

    def append(self, entry: Entry) -> bool:
        """Take an entry; False if it is there already. In the file after `flush`.

        Raises BodyTooLarge for an entry that no message of ours can be.
        """
        if entry.id <= self._scan.last_ids.get(entry.stream, STREAM_START):
            return False
        self._put(recording.entry_payload(entry))
        self._scan.last_ids[entry.stream] = entry.id
        self._scan.num_entries += 1
        return True

    def flush(self, *, sync: bool = True) -> None:
        """Write what was appended; with `sync` it survives a power cut. Raises EnvironmentFault."""
        if self._buffer:
            self._write_buffer()
        if sync and self._unsynced:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise self._fault("cannot be written", error) from None
            self._unsynced = False

    def seal(self) -> None:
        """Write the footer and close. Does nothing on a closed writer. Raises EnvironmentFault."""
        if not self._open:
            return
        self.flush(sync=False)
        entries_bytes = self._scan.good_bytes
        self._buffer += frame_of(recording.footer_payload(self._scan))
        try:
            self.flush()
        except EnvironmentFault:
            self._buffer.clear()  # entries may follow after all
            self._scan.good_bytes = entries_bytes
            with contextlib.suppress(OSError):
                self._cut(entries_bytes)
            raise
        self._release()

    def close(self) -> None:
        """Flush and close without a footer. May be called again. Raises EnvironmentFault."""
        if self._open:
            try:
                self.flush()
            finally:
                self._release()

    def _release(self) -> None:
        self._open = False
        os.close(self._descriptor)

    def _begun(self, run_id: str, created_unix_seconds: float) -> Scan:
        payload = recording.header_payload(run_id, created_unix_seconds)
        scan = Scan(
            run_id=run_id,
            created_unix_seconds=created_unix_seconds,
            good_bytes=0,
            digest=hashlib.sha256(),
            num_entries=0,
            last_ids={},
        )
        self._scan = scan
        self._buffer += MAGIC + frame_of(payload)
        scan.digest.update(self._buffer)
        self.flush()
        return scan

    def _reopened(self, run_id: str) -> Scan:
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            scan = recording.open_scan(file, self.path)
            if scan.run_id != run_id:
                raise RecordingError(
                    f"{self.path}: is of run {scan.run_id}, not {run_id}; give another file name"
                )
            for _ in recording.scan_entries(file, self.path, scan):
                pass  # the scan is what we are after
        self._cut(scan.good_bytes)
        scan.sealed = False
        return scan

    def _put(self, payload: bytes) -> None:
        frame = frame_of(payload)
        self._buffer += frame
        self._scan.digest.update(frame)

    def _write_buffer(self) -> None:
        waiting = memoryview(bytes(self._buffer))
        written_bytes = 0
        try:
            while written_bytes < len(waiting):
                written_bytes += os.write(self._descriptor, waiting[written_bytes:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut(self._scan.good_bytes)
            raise self._fault("cannot be written", error) from None
        self._buffer.clear()
        self._scan.good_bytes += written_bytes
        self._unsynced = True

    def _cut(self, num_bytes: int) -> None:
        os.ftruncate(self._descriptor, num_bytes)
        os.lseek(self._descriptor, num_bytes, os.SEEK_SET)

    def _fault(self, what: str, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            f"{self.path}: {what}: {error.strerror or error}; free space there or make it writable"
        )


def _lock(descriptor: int, path: Path) -> None:
    """One writer per file; the lock goes with the process."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordingError(f"{path}: another process records into it; give another file name") from None
