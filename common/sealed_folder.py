"""A folder that is either whole or not there: how every checkpoint is written and read.

Write: files into `<name>.tmp`, fsync each, `manifest.json` last (SHA-256 and size of each file),
fsync the folder, rename, fsync the parent. Read: only what the manifest vouches for. Neither
torch nor safetensors notices a flipped byte in a tensor (systems.md, finding 7); the manifest does.
Names are `step-<8 digits>.gen-<n>[.emergency]`; newer = higher generation, then higher step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, EnvironmentFault

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.gen-(\d+)(\.emergency)?")
_CHUNK_BYTES = 1 << 20


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


def begin(root: Path, name: str) -> Path:
    """An empty temporary folder to write files into. Raises EnvironmentFault."""
    temporary = root / f"{name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise EnvironmentFault(f"{temporary}: cannot be created: {error.strerror}") from None
    return temporary


def seal(temporary: Path, facts: dict[str, Any]) -> Path:
    """Make the folder durable and give it its name. Raises EnvironmentFault; then nothing is sealed."""
    target = temporary.with_name(temporary.name.removesuffix(".tmp"))
    try:
        files = {}
        for path in sorted(temporary.iterdir()):
            _fsync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        manifest = {"format": FORMAT, "name": target.name, "files": files, **facts}
        manifest_path = temporary / MANIFEST
        manifest_path.write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        _fsync(manifest_path)
        _fsync(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _fsync(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EnvironmentFault(
            f"{target}: not saved: {error.strerror}; free space, older ones are intact"
        ) from None
    return target


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file it names was found unchanged. Raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        wrong_format = manifest["format"] != FORMAT
        wanted = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}: not a checkpoint, or never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged; use an older checkpoint") from None
    if wrong_format:
        raise CheckpointError(
            f"{folder}: format {manifest['format']!r} is not {FORMAT}; use the version that wrote it"
        )
    for name, (size_bytes, digest) in wanted.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; use an older checkpoint")
        if path.stat().st_size != size_bytes or sha256_of(path) != digest:
            raise CheckpointError(f"{folder}: {name} is damaged; use an older checkpoint")
    return dict(manifest)


def remove(folder: Path) -> None:
    """Delete a folder so that a half-deleted one is never taken for whole: the manifest goes first."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


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
