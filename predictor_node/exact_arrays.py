"""Arrays of float64 inside JSON, bit for bit: base64 of their little-endian bytes with the shape beside it.

A list of numbers would be exact too, but five times as long and a line each in a readable file.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[np.float64]]


def pack(array: Array) -> dict[str, object]:
    """JSON-able; `unpack` gives the same bits back."""
    content = np.ascontiguousarray(array, dtype="<f8").tobytes()
    return {"shape": list(array.shape), "float64": base64.b64encode(content).decode("ascii")}


def unpack(packed: Mapping[str, Any], *, shape: tuple[int, ...]) -> Array:
    """A fresh array. Raises CheckpointError when it is not one of this shape."""
    try:
        content = base64.b64decode(packed["float64"], validate=True)
        found = tuple(packed["shape"])
        array = np.frombuffer(content, dtype="<f8").reshape(found).astype(np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged array in the predictor's state: {error}") from None
    if found != shape:
        raise CheckpointError(f"the predictor's state holds an array of shape {found}, not {shape}")
    return array
