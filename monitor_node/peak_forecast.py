"""When memory will be full, from the highest use of the last ten minutes. Pure; decides nothing.

Time is cut into buckets, each keeps its highest need: what the device uses, and what the highest step had
allocated beyond the allocator's cache, with the pieces that no tensor fits into (systems.md 3.2,
headroom). Slope: Theil-Sen, the median slope of all pairs (Sen 1968, J. Am. Stat. Assoc. 63, 1379), which
a third of wild values does not move. Silent unless its lower confidence bound (Sen, from the variance of
Kendall's S) is above zero, the newer half rises at least half as fast as the older one, and the forecast
reaches no further than a few times what it was seen over. So a single jump, noise and a cache that has
filled up say nothing; the slower of the two slopes is told.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from common.messages import MemoryReport

BUCKET_SECONDS = 10.0
MAX_BUCKETS = 60  # ten minutes: 1770 pairs, 1 ms; guess, untested
MIN_BUCKETS = 12
DEVIATIONS = 3.3  # of Kendall's S: one false alarm in 2000 independent series
SLOWING_SHARE = 0.5  # newer by older half: below, a cache fills up, and a line would go far beyond it
REACH = 6.0  # times the time seen: guess, untested


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A line through needs; `at_seconds` is the newest bucket, of the clock that `seen` was given."""

    at_seconds: float
    at_bytes: float
    bytes_per_second: float  # 0 = no significant rise
    seen_seconds: float


@dataclass(frozen=True, kw_only=True)
class PeakSeries:
    buckets: tuple[tuple[int, int], ...] = ()  # (number, highest need in bytes), the newest one last

    @property
    def trend(self) -> Trend | None:
        """Of the buckets that are full; None = not enough of them."""
        return _trend_of(self.buckets[:-1])


def need_bytes(used_bytes: int, report: MemoryReport | None) -> int:
    """Device memory that the highest step since the last report would take from an empty cache."""
    if report is None or report.peak_bytes is None or report.reserved_bytes is None:
        return used_bytes
    wanted_bytes = report.peak_bytes + (report.inactive_split_bytes or 0)
    return used_bytes + max(0, wanted_bytes - report.reserved_bytes)


def seen(series: PeakSeries, num_bytes: int, *, at_seconds: float) -> PeakSeries:
    """`at_seconds` must not go back; a gap leaves its buckets out."""
    number = int(at_seconds // BUCKET_SECONDS)
    if series.buckets and series.buckets[-1][0] >= number:
        last, highest = series.buckets[-1]
        return PeakSeries(buckets=(*series.buckets[:-1], (last, max(highest, num_bytes))))
    return PeakSeries(buckets=(*series.buckets, (number, num_bytes))[-MAX_BUCKETS:])


def next_peak_bytes(series: PeakSeries) -> int | None:
    """The line a bucket ahead; without a rise the highest of the time seen. None = nothing seen."""
    if not series.buckets:
        return None
    if series.trend is None or series.trend.bytes_per_second == 0.0:
        return max(highest for _, highest in series.buckets)
    ahead_bytes = series.trend.at_bytes + BUCKET_SECONDS * series.trend.bytes_per_second
    return max(round(ahead_bytes), series.buckets[-1][1])


def seconds_until(series: PeakSeries, threshold_bytes: int, *, now_seconds: float) -> float | None:
    """Until use reaches the threshold; None = no rise, too far off to say, or there already."""
    trend = series.trend
    if trend is None or trend.bytes_per_second == 0.0 or series.buckets[-1][1] >= threshold_bytes:
        return None
    from_newest_seconds = max(0.0, (threshold_bytes - trend.at_bytes) / trend.bytes_per_second)
    if from_newest_seconds > REACH * trend.seen_seconds:
        return None
    return max(0.0, trend.at_seconds + from_newest_seconds - now_seconds)


def trend_of(buckets: Sequence[tuple[int, int]]) -> Trend | None:
    """None for fewer than MIN_BUCKETS."""
    count = len(buckets)
    if count < MIN_BUCKETS:
        return None
    slopes = _slopes(buckets)
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    lowest = slopes[max(0, int((len(slopes) - DEVIATIONS * deviation) / 2) - 1)]
    slope, older, newer = 0.0, *(_slope(half) for half in (buckets[: count // 2], buckets[count // 2 :]))
    if lowest > 0.0 and newer > SLOWING_SHARE * older:
        slope = max(0.0, min(statistics.median(slopes), newer))
    newest = buckets[-1][0]
    at_bytes = statistics.median(highest + slope * (newest - number) for number, highest in buckets)
    return Trend(
        at_seconds=(newest + 1) * BUCKET_SECONDS,
        at_bytes=at_bytes,
        bytes_per_second=slope / BUCKET_SECONDS,
        seen_seconds=(newest - buckets[0][0]) * BUCKET_SECONDS,
    )


_trend_of = functools.lru_cache(maxsize=4)(trend_of)  # asked for at every look, new every BUCKET_SECONDS


def _slope(buckets: Sequence[tuple[int, int]]) -> float:
    return statistics.median(_slopes(buckets))


def _slopes(buckets: Sequence[tuple[int, int]]) -> list[float]:
    """Of all pairs, bytes per bucket, sorted."""
    return sorted((b - a) / (late - early) for (early, a), (late, b) in itertools.combinations(buckets, 2))
