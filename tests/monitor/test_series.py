"""Curves and strips in bounded memory: extremes survive, undone steps go, and fast is the same as slow."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from monitor_node.series import Curve, Strip


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(-1e6, 1e6)), min_size=1, max_size=300))
def test_a_curve_keeps_its_extremes_in_bounded_memory(points: list[tuple[int, float]]) -> None:
    curve = Curve(max_buckets=8)
    for x, y in points:
        curve.add(x, y)
    kept = curve.points()
    assert len(kept) <= 16
    assert set(kept) <= set(points)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    heights = [y for _, y in points]
    assert (min(y for _, y in kept), max(y for _, y in kept)) == (min(heights), max(heights))


def test_a_curve_cut_off_holds_nothing_above_the_cut() -> None:
    curve = Curve(max_buckets=4)
    for x in range(100):
        curve.add(x, float(x))
    curve.add(99, math.nan)
    curve.cut_above(40)
    assert max(x for x, _ in curve.points()) <= 40
    assert not curve.marks


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=200))
def test_a_strip_covers_every_step_once(labels: list[str]) -> None:
    strip, exact = Strip(max_buckets=8), Strip(max_buckets=1000)
    for x, label in enumerate(labels):
        strip.add(x, label)
        exact.add(x, label)
    coarse = strip.segments()
    assert coarse[0][0] == 0
    assert coarse[-1][1] >= len(labels) - 1
    assert all(left[1] + 1 == right[0] for left, right in itertools.pairwise(coarse))
    assert "".join(label * (last - first + 1) for first, last, label in exact.segments()) == "".join(labels)


class SlowCurve(Curve):
    """Sorts the points of a bucket each time: the highest and the lowest are beyond doubt."""

    def _put(self, point: tuple[float, ...]) -> None:
        bucket = self._buckets.setdefault(int(point[0]) // self._width, [])
        if point not in bucket:
            by_height = sorted([*bucket, point], key=lambda p: p[1])
            bucket[:] = by_height if len(by_height) < 3 else [by_height[0], by_height[-1]]


# Few places and few heights, so that many points are equally high; a cut now and then.
MOVES = st.tuples(st.sampled_from(["add"] * 9 + ["cut"]), st.integers(0, 60), st.integers(-2, 2))


@given(st.lists(MOVES, min_size=10, max_size=120))
def test_a_curve_is_the_same_as_one_that_sorts(moves: list[tuple[str, int, int]]) -> None:
    fast, slow = Curve(max_buckets=4), SlowCurve(max_buckets=4)
    for name, x, y in moves:
        for curve in (fast, slow):
            curve.add(x, float(y)) if name == "add" else curve.cut_above(x)
        assert fast.points() == slow.points()
