"""results.jsonl of a race: append-only, one line per finished run. Knows runs by their identity only.

The first line of a run counts, and the last one of a run that was timed: it was timed again with more arms.
Reading drops a torn last line (a kill in the middle of a write) and says so. One writer at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import EnvironmentFault, SettingsError
from trainer_node.race.run_result import TIME, RunResult, from_json_line, to_json_line

FILE_NAME = "results.jsonl"


class Results:
    """Finished runs by identity, in the order in which they ended."""

    def __init__(self, file: BinaryIO, known: Mapping[str, RunResult], note: str) -> None:
        self._file = file
        self._known = dict(known)
        self.note = note  # about a torn line; "" = none

    @property
    def by_identity(self) -> Mapping[str, RunResult]:
        return self._known

    def append(self, result: RunResult) -> None:
        """On disk when this returns. A run that is there already is left as it is, unless it is timed."""
        if result.key.identity in self._known and result.key.purpose != TIME:
            return
        try:
            self._file.write(to_json_line(result).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise EnvironmentFault(f"{self._file.name}: cannot be written: {error.strerror}") from None
        self._known[result.key.identity] = result


@contextmanager
def open_results(folder: Path) -> Iterator[Results]:
    """The results of a race folder, for reading and appending.

    Raises SettingsError when another race writes there or a line in the middle is damaged,
    EnvironmentFault when the folder cannot be written.
    """
    path = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be written: {error.strerror}") from None
    with file:
        _lock(file)
        known, good_bytes, note = read_results(path)
        file.truncate(good_bytes)
        yield Results(file, known, note)


def read_results(path: Path) -> tuple[dict[str, RunResult], int, str]:
    """(results by identity, bytes of whole lines, note about a torn last line)."""
    content = path.read_bytes() if path.is_file() else b""
    whole, _, torn = content.rpartition(b"\n")
    known: dict[str, RunResult] = {}
    for number, line in enumerate(whole.splitlines() if whole else (), start=1):
        try:
            result = from_json_line(line.decode())
        except ValueError:
            raise SettingsError(
                f"{path}, line {number}: not a result of this version; remove that line or race into"
                " another folder (--out)"
            ) from None
        if result.key.purpose == TIME or result.key.identity not in known:
            known[result.key.identity] = result
    note = f"{path}: a torn last line was dropped; that run is made again" if torn else ""
    return known, len(content) - len(torn), note


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:  # a system without it: nobody guards against two races in one folder
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SettingsError(f"{file.name}: another race is writing there; choose another --out") from None
