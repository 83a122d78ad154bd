"""Alerts to a webhook: each once and in order, to a real receiver; whatever it does, the node never waits."""

from __future__ import annotations

import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from common import messages as m
from common.errors import UserError
from common.log import NodeLog
from common.streams import MONITOR
from monitor_node.run_view import AlertRow
from monitor_node.webhook import MAX_TRIES, MAX_WAITING, Webhook, WebhookCounts, checked_url, payload
from tests.faults import wait_until
from tests.monitor import fake_run as fake
from tests.monitor.test_monitor_node import Scene, ScriptedDevice

DEADLINE_SECONDS = 20.0
SECRET_PATH = "/services/T000/B000/secret"
GIB = 1 << 30


def alert(text: str = "look", *, severity: str = "warning", kind: str = "test", step: int = 7) -> AlertRow:
    said = m.Alert(node="trainer", severity=severity, kind=kind, text=text, step=step)
    return AlertRow(alert=said, at_unix_seconds=1e9)


class Receiver:
    """A chat's receiver: takes posts and answers as it is told to."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.answers: list[int] = []  # for the next posts, in order; then 200
        self.location = ""
        self.hold = threading.Event()  # cleared: answers are held back
        self.hold.set()
        self.connections = 0
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.connections += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.hold.wait(DEADLINE_SECONDS)
                status = receiver.answers.pop(0) if receiver.answers else 200
                assert self.headers["Content-Type"] == "application/json"
                if status == 200:
                    receiver.posts.append((self.path, json.loads(body)))
                self.send_response(status)
                if receiver.location:
                    self.send_header("Location", receiver.location)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{SECRET_PATH}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    @property
    def texts(self) -> list[str]:
        return [post["alert_text"] for _, post in self.posts]

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._thread.join(DEADLINE_SECONDS)
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def webhook(receiver: Receiver, log: io.StringIO) -> Iterator[Webhook]:
    webhook = Webhook(receiver.url, "nano", NodeLog(MONITOR, "nano", log), first_pause_seconds=0.001)
    yield webhook
    receiver.hold.set()
    webhook.close(DEADLINE_SECONDS)


def test_each_alert_is_told_once_and_in_order(receiver: Receiver, webhook: Webhook) -> None:
    for number in range(50):
        webhook.put(alert(f"alert {number}"))
    wait_until(lambda: len(receiver.posts) == 50, DEADLINE_SECONDS)
    assert receiver.texts == [f"alert {number}" for number in range(50)]
    webhook.close(DEADLINE_SECONDS)
    assert len(receiver.posts) == 50
    assert webhook.counts == WebhookCounts(posted=50, dropped=0)


def test_a_post_is_readable_for_people_and_for_programs(receiver: Receiver, webhook: Webhook) -> None:
    webhook.put(alert("trainer has been silent for 5.0 s", severity="error", kind="node_lost", step=1400))
    wait_until(lambda: bool(receiver.posts), DEADLINE_SECONDS)
    (path, post) = receiver.posts[0]
    assert path == SECRET_PATH
    assert post == {
        "text": "[error] run nano, step 1,400: trainer has been silent for 5.0 s",
        "run_id": "nano", "severity": "error", "kind": "node_lost", "node": "trainer", "step": 1400,
        "at_unix_seconds": 1e9, "alert_text": "trainer has been silent for 5.0 s",
    }  # fmt: skip


def test_text_of_a_stream_can_neither_call_everybody_nor_fill_the_chat() -> None:
    shown = payload("run", alert("<!channel> @everyone <https://evil|click>\n\x00" + "x" * 10_000))
    assert not set("<>@\n\x00") & set(shown["text"])
    assert len(shown["text"]) <= 1500
    assert len(shown["alert_text"]) <= 1500


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_receiver_that_is_busy_is_tried_again(receiver: Receiver, webhook: Webhook, status: int) -> None:
    receiver.answers = [status] * (MAX_TRIES - 1)
    webhook.put(alert("late"))
    webhook.put(alert("later"))
    wait_until(lambda: receiver.texts == ["late", "later"], DEADLINE_SECONDS)
    assert receiver.connections == MAX_TRIES + 1


@pytest.mark.parametrize("status", [400, 401, 404, 410, 413])
def test_a_receiver_that_says_no_is_not_asked_twice_and_the_next_alert_goes_on(
    receiver: Receiver, webhook: Webhook, log: io.StringIO, status: int
) -> None:
    receiver.answers = [status]
    webhook.put(alert("refused"))
    webhook.put(alert("next"))
    wait_until(lambda: receiver.texts == ["next"], DEADLINE_SECONDS)
    assert receiver.connections == 2
    wait_until(lambda: webhook.counts == WebhookCounts(posted=1, dropped=1), DEADLINE_SECONDS)
    assert str(status) in log.getvalue()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(receiver: Receiver, webhook: Webhook, status: int) -> None:
    receiver.answers, receiver.location = [status], receiver.url
    webhook.put(alert())
    wait_until(lambda: webhook.counts.dropped == 1, DEADLINE_SECONDS)
    assert receiver.connections == 1
    assert receiver.posts == []


def test_a_receiver_that_is_away_is_given_up_counted_and_logged_without_its_secret(log: io.StringIO) -> None:
    gone = Receiver()
    gone.close()
    webhook = Webhook(gone.url, "nano", NodeLog(MONITOR, "nano", log), first_pause_seconds=0.0001)
    webhook.put(alert())
    wait_until(lambda: webhook.counts == WebhookCounts(posted=0, dropped=1), DEADLINE_SECONDS)
    webhook.close(DEADLINE_SECONDS)
    event = json.loads(log.getvalue())
    assert (event["event"], event["host"], event["dropped"]) == ("alert_not_told", "127.0.0.1", 1)
    assert "secret" not in log.getvalue()


def test_a_receiver_that_hangs_holds_up_nobody_and_costs_the_oldest(
    receiver: Receiver, webhook: Webhook, log: io.StringIO
) -> None:
    receiver.hold.clear()
    webhook.put(alert("first"))
    wait_until(lambda: receiver.connections == 1, DEADLINE_SECONDS)
    begun_seconds = time.monotonic()
    for number in range(MAX_WAITING + 100):
        webhook.put(alert(f"alert {number}"))
    assert time.monotonic() - begun_seconds < 5.0  # each answer would take longer than that
    assert webhook.counts.dropped == 100
    assert log.getvalue().count("alert_not_told") == 7  # the 1st, 2nd, 4th ... 64th
    receiver.hold.set()
    wait_until(lambda: webhook.counts.posted == MAX_WAITING + 1, DEADLINE_SECONDS)
    assert receiver.texts[:2] == ["first", "alert 100"]
    assert receiver.texts[-1] == f"alert {MAX_WAITING + 99}"


def test_the_end_tells_what_waits_once_and_gives_up_what_cannot_be_told(log: io.StringIO) -> None:
    """A retry that would wait for a second is due at once when the monitor ends."""
    receiver = Receiver()
    webhook = Webhook(receiver.url, "nano", NodeLog(MONITOR, "nano", log), first_pause_seconds=3600.0)
    receiver.answers = [503]
    webhook.put(alert("retried"))
    wait_until(lambda: receiver.connections == 1, DEADLINE_SECONDS)
    webhook.put(alert("last words"))
    webhook.close(DEADLINE_SECONDS)
    assert receiver.texts == ["retried", "last words"]
    receiver.close()
    webhook.put(alert("too late"))
    webhook.close(DEADLINE_SECONDS)
    assert webhook.counts == WebhookCounts(posted=2, dropped=1)


def test_a_receiver_that_hangs_does_not_hold_up_the_end(receiver: Receiver, webhook: Webhook) -> None:
    receiver.hold.clear()
    for _ in range(3):
        webhook.put(alert())
    wait_until(lambda: receiver.connections == 1, DEADLINE_SECONDS)
    begun_seconds = time.monotonic()
    webhook.close(0.1)
    assert time.monotonic() - begun_seconds < 5.0
    assert webhook.counts.dropped == 2  # the third is on its way


@pytest.mark.parametrize(
    "url",
    [
        "", "secret", "file:///etc/passwd", "ftp://host/secret", "gopher://host/secret", "http://", "https:///secret",
        "http://user:secret@host/", "http://host/with space", "http://host/\nsecret", "http://host:99999/secret",
        "http://host:x/secret", "http://[::1/secret", "javascript:secret", "//host/secret", "http://ho\u017ft/secret",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_one_line_without_the_secret(url: str) -> None:
    with pytest.raises(UserError, match="https://HOST/PATH") as caught:
        checked_url(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://localhost:9/x", "https://hooks.example/T/B?x=1", "HTTPS://[::1]:8080/a"]
)
def test_plain_web_addresses_are_taken(url: str) -> None:
    assert checked_url(url) == url


# --- which alerts ---------------------------------------------------------------------------------


def telling_scene(scene: Scene) -> list[str]:
    """What a monitor tells, of all that it reads."""
    told: list[str] = []
    scene.node._reader._tell = lambda row: told.append(row.alert.text)
    return told


def said(text: str) -> m.Alert:
    return m.Alert(node="trainer", severity="info", kind="x", text=text, step=0)


@pytest.fixture
def scene() -> Scene:
    return Scene(ScriptedDevice([fake.sample(2 * GIB, source="nvml")], is_gpu=True))


def test_a_monitor_tells_what_is_said_from_now_on_and_not_what_its_predecessor_told(scene: Scene) -> None:
    scene.say(fake.started("run"), said("old"))
    scene.clock.advance(60.0)
    second = Scene(ScriptedDevice([fake.sample(2 * GIB)], is_gpu=True), server=scene.server)
    second.clock.advance(60.0)
    second.node._reader._made_unix_seconds = second.clock.unix()
    told = telling_scene(second)
    second.turn(0.1, times=3)
    assert told == []
    scene.say(said("new"))
    second.turn(0.1, times=3)
    assert told == ["new"]


def test_an_alert_that_came_while_the_monitor_was_starting_is_told(scene: Scene) -> None:
    told = telling_scene(scene)
    scene.clock.advance(0.1)
    scene.say(fake.started("run"), said("early"))
    scene.turn(0.1, times=3)
    assert told == ["early"]


def test_every_alert_of_a_storm_is_told_once_although_the_page_keeps_the_newest_only(scene: Scene) -> None:
    told = telling_scene(scene)
    scene.turn(0.1, times=2)
    texts = [f"alert {number}" for number in range(200)]
    scene.say(*map(said, texts))
    scene.turn(0.1, times=10)
    assert told == texts


def test_two_equal_alerts_are_two(scene: Scene) -> None:
    told = telling_scene(scene)
    scene.turn(0.1, times=2)
    scene.say(*[said("again")] * 30)
    scene.turn(0.1, times=3)
    assert told == ["again"] * 30


def test_a_lost_node_and_a_dead_letter_are_told_too(scene: Scene) -> None:
    told = telling_scene(scene)
    scene.turn(0.1, times=2)
    scene.say(
        m.NodeLost(node="trainer", silent_seconds=5.0, last_step=3),
        m.DeadLetter(stream="history", entry_id="1-1", kind="Outcome", deliveries=5, error="bad", body=b""),
        writer=MONITOR,
    )
    scene.turn(0.1, times=2)
    assert [text.partition(" ")[0] for text in told] == ["trainer", "Outcome"]
