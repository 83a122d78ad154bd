"""What forecasts got wrong in situations like this one: a bounded store, and the corrections it supports.

Owns (context, forecast, happened, coefficient scale) of the newest CAPACITY jumps. A correction is the
weighted mean over the nearest TOP of them,

    weight = max(cosine, 0) * 0.95^(age in steps / 100)
    share  = sum(w) / (sum(w) + 1) * max(0, 1 - 4 / z^2),       z = mean / standard error

so that few, old or unlike neighbours say little, and a mean within two standard errors says nothing:
with no structure in the errors that costs 0.3 % of their mean square (the integral of (z - 4/z)^2
over |z| > 2 of a normal, for 10 neighbours), with a planted bias nearly all of it goes. James-Stein
with positive part and a stricter threshold; Efron & Morris 1973.
Errors are relative to the forecast and contexts are symlog'ed to unit length before anything is
learned: there is nothing to blow up (the original's linear model went NaN at a loss of 60).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import CheckpointError
from common.messages import Outcome
from predictor_node.exact_arrays import Array, pack, unpack

CAPACITY = 1000
TOP = 10
MIN_NEIGHBOURS = 3
AGE_DECAY, AGE_STEPS = 0.95, 100.0
THRESHOLD_SQUARED = 4.0  # in standard errors
MAX_CORRECTION_SHARE = 0.2  # of the forecast
MIN_SCALE, MAX_SCALE = 0.5, 1.5
MAX_ERROR_SHARE = 1.0  # a ruin teaches that it was wrong, not how far a ruin goes
TINY = 1e-12


class Advice(NamedTuple):
    loss: float  # nats, the corrected forecast
    coefficient_scale: float  # by which to multiply the row of coefficients, in [MIN_SCALE, MAX_SCALE]
    neighbours: int  # that it rests on


class Residuals:
    """FIFO of at most CAPACITY entries; contexts have `dimension` numbers of any size."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._count = 0  # ever added; the next one goes to _count % CAPACITY
        self._contexts_ND = np.zeros((CAPACITY, dimension))  # unit length
        self._entries_N3 = np.zeros((CAPACITY, 3))  # step, relative error, coefficient scale (NaN = unknown)

    def __len__(self) -> int:
        return min(self._count, CAPACITY)

    def add(
        self,
        context: Sequence[float],
        *,
        step: int,
        forecast: float,
        happened: float,
        coefficient_scale: float = math.nan,
    ) -> bool:
        """Remember one settled jump. False, and nothing changes, when its numbers are not finite.

        coefficient_scale: by what to multiply its coefficients, see `scale_of`; NaN if unknown.
        """
        unit_D = self._unit(context)
        if unit_D is None or not (math.isfinite(forecast) and math.isfinite(happened)):
            return False
        error = (happened - forecast) / max(abs(forecast), TINY)
        slot = self._count % CAPACITY
        self._contexts_ND[slot] = unit_D
        self._entries_N3[slot] = step, min(max(error, -MAX_ERROR_SHARE), MAX_ERROR_SHARE), coefficient_scale
        self._count += 1
        return True

    def advise(self, context: Sequence[float], *, step: int, forecast: float) -> Advice:
        """What the nearest entries say about this forecast; the forecast itself where they say nothing."""
        unit_D = self._unit(context)
        if unit_D is None or not math.isfinite(forecast) or len(self) < MIN_NEIGHBOURS:
            return Advice(forecast, 1.0, 0)
        nearest, cosines = self._nearest(unit_D)
        steps, errors, scales = self._entries_N3[nearest].T
        weights = cosines * AGE_DECAY ** (np.maximum(step - steps, 0.0) / AGE_STEPS)
        bias = _shrunk_mean(errors, weights)
        bias = min(max(bias, -MAX_CORRECTION_SHARE), MAX_CORRECTION_SHARE)
        known = np.isfinite(scales)
        scale = 1.0 + _shrunk_mean(scales[known] - 1.0, weights[known])
        return Advice(
            forecast + bias * abs(forecast), min(max(scale, MIN_SCALE), MAX_SCALE), int((weights > 0.0).sum())
        )

    def new_run(self) -> None:
        """Carried over to another run, whose steps start again: the newest entry is as old as its start."""
        kept = self._entries_N3[: len(self)]
        if len(kept):
            kept[:, 0] -= kept[:, 0].max()

    def state(self) -> dict[str, Any]:
        """JSON-able and exact."""
        kept = len(self)
        return {
            "count": self._count,
            "contexts": pack(self._contexts_ND[:kept]),
            "entries": pack(self._entries_N3[:kept]),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError, and changes nothing, when it is damaged or of another dimension."""
        try:
            count = int(state["count"])
            kept = min(count, CAPACITY)
            contexts_nD = unpack(state["contexts"], shape=(kept, self.dimension))
            entries_n3 = unpack(state["entries"], shape=(kept, 3))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged state of the residuals: {error!r}") from None
        self._count = count
        self._contexts_ND[:kept], self._entries_N3[:kept] = contexts_nD, entries_n3

    def _unit(self, context: Sequence[float]) -> Array | None:
        """symlog, then unit length; None when it is not finite. Raises ValueError on a wrong length."""
        x_D = np.asarray(context, dtype=np.float64)
        if x_D.shape != (self.dimension,):
            raise ValueError(f"a context has {self.dimension} numbers, not {x_D.shape}")
        x_D = np.sign(x_D) * np.log1p(np.abs(x_D))
        length = math.sqrt(float(x_D @ x_D))
        return x_D / length if 0.0 < length < math.inf else None

    def _nearest(self, unit_D: Array) -> tuple[np.ndarray[Any, Any], Array]:
        """Slots and cosines (negative ones as 0) of the TOP nearest entries."""
        cosines = self._contexts_ND[: len(self)] @ unit_D
        nearest = np.argpartition(cosines, -TOP)[-TOP:] if len(cosines) > TOP else np.arange(len(cosines))
        return nearest, np.maximum(cosines[nearest], 0.0)


def scale_of(outcome: Outcome, *, correction_share: float) -> float:
    """What the coefficients of a jump should have been multiplied by, clipped; NaN if that was not measured.

    The trainer lays a parabola through the loss before and after the jump and the slope after it, and
    adds `correction_share` of the way to its minimum, as a multiple of the delta. Without a correction
    the same parabola is read here: loss(t) = L0 + (2 (L1 - L0) - s) t + (s - (L1 - L0)) t^2, t = 1 at
    the jump, minimum at (s - 2 (L1 - L0)) / (2 (s - (L1 - L0))). One that opens downward has none.
    """
    if outcome.correction != 0.0 and correction_share > 0.0:
        return _clipped(1.0 + outcome.correction / correction_share)
    rise, slope = outcome.loss_after - outcome.loss_before, outcome.slope_after
    bend = slope - rise
    if not math.isfinite(bend) or bend <= 0.0:
        return math.nan
    return _clipped((slope - 2.0 * rise) / (2.0 * bend))


def _clipped(scale: float) -> float:
    """One flat parabola must not outvote all others; the trainer corrects no further either (correct.py)."""
    return min(max(scale, 0.0), MAX_SCALE)


def _shrunk_mean(values: Array, weights: Array) -> float:
    """Weighted mean, shrunk towards 0 by what it rests on (module docstring)."""
    total = float(weights.sum())
    if len(values) < MIN_NEIGHBOURS or total <= TINY:
        return 0.0
    mean = float(weights @ values) / total
    effective = total * total / float(weights @ weights)
    if mean == 0.0 or effective < MIN_NEIGHBOURS - 1.0:
        return 0.0
    spread_squared = float(weights @ (values - mean) ** 2) / total * effective / (effective - 1.0)
    doubt = THRESHOLD_SQUARED * spread_squared / effective / (mean * mean)
    return mean * total / (total + 1.0) * max(0.0, 1.0 - doubt)
