"""NaN and infinity in JSON, which has neither: written as {"float": "nan"}. Reads and writes no file."""

from __future__ import annotations

import math
from typing import Any


def without_nan(value: Any) -> Any:
    """Numbers that JSON does not know become {"float": ...}; tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def with_nan(value: Any) -> Any:
    """The reverse."""
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {key: with_nan(item) for key, item in value.items()}
    return [with_nan(item) for item in value] if isinstance(value, list) else value
