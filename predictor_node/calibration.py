"""How far forecasts can be trusted: stated spreads made true by what happened, and the horizon that allows.

    score    = |happened - forecast| / spread
    factor   = the ceil((n + 1) * level)-th smallest of the newest n scores      (split conformal)
    interval = forecast +- factor * spread          holds what happens with probability `level`

Split conformal prediction: Vovk, Gammerman & Shafer 2005, Algorithmic Learning in a Random World;
Lei et al. 2018 (arXiv 1604.04173), section 2.2. The running window follows a run that changes.
Owns scores only; who forecasts, and what, is not its business. Keys are kinds of forecast, e.g.
buckets of the horizon, because errors grow with it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError

LEVEL = 0.8
WINDOW = 256  # scores kept per key
MIN_SCORES = 10  # below that the key borrows from all keys together, then from the normal distribution
NORMAL_FACTOR = 1.2815515655446004  # half-width of the normal's 80 % interval, in standard deviations
MAX_SCORE = 1e6  # for a spread of 0 and a miss
HALF_CONFIDENCE_ERROR = 0.05  # calibrated half-width, as a share of the forecast, that halves confidence
COLD_CONFIDENCE = 0.7  # at most, before MIN_SCORES: as the original (hybrid.md, row 23)
BUCKET_EDGES = (0, 8, 16, 32, 64)  # last horizon of a bucket, steps
_BUCKETS = ("0", "1-8", "9-16", "17-32", "33-64", "65+")


def bucket_of(horizon_steps: int) -> str:
    """The key for a horizon: powers of two, so that each of the usual arms has near neighbours only."""
    return _BUCKETS[bisect_left(BUCKET_EDGES, horizon_steps)]


class Calibration:
    """Conformal factors per key. A spread may be stated in any unit that is kept to within the key."""

    def __init__(self) -> None:
        self._scores: dict[str, deque[float]] = {}
        self._hits: dict[str, deque[bool]] = {}  # was each score within the factor of its time?

    def observe(self, key: str, *, forecast: float, spread: float, happened: float) -> bool:
        """One forecast met the truth. False, and nothing changes, unless all is finite and spread >= 0."""
        if not all(map(math.isfinite, (forecast, spread, happened))) or spread < 0.0:
            return False
        miss = abs(happened - forecast)
        score = min(miss / spread, MAX_SCORE) if spread > 0.0 else (MAX_SCORE if miss else 0.0)
        hits = self._hits.setdefault(key, deque(maxlen=WINDOW))
        hits.append(score <= self.factor(key))  # before the score is known to the factor
        self._scores.setdefault(key, deque(maxlen=WINDOW)).append(score)
        return True

    def count(self, key: str) -> int:
        return len(self._scores.get(key, ()))

    def factor(self, key: str) -> float:
        """Half-width of the LEVEL interval of such a forecast, in its spreads; >= 0."""
        scores = list(self._scores.get(key, ()))
        if len(scores) < MIN_SCORES:
            scores = [score for name in sorted(self._scores) for score in self._scores[name]]
        if len(scores) < MIN_SCORES:
            return NORMAL_FACTOR
        rank = min(math.ceil((len(scores) + 1) * LEVEL), len(scores))
        return sorted(scores)[rank - 1]

    def coverage(self, key: str) -> float | None:
        """Share of the newest forecasts whose interval of the time held; None before the first."""
        hits = self._hits.get(key)
        return sum(hits) / len(hits) if hits else None

    def confidence(self, key: str, *, forecast: float, spread: float) -> float:
        """In [0, 1]: 1 / (1 + relative half-width of the calibrated interval / HALF_CONFIDENCE_ERROR).

        Relative to the forecast, so the unit of the loss does not matter. 0 for numbers that are not finite.
        """
        half_width = self.factor(key) * spread
        if not (math.isfinite(forecast) and math.isfinite(half_width)) or spread < 0.0:
            return 0.0
        if half_width == 0.0:
            confidence = 1.0
        elif forecast == 0.0:
            return 0.0
        else:
            confidence = 1.0 / (1.0 + half_width / abs(forecast) / HALF_CONFIDENCE_ERROR)
        return min(confidence, COLD_CONFIDENCE) if self.count(key) < MIN_SCORES else confidence

    def state(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {
            key: {"scores": list(self._scores[key]), "hits": [int(hit) for hit in self._hits[key]]}
            for key in sorted(self._scores)
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError, and changes nothing, when it is not a state of a calibration."""
        try:
            scores = {key: deque(map(float, kept["scores"]), WINDOW) for key, kept in state.items()}
            hits = {key: deque(map(bool, kept["hits"]), WINDOW) for key, kept in state.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged state of the calibration: {error!r}") from None
        if not all(math.isfinite(score) and score >= 0.0 for kept in scores.values() for score in kept):
            raise CheckpointError("damaged state of the calibration: a score that is not one")
        self._scores, self._hits = scores, hits


def allowed_horizon_steps(
    max_steps: int, *, confidence: float, proposals_in_a_row: int, min_steps: int = 0
) -> int:
    """The longest horizon to consider: max * confidence^2 * (1 - min(0.1 * proposals in a row, 0.5)).

    The original's shape (hybrid.md, row 8). Never falls when confidence rises, never rises with the
    proposals in a row; at least min(min_steps, max_steps), at most max_steps. A confidence that is
    not a number counts as 0, one outside [0, 1] as its nearest end.
    """
    trust = min(max(confidence, 0.0), 1.0) if confidence == confidence else 0.0
    fatigue = min(0.1 * max(proposals_in_a_row, 0), 0.5)
    steps = math.floor(max_steps * trust * trust * (1.0 - fatigue))
    return max(min(min_steps, max_steps), min(steps, max_steps))
