"""Event streams: whoever loses its connection misses nothing and gets nothing twice; many cost as one.

A viewer is played against the real generator of events.py: it may lose its connection after any event, or
with an event on its way, and come back whenever it likes with the id of the last event that it has.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor_node import feed as feed_module
from monitor_node.events import EventStreams
from monitor_node.feed import Feed
from tests.monitor.test_feed import SNAPSHOT, STEADY, apply

DEADLINE_SECONDS = 30.0


class Viewer:
    """A page: takes events, and knows nothing but what they said."""

    def __init__(self) -> None:
        self.page: dict[str, Any] = {}
        self.last_event_id: str | None = None
        self.seen_ids: list[str] = []
        self._events: AsyncIterator[bytes] | None = None

    def connect(self, streams: EventStreams, feed: Feed) -> None:
        """Nothing happens while it is connected."""
        self._events = self._events or streams.events(feed.revision_of(self.last_event_id))

    async def disconnect(self) -> None:
        if self._events is not None:
            await self._events.aclose()  # type: ignore[attr-defined]
        self._events = None

    async def next(self, *, is_lost: bool = False) -> None:
        """The next event; a lost one was sent, and never arrived."""
        assert self._events is not None
        async for piece in self._events:
            lines = dict(line.partition(": ")[::2] for line in piece.decode().splitlines())
            if "id" not in lines:
                continue
            if not is_lost:
                assert lines["event"] == "delta"
                self.page = apply(self.page, json.loads(lines["data"]))
                self.last_event_id = lines["id"]
                self.seen_ids.append(lines["id"])
            return
        raise AssertionError("the stream ended")


@contextmanager
def short_history(revisions: int) -> Iterator[None]:
    kept, feed_module._HISTORY_REVISIONS = feed_module._HISTORY_REVISIONS, revisions
    try:
        yield
    finally:
        feed_module._HISTORY_REVISIONS = kept


# What happens to one viewer, in order. "restart": another monitor takes over, with another boot id.
QUIET = st.tuples(st.sampled_from(("take", "lose", "disconnect")), st.none())
STEADY_STEP = st.one_of(st.tuples(st.just("publish"), STEADY), st.tuples(st.just("publish"), STEADY), QUIET)
WILD_STEP = st.one_of(st.tuples(st.sampled_from(("publish", "restart")), SNAPSHOT), QUIET)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from((STEADY_STEP, WILD_STEP)).flatmap(lambda step: st.lists(step, max_size=40)),
    STEADY,
    st.integers(1, 5),
)
def test_a_client_that_loses_its_connection_anywhere_ends_with_exactly_the_newest_snapshot(
    script: list[tuple[str, Any]], last: dict[str, Any], history_revisions: int
) -> None:
    async def play() -> None:
        feed = Feed("boot0")
        streams, viewer = EventStreams(feed), Viewer()
        for number, (what, snapshot) in enumerate([*script, ("publish", last)]):
            if what == "restart":
                await viewer.disconnect()
                feed = Feed(f"boot{number + 1}")
                streams = EventStreams(feed)
            if what in ("publish", "restart"):
                feed.publish(snapshot)
            has_news = viewer.last_event_id != feed.event_id(feed.revision) and feed.revision > 0
            if what in ("take", "lose") and has_news:
                viewer.connect(streams, feed)
                await viewer.next(is_lost=what == "lose")
            if what in ("lose", "disconnect"):
                await viewer.disconnect()
        viewer.connect(streams, feed)
        if viewer.last_event_id != feed.event_id(feed.revision):
            await viewer.next()
        await viewer.disconnect()
        assert viewer.page == json.loads(json.dumps(feed.snapshot()))
        assert len(set(viewer.seen_ids)) == len(viewer.seen_ids), "an event came twice"

    with short_history(history_revisions):
        asyncio.run(asyncio.wait_for(play(), DEADLINE_SECONDS))


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitor_node.events.PUSH_SECONDS", 0.0)


def grown(points: int, *, run: int = 0) -> dict[str, Any]:
    return {"run": run, "series": {"train": [[x, 9.0] for x in range(points)]}}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was serialised, in order."""
    made: list[Any] = []
    real = feed_module.as_json

    def as_json(value: Any) -> bytes:
        made.append(value)
        return real(value)

    monkeypatch.setattr(feed_module, "as_json", as_json)
    return made


