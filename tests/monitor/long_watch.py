"""A day of viewers who come and go, in simulated time, against the feed of the live page.

Owns viewers that lose their connection (also with an event under way), stay away for seconds or hours, and
resume by the id of the last event that they got; and the monitor's restarts. Counts what must never happen.
No network, no real time.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from common.clock import FakeClock
from monitor_node.feed import Feed

DAY_SECONDS = 86_400
_ONLINE_SECONDS = (5.0, 60.0, 600.0)  # mean values of exponential distributions, equally likely
_AWAY_SECONDS = (1.0, 3.0, 60.0, 300.0, 3600.0)  # from a flicker to a suspended laptop
_LOST_SHARE = 0.2  # of the connections that break while an event is under way


@dataclass(kw_only=True)
class Day:
    publishes: int = 0
    revisions: int = 0
    events: int = 0  # that viewers got
    reconnects: int = 0
    restarts: int = 0
    whole: int = 0  # events that began from nothing: first visits, restarts
    longest_away_seconds: float = 0.0
    gaps: int = 0  # a viewer is not at the newest snapshot after an event
    duplicates: int = 0  # an event that the viewer had; a row that it had makes a gap
    largest_delta_rows: int = 0
    held_bytes: list[int] = field(default_factory=list)  # by feed and source, at even times of the day


class Viewer:
    """What page.js keeps: the state, and the id of the last event."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.state: dict[str, Any] = {}
        self.event_id: str | None = None
        self._had: set[str] = set()
        self.is_connected = False
        self.change_at_seconds = 0.0
        self._left_at_seconds = 0.0

    def turn(self, feed: Feed, newest: dict[str, Any], now_seconds: float, day: Day) -> None:
        """Connect or go when it is time; while connected, get what is new."""
        if now_seconds >= self.change_at_seconds:
            self.is_connected = not self.is_connected
            stay = _ONLINE_SECONDS if self.is_connected else _AWAY_SECONDS
            self.change_at_seconds = now_seconds + self._rng.expovariate(1 / self._rng.choice(stay))
            if not self.is_connected and self._rng.random() < _LOST_SHARE:
                feed.json_since(feed.revision_of(self.event_id))  # sent, never arrived: the id stays
            if self.is_connected:
                day.reconnects += 1
                away_seconds = now_seconds - self._left_at_seconds
                day.longest_away_seconds = max(day.longest_away_seconds, away_seconds)
            else:
                self._left_at_seconds = now_seconds
        if self.is_connected:
            self._get(feed, newest, day)

    def _get(self, feed: Feed, newest: dict[str, Any], day: Day) -> None:
        known = feed.revision_of(self.event_id)
        if feed.revision <= known:
            day.gaps += self.state != newest
            return
        revision, text = feed.json_since(known)
        delta = json.loads(text)
        event_id = feed.event_id(revision)
        day.events += 1
        day.whole += delta["whole"]
        day.duplicates += event_id in self._had
        self._had.add(event_id)
        rows = sum(len(tail["add"]) for tail in delta["curves"].values())
        day.largest_delta_rows = max(day.largest_delta_rows, rows)
        self.state = applied(self.state, delta)
        self.event_id = event_id
        day.gaps += self.state != newest


def applied(state: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """As page.js does."""
    result = delta["set"] if delta["whole"] else {**state, **delta["set"]}
    curves = dict(result.get("series", {}))
    for name, tail in delta["curves"].items():
        curves[name] = curves.get(name, [])[: tail["keep"]] + tail["add"]
    return {**result, "series": curves}


def watch(
    snapshots: Iterator[dict[str, Any]],
    source: object,
    *,
    seconds: float = DAY_SECONDS,
    every_seconds: float = 1.0,
    viewers: int = 4,
    restarts: int = 24,
    seed: int = 0,
    feed_of: Callable[[str], Feed] = Feed,
) -> Day:
    """Publish one snapshot per `every_seconds` of a day and let viewers come and go.

    `source` is what `snapshots` are made from: its size is counted with the feed's, 96 times a day.
    """
    rng, clock, day = random.Random(seed), FakeClock(), Day()
    feed = feed_of("boot-0")
    people = [Viewer(random.Random(rng.random())) for _ in range(viewers)]
    restart_seconds = sorted(rng.uniform(0.0, seconds) for _ in range(restarts))  # some soon after another
    next_look_seconds = seconds / 96
    while clock.monotonic() < seconds:
        clock.advance(every_seconds)
        now_seconds = clock.monotonic()
        while restart_seconds and now_seconds >= restart_seconds[0]:
            del restart_seconds[0]
            day.restarts += 1
            day.revisions += feed.revision
            feed = feed_of(f"boot-{day.restarts}")
        newest = next(snapshots)
        feed.publish(newest)
        day.publishes += 1
        for person in people:
            person.turn(feed, newest, now_seconds, day)
        if now_seconds >= next_look_seconds:
            next_look_seconds += seconds / 96
            day.held_bytes.append(deep_bytes(feed, source))
    day.revisions += feed.revision
    return day


def deep_bytes(*roots: object) -> int:
    """Of all that they hold, each object once; neither code nor modules."""
    not_counted = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType)
    seen: set[int] = set()
    left: list[Any] = list(roots)
    total = 0
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, not_counted):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        left += gc.get_referents(item)
    return total
