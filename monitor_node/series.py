"""Curves in bounded memory: every extreme survives, undone steps can be cut off again.

A Curve keeps the lowest and highest point of each bucket of x; when there are too many buckets
their width doubles. A Strip keeps, per bucket, which label was most frequent. Values that are not
finite are kept as marks, so that one NaN neither hides nor stretches the curve.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import TypeVar

MAX_MARKS = 64
_Row = TypeVar("_Row")


class Curve:
    """Points (x, y, *extra) with x an integer that mostly grows; at most 2 * `max_buckets` points."""

    def __init__(self, max_buckets: int = 480) -> None:
        self._max_buckets = max_buckets
        self._width = 1
        self._buckets: dict[int, list[tuple[float, ...]]] = {}  # key x // width: lowest, highest
        self.marks: deque[tuple[int, str]] = deque(maxlen=MAX_MARKS)  # (x, "NaN" | "inf" | "-inf")

    def add(self, x: int, y: float, *extra: float) -> None:
        if not math.isfinite(y):
            self.marks.append((x, marker_of(y)))
            return
        self._put((x, y, *extra))
        while len(self._buckets) > self._max_buckets:
            self._widen()

    def cut_above(self, x: int) -> None:
        """Forget the points above x (steps that were undone)."""
        self._buckets = {
            key: kept for key, points in self._buckets.items() if (kept := [p for p in points if p[0] <= x])
        }
        self.marks = deque((mark for mark in self.marks if mark[0] <= x), maxlen=MAX_MARKS)

    def points(self) -> list[tuple[float, ...]]:
        """Sorted by x; each bucket gives its lowest and its highest point."""
        return [point for key in sorted(self._buckets) for point in sorted(self._buckets[key])]

    def _put(self, point: tuple[float, ...]) -> None:
        """Of points equally high the lowest place keeps its first one and the highest takes the newest."""
        key = int(point[0]) // self._width
        bucket = self._buckets.get(key)
        if bucket is None:
            self._buckets[key] = [point]
        elif point in bucket:
            return
        elif len(bucket) == 1:
            bucket.insert(0 if point[1] < bucket[0][1] else 1, point)
        elif point[1] < bucket[0][1]:
            bucket[0] = point
        elif point[1] >= bucket[1][1]:
            bucket[1] = point

    def _widen(self) -> None:
        points = self.points()
        self._width *= 2
        self._buckets = {}
        for point in points:
            self._put(point)


class Strip:
    """Which label ruled where, e.g. the phase of each step; at most `max_buckets` buckets."""

    def __init__(self, max_buckets: int = 480) -> None:
        self._max_buckets = max_buckets
        self._width = 1
        self._buckets: dict[int, Counter[str]] = {}

    def add(self, x: int, label: str) -> None:
        labels = self._buckets.get(x // self._width)
        if labels is None:
            labels = self._buckets[x // self._width] = Counter()
        labels[label] += 1
        while len(self._buckets) > self._max_buckets:
            self._width *= 2
            old, self._buckets = self._buckets, {}
            for key, labels in old.items():
                self._buckets.setdefault(key // 2, Counter()).update(labels)

    def cut_above(self, x: int) -> None:
        """Forget the buckets that begin above x."""
        self._buckets = {key: labels for key, labels in self._buckets.items() if key * self._width <= x}

    def segments(self) -> list[tuple[int, int, str]]:
        """(first x, last x inclusive, label), neighbours of one label joined."""
        joined: list[tuple[int, int, str]] = []
        for key in sorted(self._buckets):
            label = self._buckets[key].most_common(1)[0][0]
            first, last = key * self._width, (key + 1) * self._width - 1
            if joined and joined[-1][2] == label and joined[-1][1] == first - 1:
                first = joined.pop()[0]
            joined.append((first, last, label))
        return joined


def append_bounded(rows: list[_Row], row: _Row, most: int) -> None:
    """Beyond `most` the older half goes: rows seldom move, so that a feed mostly sends new ones only."""
    rows.append(row)
    if len(rows) > most:
        del rows[: most // 2]


def marker_of(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "inf" if value > 0 else "-inf"