def test_twenty_viewers_share_one_serialisation_per_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)

    async def play() -> None:
        feed = Feed("boot")
        streams = EventStreams(feed)
        viewers = [Viewer() for _ in range(20)]
        for points in range(1, 11):
            feed.publish(grown(points))
            for viewer in viewers:
                viewer.connect(streams, feed)
                await viewer.next()
        assert all(viewer.page == grown(10) for viewer in viewers)
        assert all(len(viewer.seen_ids) == 10 for viewer in viewers)

    asyncio.run(asyncio.wait_for(play(), DEADLINE_SECONDS))
    assert len(made) == 10  # not 200


def test_viewers_who_ask_at_once_from_threads_share_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    feed = Feed("boot")
    feed.publish(grown(500))
    barrier = threading.Barrier(20)
    answers: list[tuple[int, bytes]] = []

    def ask() -> None:
        barrier.wait(DEADLINE_SECONDS)
        answers.append(feed.json_since(0))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert len(answers) == 20
    assert len(set(answers)) == len(made) == 1


def test_a_shared_text_is_never_that_of_an_older_revision() -> None:
    feed = Feed("boot")
    for points in range(1, 200):
        feed.publish(grown(points))
        for revision in {0, feed.revision - 1, max(0, feed.revision - 3)}:
            newest, text = feed.json_since(revision)
            assert newest == feed.revision
            assert json.loads(text) == feed.since(revision)[1]


def sizes_of(feed: Feed, streams: EventStreams) -> dict[str, int]:
    return {
        "texts": len(feed._texts),
        "curves": len(feed._kept),
        "history": max((len(kept) for kept in feed._kept.values()), default=0),
        "sections": len(feed._changed_at),
        "viewers": feed.viewers,
        "waiting": len(streams._waiting),
    }


def test_a_day_of_reconnects_leaves_nothing_behind() -> None:
    """One connection in four seconds for a day, most of them lost with an event on its way."""
    rng = random.Random(4)

    async def play() -> dict[str, int]:
        feed = Feed("boot")
        streams, viewers = EventStreams(feed), [Viewer() for _ in range(20)]
        for turn in range(21_600):
            feed.publish(grown(turn % 30, run=turn))
            viewer = rng.choice(viewers)
            viewer.connect(streams, feed)
            if viewer.last_event_id != feed.event_id(feed.revision):
                await viewer.next(is_lost=rng.random() < 0.5)
            if turn % 50 == 0:  # it goes away while it waits
                waiting = asyncio.ensure_future(viewer.next())
                while not (streams._waiting or waiting.done()):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
            if turn % 50 == 0 or rng.random() < 0.9:
                await viewer.disconnect()
            viewer.seen_ids.clear()
        for viewer in viewers:
            await viewer.disconnect()
        return sizes_of(feed, streams)

    with short_history(50):
        sizes = asyncio.run(asyncio.wait_for(play(), 4 * DEADLINE_SECONDS))
    assert sizes["texts"] <= feed_module._MAX_TEXTS
    assert sizes["history"] <= 50
    assert (sizes["curves"], sizes["sections"], sizes["viewers"], sizes["waiting"]) == (1, 2, 0, 0)


def test_names_that_come_and_go_leave_nothing_behind() -> None:
    feed = Feed("boot")
    for turn in range(1000):
        feed.publish({f"section{turn}": turn, "series": {f"curve{turn}": [[turn, 1.0]]}})
    assert (len(feed._changed_at), len(feed._kept)) == (2, 1)


def test_an_event_goes_out_when_it_is_published_not_at_the_next_look() -> None:
    """From another thread, as the node does. No viewer looks by itself: only a wake-up can end the wait."""

    async def play() -> list[str]:
        feed = Feed("boot")
        feed.publish(grown(1))
        streams, viewer = EventStreams(feed), Viewer()
        viewer.connect(streams, feed)
        await viewer.next()
        for points in range(2, 12):
            waiting = asyncio.ensure_future(viewer.next())
            while not streams._waiting:
                await asyncio.sleep(0)
            threading.Thread(target=feed.publish, args=(grown(points),)).start()
            await waiting
        return viewer.seen_ids

    ids = asyncio.run(asyncio.wait_for(play(), DEADLINE_SECONDS))
    assert ids == [f"boot.{revision}" for revision in range(1, 12)]


def test_publishing_after_the_server_has_gone_is_harmless() -> None:
    feed = Feed("boot")
    feed.publish(grown(1))
    streams, viewer = EventStreams(feed), Viewer()

    async def play() -> None:
        viewer.connect(streams, feed)
        await viewer.next()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(viewer.next(), 0.01)

    asyncio.run(play())
    assert feed.publish(grown(2))
    streams.stop()
