"""Server-sent events from a feed: every stream wakes when there is a new revision, and ends with the server.

An event's id is a revision, so a browser that reconnects resumes where it was. A viewer that reads slowly
delays nobody and piles nothing up: it gets fewer, larger deltas. Owns no thread; lives in the server's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from monitor_node.feed import Feed

PUSH_SECONDS = 0.05  # at most twenty events a second to one viewer: an eye does not follow more
COMMENT_SECONDS = 15.0  # proxies close silent connections
MAX_VIEWERS = 64  # guess, untested: open pages, not people; each may hold one event that it does not read


class EventStreams:
    """All streams of one feed."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._is_over = False
        feed.on_publish(self._wake)

    @property
    def is_full(self) -> bool:
        return self._feed.viewers >= MAX_VIEWERS

    def stop(self) -> None:
        """End all streams. May be called from any thread."""
        self._is_over = True
        self._wake()

    def response(self, last_event_id: str | None) -> StreamingResponse:
        """Goes on after the event of that id; everything for an id of another process, or none."""
        return _EventResponse(self._feed, self.events(self._feed.revision_of(last_event_id)))

    async def events(self, revision: int) -> AsyncIterator[bytes]:
        """Deltas from `revision` on, until `stop`. The first event comes at once."""
        yield b"retry: 1000\n\n"
        while not self._is_over:
            if self._feed.revision > revision:
                revision, data = self._feed.json_since(revision)
                event_id = self._feed.event_id(revision).encode()
                yield b"id: %b\nevent: delta\ndata: %b\n\n" % (event_id, data)
                await asyncio.sleep(PUSH_SECONDS)
            elif not await self._news_after(revision, COMMENT_SECONDS):
                yield b": still here\n\n"

    async def _news_after(self, revision: int, seconds: float) -> bool:
        """False after so many seconds without a new revision."""
        self._loop = asyncio.get_running_loop()
        news = self._loop.create_future()
        self._waiting.add(news)
        try:
            # Looked at after we are on the list: a revision published before that wakes nobody.
            if self._feed.revision > revision or self._is_over:
                return True
            await asyncio.wait_for(news, seconds)
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(news)
        return True

    def _wake(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        for news in self._waiting:
            if not news.done():
                news.set_result(None)


class _EventResponse(StreamingResponse):
    """Counts as a viewer for as long as it is connected."""

    def __init__(self, feed: Feed, events: AsyncIterator[bytes]) -> None:
        # A proxy that buffers (nginx) would hold events back.
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.watched():
            await super().__call__(scope, receive, send)
