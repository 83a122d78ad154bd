"""One checkpoint to be made durable: its files out of a shared buffer, the seal, then retention.

Owns the order of these and which older folders may go. Imports no torch and knows no tensor, so that a small
process (folder_process.py) can do it beside the training; a thread may as well. Removes nothing before a
newer folder that stays was read back whole, and nothing of a newer generation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import sealed_folder
from common.errors import CheckpointError, EnvironmentFault
from common.sealed_folder import age_key, is_emergency

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePart:
    """A file as it lies in the buffer."""

    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderJob:
    root: str
    name: str
    facts: dict[str, Any]  # into the manifest
    keep: int
    best_name: str
    parts: tuple[FilePart, ...] = ()  # none: the files lie in the temporary folder already

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def job_from_json(values: dict[str, Any]) -> FolderJob:
    return FolderJob(**{**values, "parts": tuple(FilePart(**part) for part in values["parts"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderDone:
    """What the disk looks like afterwards; None = it would not say."""

    num_bytes: int | None  # of the new folder
    free_bytes: int | None
    damaged: str = ""  # folders that were to stay and do not read back whole, for people


def carry_out(job: FolderJob, buffer: int | None) -> FolderDone:
    """`buffer` is the descriptor that `parts` lie in.

    May be called again for a job that was cut off. Raises EnvironmentFault when nothing was sealed; then all
    older folders are as they were.
    """
    root = Path(job.root)
    digests: dict[str, str] = {}
    if job.parts:
        assert buffer is not None, "parts lie in a buffer"
        temporary = sealed_folder.begin(root, job.name)
        try:
            digests = {part.name: _copy(buffer, part, temporary / part.name) for part in job.parts}
        except OSError as error:
            sealed_folder.remove(temporary)
            raise EnvironmentFault(
                f"{root / job.name}: not saved: {error.strerror}; free space, older ones are intact"
            ) from None
    else:
        temporary = sealed_folder.temporary_of(root, job.name)
    sealed = root / job.name
    if job.parts or not sealed_folder.was_put_in_place(temporary):
        sealed_folder.seal(temporary, job.facts, digests)
    return _measured(sealed, damaged=_make_room(job))


def _copy(buffer: int, part: FilePart, target: Path) -> str:
    """SHA-256 of what was in the buffer: a disk that wrote something else is found when it is read back."""
    digest = hashlib.sha256()
    with target.open("wb", buffering=0) as file:
        for start in range(0, part.num_bytes, _CHUNK_BYTES):
            chunk = os.pread(buffer, min(_CHUNK_BYTES, part.num_bytes - start), part.offset + start)
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
    return digest.hexdigest()


def _make_room(job: FolderJob) -> str:
    """What was found damaged on the way."""
    root, (generation, _) = Path(job.root), age_key(job.name)
    sealed_folder.remove_unfinished(root, until_generation=generation)
    found = sealed_folder.folders(root)
    going = superfluous(found, keep=job.keep, best_name=job.best_name, looks_whole=sealed_folder.looks_whole)
    going = [folder for folder in going if age_key(folder.name)[0] <= generation]
    if not going:
        return ""
    is_one_good, reasons = _read_back([folder for folder in found if folder not in going])
    if is_one_good:
        for folder in going:
            sealed_folder.remove(folder)
    else:
        reasons.append("no checkpoint that is to stay reads back whole, so no older one was removed")
    return "; ".join(reasons)


def _read_back(newest_first: Sequence[Path]) -> tuple[bool, list[str]]:
    """Whether one of them is good, and what is wrong with those before it."""
    reasons: list[str] = []
    for folder in newest_first:
        try:
            sealed_folder.verify(folder)
        except (CheckpointError, OSError) as error:
            reasons.append(str(error))
        else:
            return True, reasons
    return False, reasons


def superfluous(
    newest_first: Sequence[Path], *, keep: int, best_name: str, looks_whole: Callable[[Path], bool]
) -> list[Path]:
    """Beyond the `keep` newest ordinary ones, the newest emergency and the best. Pure.

    What does not look whole takes nobody's place, and goes with those that are older than the kept ones.
    """
    going: list[Path] = []
    left = {False: keep, True: 1}  # by is_emergency
    for folder in newest_first:
        kind = is_emergency(folder.name)
        if left[kind] <= 0:
            going.append(folder)
        elif looks_whole(folder):
            left[kind] -= 1
    return [folder for folder in going if folder.name != best_name]


def _measured(sealed: Path, *, damaged: str) -> FolderDone:
    num_bytes, free_bytes = None, None
    with contextlib.suppress(OSError):
        num_bytes = sum(path.stat().st_size for path in sealed.iterdir())
        free_bytes = shutil.disk_usage(sealed.parent).free
    return FolderDone(num_bytes=num_bytes, free_bytes=free_bytes, damaged=damaged)
