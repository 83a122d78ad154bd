"""provenance.json: the code that a run is made with, written at its start. Reads git; never changes it.

The commit alone does not say what ran: the difference to it goes along, of tracked files, cut off where it is
long. Without git, or outside of a checkout, both are empty texts or null.
"""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = "provenance.json"
PACKAGES = ("hybrid-predict-trainer", "torch", "numpy", "redis", "msgpack", "tokenizers")
MAX_DIFF_CHARACTERS = 100_000
GIT_SECONDS = 10.0  # a checkout on a slow disk must not hold up the first step for longer


def provenance() -> dict[str, Any]:
    """`git_diff` is None where there is no commit to compare with."""
    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD") if _is_checkout(root) else None
    diff = _git(root, "diff", "--no-color", "--no-ext-diff", "HEAD", "--", ".") if commit else None
    if diff is not None and len(diff) > MAX_DIFF_CHARACTERS:
        diff = diff[:MAX_DIFF_CHARACTERS] + "\n(cut off here)\n"
    return {
        "git_commit": (commit or "").strip(),
        "git_diff": diff,
        "versions": {"python": platform.python_version(), **versions()},
    }


def write_provenance(made_with: dict[str, Any], run_path: Path) -> None:
    """Whole or not at all. A disk that takes no file is not this module's to report: the run goes on."""
    temporary = run_path / f".{FILE}.tmp"
    try:
        temporary.write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")
        temporary.replace(run_path / FILE)
    except OSError:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _is_checkout(root: Path) -> bool:
    """Of this project: a package that is installed somewhere below another project's checkout is none."""
    top = _git(root, "rev-parse", "--show-toplevel")
    return top is not None and Path(top.rstrip("\n")).resolve() == root


def _git(root: Path, *arguments: str) -> str | None:
    """What git says; None where it is not there, too slow or refuses."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(root), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.decode("utf-8", "replace") if found.returncode == 0 else None
