"""What the world model has lived through: ticks in order, bounded, and windows of them to learn from.

A tick is one real step, or the mean over a stride of steps; who records decides that. Owns the ticks, the
loss reference and scale that belong to each (causal: from that tick and those before it), and the running
normaliser of features. Draws no random numbers: callers hand in uniform ones. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import CheckpointError
from predictor_node.symlog import symlog

ACTION_NAMES = (
    "is_jump", "log1p_horizon_over_window", "momentum", "drift", "slow_drift", "pull_back", "is_forecaster",
    "delta_over_parameter_norm",
)  # fmt: skip
NUM_ACTIONS = len(ACTION_NAMES)
CLIP = 8.0  # standard deviations; a feature that never moved before may jump by hundreds
PRIOR_TICKS, PRIOR_VARIANCE = 16.0, 0.01  # belief about a feature's variance before any tick, symlog units
REFERENCE_RATE = 0.25  # of the running mean of the loss: about the newest four ticks
SCALE_RATE = 1.0 / 64.0
SCALE_CLIP = 8.0  # one catastrophe must not make all later changes look small
SCALE_FLOOR = 1e-5  # nats
BAG_TICKS = 8  # a bootstrap over single ticks would let every member see every stretch of the run

_COLUMNS: dict[str, tuple[str, type]] = {  # name -> trailing shape, dtype
    "features": ("F", np.float32),
    "action": ("A", np.float32),
    "drift": ("K", np.float32),
    "loss": ("", np.float64),
    "refused": ("", np.float32),
    "is_first": ("", np.bool_),
    "reference": ("", np.float64),
    "scale": ("", np.float64),
}


@dataclass(frozen=True, slots=True, eq=False)
class Tick:
    """One observation and the action that led to it."""

    features: np.ndarray  # (F) as observed, see common.features; the world model normalises
    loss: float  # nats; not finite = unknown
    action: np.ndarray  # (A) see ACTION_NAMES: what was done between the tick before and this one
    is_first: bool = False  # nothing before it belongs to it: a new run, or a restore
    drift_coefficients: np.ndarray | None = None  # (K) least squares of the window that ended here
    refused: float = math.nan  # 1 = the jump that ended here was refused, 0 = kept, NaN = there was none


class Normaliser:
    """Running mean and variance of symlog features (Welford 1962), in float64."""

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.mean_F = np.zeros(num_features)
        self.squares_F = np.zeros(num_features)  # sum of squared offsets from the mean
        self._deviation_F = self._deviations()

    def update(self, encoded_F: np.ndarray) -> None:
        self.count += 1
        offset_F = encoded_F - self.mean_F
        self.mean_F = self.mean_F + offset_F / self.count
        self.squares_F = self.squares_F + offset_F * (encoded_F - self.mean_F)
        self._deviation_F = self._deviations()

    def load(self, count: int, mean_F: np.ndarray, squares_F: np.ndarray) -> None:
        self.count, self.mean_F, self.squares_F = count, mean_F.copy(), squares_F.copy()
        self._deviation_F = self._deviations()

    def __call__(self, encoded: np.ndarray) -> np.ndarray:
        """(..., F) symlog features -> float32, in standard deviations, at most CLIP from zero."""
        scaled = (encoded - self.mean_F) / self._deviation_F
        np.maximum(scaled, -CLIP, out=scaled)
        return np.minimum(scaled, CLIP, out=scaled).astype(np.float32)

    def _deviations(self) -> np.ndarray:
        return np.sqrt((self.squares_F + PRIOR_TICKS * PRIOR_VARIANCE) / (self.count + PRIOR_TICKS))


def encode_features(features_F: np.ndarray) -> np.ndarray:
    """symlog in float64; not a number = 0, infinite = +-20 (about 5e8)."""
    encoded_F = symlog(np.asarray(features_F, dtype=np.float64))
    if not np.isfinite(encoded_F).all():
        encoded_F = np.nan_to_num(encoded_F, nan=0.0, posinf=20.0, neginf=-20.0)
    return encoded_F


class LossScale:
    """Level and noise of the loss so far; both in nats."""

    def __init__(self) -> None:
        self.reference = 0.0  # running mean over about four ticks, restarted by is_first
        self.scale = SCALE_FLOOR  # running mean of the change from tick to tick
        self.last = math.nan
        self.ticks = 0  # since is_first
        self.changes = 0  # since the beginning

    def update(self, loss: float, is_first: bool) -> None:
        if not math.isfinite(loss):
            return
        if is_first or self.ticks == 0:
            self.reference, self.last, self.ticks = loss, loss, 1
            return
        self.ticks += 1
        self.reference += max(1.0 / self.ticks, REFERENCE_RATE) * (loss - self.reference)
        change = abs(loss - self.last)
        self.changes += 1
        if self.changes > 1:
            change = min(change, SCALE_CLIP * self.scale)
        self.scale += max(1.0 / self.changes, SCALE_RATE) * (change - self.scale)
        self.scale = max(self.scale, SCALE_FLOOR)
        self.last = loss


class Episodes:
    """A bounded, ordered buffer of ticks; the oldest go first."""

    def __init__(self, capacity: int, num_features: int, num_directions: int) -> None:
        sizes = {"F": num_features, "A": NUM_ACTIONS, "K": num_directions}
        self.capacity = capacity
        self.appended = 0  # ticks ever appended; the newest has this number less one
        self.loss_scale = LossScale()
        self._columns = {
            name: np.zeros((capacity, sizes[axis]) if axis else capacity, dtype=dtype)
            for name, (axis, dtype) in _COLUMNS.items()
        }

    def __len__(self) -> int:
        return min(self.appended, self.capacity)

    def append(self, tick: Tick) -> np.ndarray:
        """Returns the tick's symlog features (F). The very first tick is a first one."""
        encoded_F = encode_features(tick.features)
        self._append(
            is_first=tick.is_first or self.appended == 0,
            features=encoded_F,
            loss=tick.loss,
            action=np.nan_to_num(tick.action),
            drift=math.nan if tick.drift_coefficients is None else tick.drift_coefficients,
            refused=tick.refused,
        )
        return encoded_F

    def _append(self, *, is_first: bool, **given: object) -> None:
        row = self.appended % self.capacity
        for name, value in given.items():
            self._columns[name][row] = value
        self.loss_scale.update(float(self._columns["loss"][row]), is_first)
        self._columns["is_first"][row] = is_first
        self._columns["reference"][row] = self.loss_scale.reference
        self._columns["scale"][row] = self.loss_scale.scale
        self.appended += 1

    def newest(self, name: str) -> np.ndarray:
        """The newest tick's entry of one column."""
        return self._columns[name][(self.appended - 1) % self.capacity]

    def starts(self, uniform_2B: np.ndarray, length: int, jump_offset: int) -> np.ndarray:
        """(B) positions of windows, from uniform numbers in [0, 1). Needs `length` ticks.

        Every second window is laid so that a jump, if there is one, is `jump_offset` ticks behind its
        beginning: jumps are rare, and forecasts of them are what decisions need.
        """
        last = len(self) - length
        starts_B = np.floor(uniform_2B[0] * (last + 1)).astype(np.int64)
        is_jump = self._columns["action"][self._rows(np.arange(len(self))), 0] > 0.0
        jumps = np.flatnonzero(is_jump)
        if len(jumps):
            chosen_B = jumps[np.floor(uniform_2B[1] * len(jumps)).astype(np.int64)]
            starts_B[1::2] = np.clip(chosen_B - jump_offset, 0, last)[1::2]
        return starts_B

    def windows(self, starts_B: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Columns as (T, B, ...), and `serial` (T, B) int64: the tick's number since the beginning."""
        positions_TB = starts_B[None, :] + np.arange(length)[:, None]
        rows_TB = self._rows(positions_TB)
        windows = {name: column[rows_TB] for name, column in self._columns.items()}
        windows["serial"] = positions_TB + (self.appended - len(self))
        return windows

    def _rows(self, positions: np.ndarray) -> np.ndarray:
        """Positions (0 = oldest) -> rows of the ring."""
        return (positions + (self.appended - len(self))) % self.capacity

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Oldest first; as many rows as there are ticks."""
        rows = self._rows(np.arange(len(self)))
        tracked = self.loss_scale
        numbers = (tracked.reference, tracked.scale, tracked.last)
        return {
            **{name: column[rows] for name, column in self._columns.items()},
            "loss_scale": np.array(numbers, dtype=np.float64),
            "counts": np.array([self.appended, tracked.ticks, tracked.changes], dtype=np.int64),
        }

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `to_arrays` gave. Raises CheckpointError when the arrays do not fit."""
        if set(arrays) != {*_COLUMNS, "loss_scale", "counts"}:
            raise CheckpointError(f"recorded ticks hold {sorted(arrays)}")
        if arrays["counts"].shape != (3,) or arrays["loss_scale"].shape != (3,):
            raise CheckpointError("recorded ticks: counts of the wrong shape")
        appended, ticks, changes = (int(value) for value in arrays["counts"])
        count = min(appended, self.capacity)
        if min(appended, ticks, changes) < 0 or not float(arrays["loss_scale"][1]) > 0.0:
            raise CheckpointError("recorded ticks: a count below zero or no loss scale")
        for name, column in self._columns.items():
            given = arrays[name]
            if given.dtype != column.dtype or given.shape != (count, *column.shape[1:]):
                raise CheckpointError(f"recorded ticks: {name} is {given.dtype} {given.shape}")
        self.appended = appended
        rows = self._rows(np.arange(count))
        for name, column in self._columns.items():
            column[rows] = arrays[name]
        tracked = self.loss_scale
        tracked.reference, tracked.scale, tracked.last = arrays["loss_scale"].tolist()
        tracked.ticks, tracked.changes = ticks, changes


def bags(serials: np.ndarray, members: int) -> np.ndarray:
    """(...) tick numbers -> (..., members) float32, 0 or 2: a double-or-nothing bootstrap over blocks.

    Blocks of BAG_TICKS ticks (Künsch 1989), by a hash of the block and the member (splitmix64), so that a
    member never sees the blocks that it was not given, however often windows are drawn.
    """
    x = (serials // BAG_TICKS).astype(np.uint64)[..., None] * np.uint64(members)
    x = (x + np.arange(members, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x >> np.uint64(63)) * np.uint64(2)).astype(np.float32)
