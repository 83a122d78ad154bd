"""Looks whether the checkpoints that the trainer told of are on this disk, and whole.

Owns one thread that lives while it looks: a disk that hangs or a folder of many gigabytes never holds up the
caller. Each folder is read once, the newest first, and after a read of t seconds the disk has peace for 30 t,
so that a monitor stays below a thirtieth of a core. Never writes; follows no name that is not a checkpoint's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import sealed_folder
from common.errors import CheckpointError
from common.messages import CheckpointWritten
from common.sealed_folder import MANIFEST

WRITTEN, VERIFIED, DAMAGED, GONE = "written", "verified", "damaged", "gone"
MAX_ROWS = 12
PEACE_TIMES = 30.0
_WHY_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRow:
    """The trainer's word."""

    written: CheckpointWritten
    at_unix_seconds: float
    at_seconds: float  # of the monitor's own monotonic clock


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the disk says of one folder."""

    state: str
    num_bytes: int | None = None
    why: str | None = None


def checkpoint_rows(rows: Sequence[CheckpointRow], found: dict[str, Found]) -> list[dict[str, Any]]:
    """Newest first, at most MAX_ROWS. What was not looked at is as the trainer said."""
    return [
        {
            "name": row.written.name,
            "step": row.written.step,
            "emergency": row.written.emergency,
            "at_unix_seconds": row.at_unix_seconds,
            "num_bytes": at_disk.num_bytes,
            "state": at_disk.state,
            "why": at_disk.why,
        }
        for row in list(reversed(rows))[:MAX_ROWS]
        for at_disk in (found.get(row.written.name, Found(state=WRITTEN)),)
    ]


def with_row(rows: Sequence[CheckpointRow], row: CheckpointRow) -> tuple[CheckpointRow, ...]:
    """A name that is told again takes the place of the former one. Oldest first, at most MAX_ROWS."""
    others = [known for known in rows if known.written.name != row.written.name]
    return (*others, row)[-MAX_ROWS:]


class CheckpointChecks:
    """`look` at most once a second; what it found comes with one of the next calls."""

    def __init__(self, run_folder: Path | None, *, now_seconds: Callable[[], float] = time.monotonic) -> None:
        """`run_folder` None: the run is on another machine, and nothing is known of its disk."""
        self._root = None if run_folder is None else run_folder / "checkpoints" / "trainer"
        self._now_seconds = now_seconds
        self._found: dict[str, Found] = {}  # replaced as a whole, by the thread
        self._thread: threading.Thread | None = None
        self._next_read_seconds = now_seconds()

    def look(self, names: Sequence[str]) -> dict[str, Found]:
        """What is known of `names` (newest first) so far. Never blocks; begins the next look."""
        if self._root is None:
            return {}
        if self._thread is None or not self._thread.is_alive():
            wanted = [name for name in names if _is_checkpoint(name)][:MAX_ROWS]
            self._thread = threading.Thread(
                target=self._look, args=(self._root, wanted), name="checkpoints", daemon=True
            )
            self._thread.start()
        return self._found

    def look_at_all(self, names: Sequence[str]) -> dict[str, Found]:
        """Read every folder now, in this thread: it takes as long as the disk does."""
        if self._root is None:
            return {}
        wanted = [name for name in names if _is_checkpoint(name)][:MAX_ROWS]
        for _ in wanted:
            self._next_read_seconds = self._now_seconds()  # each look reads one
            self._look(self._root, wanted)
        return self._found

    def _look(self, root: Path, names: Sequence[str]) -> None:
        """In the thread. A disk that cannot be read leaves what was known."""
        with suppress(OSError):
            if not root.is_dir():
                return  # another machine's run, or one that has not begun
            is_there = {name: (root / name / MANIFEST).is_file() for name in names}
            self._found = presence(names, is_there, self._found)
            if self._now_seconds() >= self._next_read_seconds:
                self._read_one(root, [n for n in names if is_there[n] and self._found[n].state == WRITTEN])

    def _read_one(self, root: Path, names: Sequence[str]) -> None:
        if not names:
            return
        started_seconds = self._now_seconds()
        result = examined(root / names[0])
        now_seconds = self._now_seconds()
        self._next_read_seconds = now_seconds + PEACE_TIMES * (now_seconds - started_seconds)
        self._found = {**self._found, names[0]: result}


def presence(names: Sequence[str], is_there: dict[str, bool], before: dict[str, Found]) -> dict[str, Found]:
    """What is known of `names` (newest first) when it was seen which of them are there. Pure.

    A folder that was never seen may still be on its way to the disk, unless a newer one is there.
    """
    found: dict[str, Found] = {}
    is_newer_there = False
    for name in names:
        known = before.get(name)
        if is_there[name]:
            is_newer_there = True
            seen = known is not None and known.state in (VERIFIED, DAMAGED)
            found[name] = known if known is not None and seen else Found(state=WRITTEN)
        elif is_newer_there or (known is not None and known.state != WRITTEN) or _was_seen(known):
            num_bytes = known.num_bytes if known else None
            found[name] = Found(state=GONE, num_bytes=num_bytes, why="removed: newer ones are kept")
        else:
            found[name] = Found(state=WRITTEN, why=_ON_ITS_WAY)
    return found


_ON_ITS_WAY = "not on this disk yet"


def _was_seen(known: Found | None) -> bool:
    return known is not None and known.state == WRITTEN and known.why != _ON_ITS_WAY


def examined(folder: Path) -> Found:
    """Reads every byte of it. A folder that is removed meanwhile is gone, not damaged."""
    try:
        manifest = sealed_folder.verify(folder)
        num_bytes = sum(int(file["bytes"]) for file in manifest["files"].values())
        return Found(state=VERIFIED, num_bytes=num_bytes + (folder / MANIFEST).stat().st_size)
    except (CheckpointError, OSError, RecursionError) as error:
        if not (folder / MANIFEST).is_file():
            return Found(state=GONE, why="removed: newer ones are kept")
        text = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{folder}: ")
        return Found(state=DAMAGED, why=(text or "cannot be read")[:_WHY_CHARACTERS])


def _is_checkpoint(name: str) -> bool:
    with suppress(ValueError):
        sealed_folder.age_key(name)
        return True
    return False
