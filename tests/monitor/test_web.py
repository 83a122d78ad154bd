"""The page's server: headers, hosts, resume, and an end that open streams cannot delay."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import monitor_node.page
from common.errors import UserError
from monitor_node import feed as feed_module
from monitor_node.events import EventStreams
from monitor_node.feed import Feed
from monitor_node.web import PageServer, hosts_for, split_address
from tests.faults import wait_until
from tests.monitor.test_feed import apply

DEADLINE_SECONDS = 20.0


def demo_feed() -> Feed:
    feed = Feed("boot")
    feed.publish({"run": {"run_id": "demo"}, "series": {"train": [(1, 9.0)]}})
    return feed


@pytest.fixture
def feed() -> Feed:
    return demo_feed()


@pytest.fixture(scope="module")
def steady() -> Iterator[PageServer]:
    """A server for tests that only read."""
    server = PageServer(demo_feed(), host="127.0.0.1", port=0)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(feed: Feed) -> Iterator[PageServer]:
    server = PageServer(feed, host="127.0.0.1", port=0)
    server.start()
    yield server
    server.stop()


def connect(server: PageServer) -> http.client.HTTPConnection:
    parts = urlsplit(server.url)
    return http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=DEADLINE_SECONDS)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def get(server: PageServer, path: str, *, method: str = "GET", **headers: str) -> Answer:
    with contextlib.closing(connect(server)) as connection:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as response:
            return Answer(status=response.status, headers=response.headers, body=response.read())


class EventReader:
    """Reads one event stream as a browser does."""

    def __init__(self, server: PageServer, last_event_id: str | None = None) -> None:
        self._connection = connect(server)
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self._connection.request("GET", "/api/events", headers=headers)
        self._response = self._connection.getresponse()

    def next(self) -> tuple[str, dict[str, Any]] | None:
        """(id, delta) of the next event; None at the end of the stream."""
        event_id = ""
        while line := self._response.readline().decode():
            if line.startswith("id: "):
                event_id = line[4:].strip()
            if line.startswith("data: "):
                return event_id, json.loads(line[6:])
        return None

    def must_next(self) -> tuple[str, dict[str, Any]]:
        event = self.next()
        assert event is not None
        return event

    def close(self) -> None:
        self._response.close()
        self._connection.close()


PAGES = Path(monitor_node.page.__file__).parent
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
SERVED = [
    ("/", "index.html"),
    *((f"/static/{f.name}", f.name) for f in PAGES.iterdir() if f.suffix in MEDIA_TYPES),
]
STATIC = [(path, f"{MEDIA_TYPES[Path(name).suffix]}; charset=utf-8") for path, name in sorted(SERVED)]


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        *STATIC,
        ("/api/snapshot", "application/json"),
        ("/static/plotly.min.js", "text/javascript; charset=utf-8"),
    ],
)
def test_every_answer_forbids_inline_code_and_other_origins(
    steady: PageServer, path: str, media_type: str
) -> None:
    response = get(steady, path)
    assert (response.status, response.headers["content-type"]) == (200, media_type)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert b"<script>" not in response.body or path.endswith("plotly.min.js")


def test_the_page_has_no_inline_script_style_or_foreign_address(steady: PageServer) -> None:
    page = get(steady, "/").body.decode()
    for forbidden in ("style=", "onclick", "http://", "https://", "<style", "javascript:"):
        assert forbidden not in page


@pytest.mark.parametrize(
    "path",
    [
        "/static/../web.py", "/static/%2e%2e/web.py", "/static/..%2fweb.py", "/static/__init__.py",
        "/static/", "/static/index.html/", "/static//index.html", "/static/plotly.min.js.map", "/api", "/x",
    ],
)  # fmt: skip
def test_nothing_else_is_served(steady: PageServer, path: str) -> None:
    response = get(steady, path)
    assert response.status == 404
    assert response.headers["content-security-policy"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_the_page_is_read_only(steady: PageServer, method: str) -> None:
    assert get(steady, "/api/snapshot", method=method).status == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "192.168.1.9"]
)
def test_a_foreign_host_name_is_refused(steady: PageServer, host: str) -> None:
    response = get(steady, "/api/snapshot", Host=host)
    assert response.status == 421
    assert b"demo" not in response.body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:5", "[::1]"])
def test_our_own_names_are_served(steady: PageServer, host: str) -> None:
    assert get(steady, "/api/snapshot", Host=host).status == 200


def test_a_server_on_all_addresses_answers_literal_addresses_but_no_foreign_name() -> None:
    hosts = hosts_for("0.0.0.0", "0.0.0.0")
    assert "*ip" in hosts
    assert socket.gethostname().lower() in hosts
    assert "*ip" not in hosts_for("127.0.0.1", "127.0.0.1")


def test_the_snapshot_is_the_newest_one(server: PageServer, feed: Feed) -> None:
    feed.publish({"run": {"run_id": "later"}, "series": {}})
    assert json.loads(get(server, "/api/snapshot").body)["run"] == {"run_id": "later"}


def test_a_reconnecting_viewer_resumes_without_gap_or_duplicate(server: PageServer, feed: Feed) -> None:
    reader = EventReader(server)
    event_id, delta = reader.must_next()
    assert event_id == "boot.1"
    page = apply({}, delta)
    reader.close()
    for step in range(2, 40):  # while the viewer is away
        feed.publish({"run": {"run_id": "demo"}, "series": {"train": [[x, 9.0] for x in range(1, step)]}})
    reader = EventReader(server, last_event_id=event_id)
    resumed_id, delta = reader.must_next()
    assert resumed_id == f"boot.{feed.revision}"
    assert "run" not in delta["set"]
    assert apply(page, delta) == feed.snapshot()
    feed.publish({"run": {"run_id": "demo"}, "series": {"train": [[x, 9.0] for x in range(1, 50)]}})
    live_id, delta = reader.must_next()
    assert live_id == f"boot.{feed.revision}"
    assert delta["curves"]["train"]["keep"] == 38
    reader.close()


def test_a_viewer_of_an_earlier_process_gets_everything(server: PageServer, feed: Feed) -> None:
    reader = EventReader(server, last_event_id="other.1")
    _, delta = reader.must_next()
    assert apply({}, delta) == json.loads(json.dumps(feed.snapshot()))
    reader.close()


def test_the_server_stops_although_viewers_are_connected(feed: Feed) -> None:
    server = PageServer(feed, host="127.0.0.1", port=0)
    server.start()
    readers = [EventReader(server) for _ in range(3)]
    for reader in readers:
        reader.must_next()
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    stopper.join(DEADLINE_SECONDS)
    assert not stopper.is_alive()
    assert not server._thread.is_alive()
    for reader in readers:
        while reader.next() is not None:
            pass
        reader.close()


def test_a_stream_ends_by_itself_when_the_server_stops(feed: Feed) -> None:
    streams = EventStreams(feed)

    async def read() -> list[bytes]:
        pieces = []
        async for piece in streams.events(0):
            pieces.append(piece)
            if piece.startswith(b"id:"):
                streams.stop()
        return pieces

    pieces = asyncio.run(asyncio.wait_for(read(), DEADLINE_SECONDS))
    assert pieces[0].startswith(b"retry:")
    assert len(pieces) == 2


def test_a_port_in_use_is_one_line_with_a_cure(steady: PageServer) -> None:
    host, port = split_address(steady.url.removeprefix("http://"))
    with pytest.raises(UserError, match="port 0 takes any free one") as caught:
        PageServer(Feed("boot"), host=host, port=port)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "8080", "localhost", "localhost:", ":80", "h:99999", "h:-1", "h:x"])
def test_a_wrong_address_is_one_line_with_an_example(address: str) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:8080"):
        split_address(address)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert split_address("[::1]:80") == ("::1", 80)


def test_twenty_viewers_on_real_connections_cost_one_serialisation_each_time_and_leave_nothing(
    server: PageServer, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = feed_module.as_json

    def as_json(value: Any) -> bytes:
        made.append(value)
        return real(value)

    monkeypatch.setattr(feed_module, "as_json", as_json)
    readers = [EventReader(server) for _ in range(20)]
    pages = [apply({}, reader.must_next()[1]) for reader in readers]
    assert feed.viewers == 20
    for step in range(2, 12):
        feed.publish({"run": {"run_id": "demo"}, "series": {"train": [[x, 9.0] for x in range(1, step)]}})
        pages = [
            apply(page, reader.must_next()[1]) for page, reader in zip(pages, readers, strict=True)
        ]  # each has it before there is another one
    assert all(page == feed.snapshot() for page in pages)
    assert len(made) == 11  # not 220
    for reader in readers:
        reader.close()
    wait_until(lambda: feed.viewers == 0, DEADLINE_SECONDS)


def test_one_viewer_too_many_is_told_when_to_come_back(
    server: PageServer, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor_node.events.MAX_VIEWERS", 1)
    reader = EventReader(server)
    reader.must_next()
    refused = get(server, "/api/events")
    assert (refused.status, refused.headers["retry-after"]) == (503, "10")
    reader.close()
    wait_until(lambda: feed.viewers == 0, DEADLINE_SECONDS)
    again = EventReader(server)
    again.must_next()
    again.close()
