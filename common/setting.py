"""How one key of a run file is declared: a dataclass field that knows its default, meaning and range.

Checks nothing: common/config.py does, from what is declared here.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field that knows its meaning and range (inclusive)."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices})


def table(kind: type) -> Any:
    """A nested TOML table."""
    return field(default_factory=kind, metadata={"table": kind})
