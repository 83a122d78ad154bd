"""A folder that is either whole or not there: how every checkpoint is written and read.

Write: files into `<name>.tmp`, fsync each, `manifest.json` last (SHA-256 and size of each file),
fsync the folder, rename, fsync the parent. A folder that has the name already changes places with the new
one in one step. Read: only what the manifest vouches for. Neither torch nor safetensors notices a flipped
byte in a tensor (systems.md, finding 7); the manifest does.
Names are `step-<8 digits>.gen-<n>[.emergency]`; newer = higher generation, then higher step.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, EnvironmentFault

MANIFEST = "manifest.json"
FORMAT = 2  # 1 had no digest of the manifest itself
_OWN_DIGEST = "manifest_sha256"
_NAME = re.compile(r"step-(\d{8,})\.gen-(\d+)(\.emergency)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
_MAX_MANIFEST_BYTES = 1 << 20  # what is cut there is no JSON any more
_CHUNK_BYTES = 1 << 20
_UNFINISHED = ".tmp"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def folder_name(step: int, generation: int, *, emergency: bool = False) -> str:
    return f"step-{step:08d}.gen-{generation}" + (".emergency" if emergency else "")


def age_key(name: str) -> tuple[int, int]:
    """(generation, step) of a folder name; raises ValueError for another name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a checkpoint")
    return int(match[2]), int(match[1])


def is_emergency(name: str) -> bool:
    return name.endswith(".emergency")


def folders(root: Path) -> list[Path]:
    """Sealed folders below `root`, newest first. Not verified."""
    if not root.is_dir():
        return []
    named = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    # At the same step an emergency checkpoint is the later one.
    return sorted(named, key=lambda path: (*age_key(path.name), is_emergency(path.name)), reverse=True)


def temporary_of(root: Path, name: str) -> Path:
    """Where the files of a folder lie until it is sealed."""
    return root / f"{name}{_UNFINISHED}"


def begin(root: Path, name: str) -> Path:
    """An empty temporary folder to write files into. Raises EnvironmentFault."""
    temporary = temporary_of(root, name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise EnvironmentFault(f"{temporary}: cannot be created: {error.strerror}") from None
    return temporary


def seal(temporary: Path, facts: dict[str, Any], digests: Mapping[str, str] | None = None) -> Path:
    """Make the folder durable and give it its name. Raises EnvironmentFault; then nothing is sealed.

    `digests` are SHA-256 of what should be in the files; those of others are taken from the files.
    """
    target = temporary.with_name(temporary.name.removesuffix(_UNFINISHED))
    known = digests or {}
    try:
        files = {}
        for path in sorted(path for path in temporary.iterdir() if path.name != MANIFEST):
            _fsync(path)
            digest = known.get(path.name) or sha256_of(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        manifest = {"format": FORMAT, "name": target.name, "files": files, **facts}
        manifest_path = temporary / MANIFEST
        manifest_path.write_text(manifest_text(manifest), encoding="utf-8")
        _fsync(manifest_path)
        _fsync(temporary)
        _put_in_place(temporary, target)
        _fsync(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EnvironmentFault(
            f"{target}: not saved: {error.strerror}; free space, older ones are intact"
        ) from None
    shutil.rmtree(temporary, ignore_errors=True)  # the one that had the name before
    return target


def was_put_in_place(temporary: Path) -> bool:
    """Whether a `seal` of this folder that was cut off had come to its end but for cleaning up."""
    target = temporary.with_name(temporary.name.removesuffix(_UNFINISHED))
    if not (target / MANIFEST).is_file():
        return False
    if not temporary.is_dir():
        return True
    former = temporary / MANIFEST  # that of the older one if the two have changed places
    return former.is_file() and former.stat().st_mtime_ns < (target / MANIFEST).stat().st_mtime_ns


def _put_in_place(temporary: Path, target: Path) -> None:
    """At no instant is there nothing under a name that was taken, where the file system can exchange two."""
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        shutil.rmtree(target)
        temporary.rename(target)


def _exchange(left: Path, right: Path) -> bool:
    """Two names in one step; False where the system has no such call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    code = rename(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE)
    return bool(code == 0)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """What is written: with a digest, so that a changed fact is found as a changed file is."""
    return json.dumps({**manifest, _OWN_DIGEST: _own_digest(manifest)}, indent=1, sort_keys=True)


def _own_digest(manifest: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in manifest.items() if key != _OWN_DIGEST}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file it names was found unchanged. Raises CheckpointError."""
    try:
        with (folder / MANIFEST).open("rb") as opened:
            manifest = json.loads(opened.read(_MAX_MANIFEST_BYTES))
        files = manifest["files"]
        wrong_format = manifest["format"] not in (1, FORMAT)
        is_changed = manifest["format"] == FORMAT and manifest[_OWN_DIGEST] != _own_digest(manifest)
        wanted = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
        if not all(_FILE_NAME.fullmatch(name) for name in wanted):
            raise ValueError("a name that no file of ours has")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}: not a checkpoint, or never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged; use an older checkpoint") from None
    if wrong_format:
        raise CheckpointError(
            f"{folder}: format {str(manifest['format'])[:20]!r} is not {FORMAT}; use the version"
            " that wrote it"
        )
    if is_changed:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged; use an older checkpoint")
    for name, (size_bytes, digest) in wanted.items():
        path = folder / name
        try:
            if path.parent != folder or not path.is_file():
                raise CheckpointError(f"{folder}: {name} is missing; use an older checkpoint")
            if path.stat().st_size != size_bytes:
                raise CheckpointError(f"{folder}: {name} is cut or too long; use an older checkpoint")
            if sha256_of(path) != digest:
                raise CheckpointError(f"{folder}: {name} is damaged; use an older checkpoint")
        except (OSError, ValueError) as error:  # a bad sector, or no name of a file
            raise CheckpointError(f"{folder}: {name!r} cannot be read ({error})") from None
    for path in folder.iterdir():
        if path.name not in {MANIFEST, *wanted} and not path.name.startswith("."):
            raise CheckpointError(
                f"{folder}: {path.name!r} is not in {MANIFEST}; remove it or use an older checkpoint"
            )
    return dict(manifest)


def looks_whole(folder: Path) -> bool:
    """By names and sizes alone; a flipped byte is not seen."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def remove(folder: Path) -> None:
    """Delete a folder so that a half-deleted one is never taken for whole: the manifest goes first."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(root: Path, *, until_generation: int) -> None:
    """What writers that were killed left behind. Those of a newer generation are at work."""
    for path in root.iterdir():
        name = path.name.removesuffix(_UNFINISHED)
        if name != path.name and _NAME.fullmatch(name) and age_key(name)[0] <= until_generation:
            shutil.rmtree(path, ignore_errors=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
