"""The live page's server: Starlette and uvicorn in a thread. Read-only; knows no bus and no run.

GET /             the page           GET /api/snapshot   the newest snapshot as JSON
GET /static/...   its own files      GET /api/events     server-sent events: deltas, see feed.py
GET /healthz      "ok"

An event's id is a revision, so a browser that reconnects resumes where it was. Safety: bound to
127.0.0.1 unless told otherwise, a Host header that is not ours is refused (DNS rebinding), and
the content policy allows nothing but these files: no inline script, no other origin.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import UserError
from monitor_node.feed import Feed

PUSH_SECONDS = 0.3  # two to four events a second: an eye does not follow more
COMMENT_SECONDS = 15.0  # proxies close silent connections
STOP_SECONDS = 2.0

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/static/style.css": ("style.css", "text/css"),
    **{f"/static/{name}": (name, "text/javascript") for name in ("page.js", "chart.js", "words.js")},
}


def build_app(feed: Feed, *, allowed_hosts: Sequence[str], stopping: threading.Event) -> ASGIApp:
    async def snapshot(request: Request) -> Response:
        return JSONResponse(feed.snapshot())

    async def events(request: Request) -> Response:
        revision = feed.revision_of(request.headers.get("last-event-id"))
        return StreamingResponse(
            event_stream(feed, revision, stopping),
            media_type="text/event-stream",
            headers={"X-Accel-Buffering": "no"},
        )

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def no_icon(request: Request) -> Response:
        return Response(status_code=204)

    routes = [
        Route("/api/snapshot", snapshot),
        Route("/api/events", events),
        Route("/healthz", health),
        Route("/favicon.ico", no_icon),
        *(Route(path, _page_file(*file)) for path, file in _PAGE_FILES.items()),
    ]
    return _Guard(Starlette(routes=routes), allowed_hosts)


async def event_stream(feed: Feed, revision: int, stopping: threading.Event) -> AsyncIterator[str]:
    """Deltas from `revision` on, until the server stops. The first event comes at once."""
    yield "retry: 1000\n\n"
    silent_seconds = 0.0
    while not stopping.is_set():
        if feed.revision > revision:
            revision, delta = feed.since(revision)
            data = json.dumps(delta, separators=(",", ":"), allow_nan=False)
            yield f"id: {feed.event_id(revision)}\nevent: delta\ndata: {data}\n\n"
            silent_seconds = 0.0
        elif silent_seconds >= COMMENT_SECONDS:
            yield ": still here\n\n"
            silent_seconds = 0.0
        await asyncio.sleep(PUSH_SECONDS)
        silent_seconds += PUSH_SECONDS


class PageServer:
    """Serves the page from a thread of its own. The socket is bound on construction."""

    def __init__(self, feed: Feed, *, host: str, port: int) -> None:
        """Raises UserError when the address cannot be bound. Port 0 takes any free one."""
        self._socket = _bind(host, port)
        bound_host, bound_port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}"
        self._stopping = threading.Event()
        app = build_app(feed, allowed_hosts=hosts_for(host, bound_host), stopping=self._stopping)
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,  # else one open event stream keeps the process alive
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="page", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all streams and the thread; takes at most about two seconds."""
        self._stopping.set()
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT -> (host, port). Raises UserError."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(
            f"--http {address}: write it as HOST:PORT, e.g. 127.0.0.1:8080 (port 0 = any free one)"
        )
    return host, int(port)


def hosts_for(host: str, bound_host: str) -> tuple[str, ...]:
    """Names under which a browser may call us; "*ip" stands for any literal address.

    A rebinding attack needs a name, so literal addresses are safe where we listen on all of them.
    """
    names = ["localhost", "127.0.0.1", "::1", host.lower(), bound_host.lower()]
    if _is_wildcard(bound_host):
        names += ["*ip", socket.gethostname().lower()]
    return tuple(names)


class _Guard:
    """Refuses foreign Host headers and adds the safety headers to every answer."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            return
        host = Request(scope).headers.get("host", "")
        app = self._app if self._is_ours(host) else PlainTextResponse("unknown host", status_code=421)
        await app(scope, receive, send_guarded)

    def _is_ours(self, host_header: str) -> bool:
        name = host_header.strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        return name in self._allowed_hosts or ("*ip" in self._allowed_hosts and _is_address(name))


def _page_file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (resources.files("monitor_node") / "page" / name).read_bytes()

    async def page_file(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return page_file


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        cure = "choose another address with --http HOST:PORT; port 0 takes any free one"
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; {cure}") from None


def _is_wildcard(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
