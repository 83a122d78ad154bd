"""The page against clients that mean harm, on real connections; hostile run folders; a webhook to nowhere."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.clock import SystemClock
from common.log import NodeLog
from common.messages import Message
from monitor_node import web
from monitor_node.actions import ActionQueue, Token
from monitor_node.feed import as_json
from monitor_node.prometheus import SnapshotCollector, exposition
from monitor_node.run_reader import new_view
from monitor_node.runs import RunsFolder
from monitor_node.runs_server import RunsTable, as_csv, build_app
from monitor_node.snapshot import as_dict
from monitor_node.web import MAX_CONNECTIONS, PageServer
from monitor_node.webhook import Webhook
from tests.common.message_samples import messages
from tests.faults import wait_until
from tests.monitor.test_web import demo_feed, get
from tests.monitor.test_webhook import alert

DEADLINE_SECONDS = 60.0
TOKEN = "0123456789abcdef"


@pytest.fixture
def server() -> Iterator[PageServer]:
    opened = PageServer(
        demo_feed(), host="127.0.0.1", port=0, token=Token(TOKEN.encode()), actions=ActionQueue()
    )
    opened.start()
    yield opened
    opened.stop()


def connected(server: PageServer) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((str(parts.hostname), parts.port), timeout=DEADLINE_SECONDS)


def answer_to(server: PageServer, request: bytes) -> bytes:
    """The status line; b"" when the server hung up without one."""
    with contextlib.closing(connected(server)) as connection:
        with contextlib.suppress(OSError):  # it may answer, and hang up, before it has read all
            connection.sendall(request)
        with contextlib.suppress(OSError):
            return connection.makefile("rb").readline()
    return b""


POST = f"POST /api/actions/stop HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
RAW = {
    "endless target": b"GET /" + b"a" * 1_000_000,
    "endless header": b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 1_000_000,
    "endless headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 100_000,
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "foreign host": b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "huge length": POST + b"Content-Length: 99999999999999\r\n\r\n" + b"x" * 200_000,
    "huge chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFF\r\n" + b"x" * 200_000,
    "smuggled": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
    "upgrade": b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "not ASCII": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "version 9": b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
    "zeros": bytes(100_000),
    "dots": b"GET /static/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "coded dots": b"GET /static/%2e%2e%2f%2e%2e%2fetc%2fpasswd%00.js HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "whole address": b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "trace": b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "range": b"GET /static/page.js HTTP/1.1\r\nHost: localhost\r\nRange: bytes=0-0,1-1,-9999999999\r\n\r\n",
    "metrics": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: text/plain;version=x.y\r\n\r\n",
}  # fmt: skip


def test_no_request_is_answered_by_a_mistake_of_ours_and_the_page_goes_on(server: PageServer) -> None:
    fine = (b"200", b"204", b"400", b"404", b"405", b"413", b"421")
    for name, request in RAW.items():
        status = answer_to(server, request)
        # What is sent behind an answer may cost the answer; a short request always gets one.
        assert (not status and len(request) > 1000) or status.split()[1] in fine, (name, status)
    assert get(server, "/healthz").status == 200


def test_connections_above_the_limit_are_hung_up_on_and_the_page_is_back_when_they_go(
    server: PageServer,
) -> None:
    """Else a thousand silent clients would take every descriptor that the monitor has."""
    silent = [connected(server) for _ in range(MAX_CONNECTIONS)]
    silent[0].sendall(b"GET / HT")
    wait_until(lambda: len(server._server.server_state.connections) == MAX_CONNECTIONS, DEADLINE_SECONDS)
    assert answer_to(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
    for connection in silent:
        connection.close()
    wait_until(lambda: not server._server.server_state.connections, DEADLINE_SECONDS)
    assert get(server, "/healthz").status == 200


def test_who_asks_for_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, server: PageServer) -> None:
    monkeypatch.setattr(web, "FIRST_REQUEST_SECONDS", 0.05)
    with contextlib.closing(connected(server)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(messages(), st.floats()), max_size=12))
def test_no_messages_of_any_node_break_page_or_metrics(said: list[tuple[Message, float]]) -> None:
    view = new_view("run")
    for number, (message, sent_unix_seconds) in enumerate(said):
        view.fold(message, sent_unix_seconds=sent_unix_seconds, at_seconds=float(number))
    snapshot = as_dict(view, now_seconds=100.0)
    as_json(snapshot)
    exposition(SnapshotCollector(lambda: snapshot), "")


# ---- folders of runs ---------------------------------------------------------------------------

NAMES = [
    "=cmd|'c calc'!A1",
    "<script>alert(1)<",
    "\x1b[2J\x07",
    "a\nb",
    "\udcff\udcfe",
    "x" * 200,
    "ü" * 60,
    "%2e%2e",
]
CONFIGS = [
    b"x = 0x" + b"f" * 5000,
    b"a." * 3000 + b"a = 1",
    b"x = " + b"[" * 5000,
    b"[trainer]\ntask = '\x1b[2J'",
    b"x = [" + b"{a" + b".a" * 90 + b" = [1]}]",
    b"\xff",
    b"x = 1" + b"0" * 4200,
    b'"\\u0000\\u202e" = "\\u2028"',
]
SUMMARIES = [
    b'{"real_steps": 1e999, "accepted": NaN, "task": "\\ud800"}',
    b"[" * 50_000,
    b'{"status": {}}',
    b"1" * 5000,
]


def test_a_hostile_folder_of_runs_is_listed_and_breaks_neither_page_nor_table(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.toml").write_bytes(CONFIGS[number % len(CONFIGS)])
        (folder / "summary.json").write_bytes(SUMMARIES[number % len(SUMMARIES)])
        (folder / "metrics.jsonl").write_bytes(SUMMARIES[-number % len(SUMMARIES)] + b"\n" + b"\0" * 5000)
    runs, _ = RunsFolder(tmp_path).read()
    assert len(runs) == len(NAMES)
    for run in runs:
        assert all(
            text.isprintable() for text in (run.name, *run.problems, *run.settings, *run.settings.values())
        )
    table = RunsTable(RunsFolder(tmp_path), SystemClock())
    _, body, listed = table.newest()
    assert body.decode("utf-8")
    assert "\n=cmd" not in as_csv(listed)
    assert build_app(table, allowed_hosts=("localhost",))


# ---- the webhook ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..b", ".a", "a%00b"])
def test_an_address_that_no_host_can_have_costs_the_alert_and_not_the_thread(host: str) -> None:
    hook = Webhook(
        f"http://{host}/secret", "run", NodeLog("monitor", "run", io.StringIO()), first_pause_seconds=0.0001
    )
    hook.put(alert())
    wait_until(lambda: hook.counts.dropped == 1, DEADLINE_SECONDS)
    assert hook._thread.is_alive()
    hook.close(1.0)
