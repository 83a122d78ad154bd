"""History <-> bytes (safetensors): float64 features, NaN kept bit for bit, equal bytes for equal history.

Validates shapes, types and ranges of what it reads; raises ValueError with what is wrong.
"""

from __future__ import annotations

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import SENSELESS
from common.messages import Phase
from predictor_node.history import LIMIT_STEPS, History, Row

_PHASES = tuple(Phase)


def history_to_bytes(history: History) -> bytes:
    """Arrays: rows (N, 4) int64 = step, attempt, phase index, contiguous steps; features (N, F) float64;
    counts (3) int64 = resuming, missing steps, repeats."""
    rows = [(row.step, row.attempt, _PHASES.index(row.phase), row.contiguous_steps) for row in history.rows]
    counts = (int(history.resuming), history.missing_steps, history.repeats)
    num_features = len(history.rows[0].features) if history.rows else 0
    return save(
        {
            "rows": np.array(rows, dtype=np.int64).reshape(len(rows), 4),
            "features": np.array([row.features for row in history.rows], dtype=np.float64).reshape(
                len(rows), num_features
            ),
            "counts": np.array(counts, dtype=np.int64),
        }
    )


def history_from_bytes(content: bytes) -> History:
    try:
        arrays = load(content)
    except (SafetensorError, *SENSELESS) as error:
        raise ValueError(str(error)) from None
    rows, features, counts = _checked(arrays)
    resuming, missing_steps, repeats = counts.tolist()
    return History(
        rows=tuple(
            Row(step, attempt, _PHASES[phase], tuple(values), contiguous_steps)
            for (step, attempt, phase, contiguous_steps), values in zip(
                rows.tolist(), features.tolist(), strict=True
            )
        ),
        resuming=bool(resuming),
        missing_steps=missing_steps,
        repeats=repeats,
    )


def _checked(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if set(arrays) != {"rows", "features", "counts"}:
        raise ValueError(f"history holds {sorted(arrays)}")
    rows, features, counts = arrays["rows"], arrays["features"], arrays["counts"]
    shapes_fit = rows.ndim == 2 and rows.shape[1] == 4 and counts.shape == (3,) and features.ndim == 2
    types_fit = rows.dtype == np.int64 and counts.dtype == np.int64 and features.dtype == np.float64
    if not (shapes_fit and types_fit and len(rows) == len(features) <= LIMIT_STEPS):
        raise ValueError(f"history arrays of shapes {rows.shape}, {features.shape}, {counts.shape}")
    if len(rows) and not (
        (rows >= 0).all() and (rows[:, 2] < len(_PHASES)).all() and (np.diff(rows[:, 0]) > 0).all()
    ):
        raise ValueError("history rows are out of range or out of order")
    return rows, features, counts
