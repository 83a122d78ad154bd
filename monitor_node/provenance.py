"""With which code and settings a run is made, from its folder where that is on this machine. Never runs git.

The trainer leaves provenance.json at its start (trainer_node/provenance.py) and summary.json at its end. Both
are read as data from elsewhere: bounded, strict, and unknown where they are not as expected.
"""

from __future__ import annotations

import json
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("provenance.json", "summary.json")  # the first that is there
MAX_FILE_BYTES = 1 << 20
MAX_CHARACTERS = 100_000  # of one text
MAX_VERSIONS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """None = unknown."""

    git_commit: str | None = None
    git_diff: str | None = None  # "" = the checkout was as committed
    versions: str | None = None  # one "name version" a line


UNKNOWN = Provenance()


def provenance_section(found: Provenance, settings_toml: str | None) -> dict[str, Any]:
    return {
        "git_commit": found.git_commit,
        "git_diff": found.git_diff,
        "config_toml": settings_toml,
        "versions": found.versions,
    }


def provenance_of(text: str) -> Provenance:
    """From the JSON text of one of FILES. UNKNOWN for anything else."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return UNKNOWN
    if not isinstance(told, dict):
        return UNKNOWN
    versions = told.get("versions")
    lines = None
    if isinstance(versions, dict):
        pairs = [(n, v) for n, v in versions.items() if isinstance(v, str)][:MAX_VERSIONS]
        lines = "\n".join(f"{name} {version}"[:200] for name, version in pairs)
    return Provenance(
        git_commit=_text(told.get("git_commit")) or None,
        git_diff=_text(told.get("git_diff")),
        versions=lines or None,
    )


def _text(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    return value if len(value) <= MAX_CHARACTERS else value[:MAX_CHARACTERS] + "\n(cut off here)\n"


class ProvenanceReader:
    """A file is read again only when it has changed. Its thread lives while it reads: a disk may hang."""

    def __init__(self, run_folder: Path | None) -> None:
        """`run_folder` None: the run is on another machine, and nothing is known of it."""
        self._run_folder = run_folder
        self._read_at: tuple[str, int] | None = None  # (file, its time of change in ns)
        self._found = UNKNOWN
        self._thread: threading.Thread | None = None

    def look(self) -> Provenance:
        """What is known so far. Never waits; begins the next look. At most once a second."""
        if self._run_folder is not None and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self.look_now, name="provenance", daemon=True)
            self._thread.start()
        return self._found

    def look_now(self) -> Provenance:
        """In this thread: it takes as long as the disk does. UNKNOWN for a run of another machine."""
        if self._run_folder is None:
            return UNKNOWN
        for name in FILES:
            try:
                path = self._run_folder / name
                facts = path.stat()
                is_new = (name, facts.st_mtime_ns) != self._read_at
                if is_new and stat.S_ISREG(facts.st_mode) and facts.st_size <= MAX_FILE_BYTES:
                    self._found = provenance_of(path.read_text(encoding="utf-8", errors="replace"))
                    self._read_at = (name, facts.st_mtime_ns)
            except OSError:
                continue
            return self._found
        return self._found
