"""The live page's server: Starlette and uvicorn in a thread. Knows no bus and no run.

GET /, /compare   the pages          GET /api/snapshot   the newest snapshot as JSON
GET /static/...   page_files.py      GET /api/events     server-sent events: deltas, see events.py
GET /healthz      "ok"               GET /metrics        for Prometheus, see prometheus.py
                                     POST /api/actions/* with a token only, see action_door.py

Read-only without a token. Safety: bound to 127.0.0.1 unless told otherwise, a Host header that is not ours
is refused (DNS rebinding), and the content policy allows nothing but these files: no inline script, no other
origin.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import UserError
from common.log import NodeLog
from monitor_node.action_door import ActionDoor
from monitor_node.actions import ActionQueue, Token
from monitor_node.events import MAX_VIEWERS, EventStreams
from monitor_node.feed import Feed, as_json
from monitor_node.page_files import file_routes

STOP_SECONDS = 2.0
# 64 viewers (events.py) and what they ask for besides. A process often has 1,024 descriptors, and the monitor
# needs some for its own work whoever calls.
MAX_CONNECTIONS = 128
FIRST_REQUEST_SECONDS = 20.0

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def build_app(
    feed: Feed,
    streams: EventStreams,
    door: ActionDoor,
    *,
    allowed_hosts: Sequence[str],
    more_routes: Sequence[Route] = (),
) -> ASGIApp:
    async def snapshot(request: Request) -> Response:
        return Response(as_json(feed.snapshot()), media_type="application/json")

    async def events(request: Request) -> Response:
        if streams.is_full:
            text = f"{MAX_VIEWERS} pages follow this run already"
            return PlainTextResponse(text, status_code=503, headers={"Retry-After": "10"})
        return streams.response(request.headers.get("last-event-id"))

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def no_icon(request: Request) -> Response:
        return Response(status_code=204)

    routes = [
        Route("/api/snapshot", snapshot),
        Route("/api/events", events),
        door.route(),
        Route("/metrics", Metrics(feed).answer),
        Route("/healthz", health),
        Route("/favicon.ico", no_icon),
        *more_routes,
        *file_routes(),
    ]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False  # what is not on the list is not there, with or without a slash
    return Guard(app, allowed_hosts)


class Metrics:
    """Loads its library at the first scrape: 10 MB and 0.3 s that a run without Prometheus need not pay."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._lock = threading.Lock()
        self._answer = self._load

    def answer(self, request: Request) -> Response:
        """Not a coroutine: Starlette calls it in a thread, so that a scrape holds up no stream."""
        with self._lock:
            body, content_type = self._answer(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    def _load(self, accept: str) -> tuple[bytes, str]:
        from monitor_node.prometheus import SnapshotCollector, exposition

        collector = SnapshotCollector(self._feed.snapshot)
        self._answer = lambda accept: exposition(collector, accept)
        return self._answer(accept)


class BoundedHttp(H11Protocol):
    """Hangs up on connections above MAX_CONNECTIONS, and on those that have asked for nothing in time."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._patience = self.loop.call_later(FIRST_REQUEST_SECONDS, self._hang_up_unless_asked)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def _hang_up_unless_asked(self) -> None:
        if self.cycle is None:
            self.transport.abort()


class AppServer:
    """Serves an app from a thread of its own. The socket is bound on construction."""

    def __init__(self, make_app: Callable[[Sequence[str]], ASGIApp], *, host: str, port: int) -> None:
        """`make_app` gets the names under which it may be called. Raises UserError when the address cannot be
        bound. Port 0 takes any free one.
        """
        self._socket = bound_socket(host, port)
        bound_host, bound_port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}"
        config = uvicorn.Config(
            make_app(hosts_for(host, bound_host)),
            http=BoundedHttp,
            proxy_headers=False,
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
        """End the thread; takes at most about two seconds."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


class PageServer(AppServer):
    """The page of one run."""

    def __init__(
        self,
        feed: Feed,
        *,
        host: str,
        port: int,
        token: Token | None = None,
        actions: ActionQueue | None = None,
        log: NodeLog | None = None,
        more_routes: Sequence[Route] = (),
    ) -> None:
        """Without a token, or nobody to take the `actions`, the page is read-only. `more_routes`: what it
        answers besides. Raises UserError.
        """
        self._streams = EventStreams(feed)
        door = ActionDoor(feed, token if actions is not None else None, actions or ActionQueue(), log)

        def make_app(hosts: Sequence[str]) -> ASGIApp:
            return build_app(feed, self._streams, door, allowed_hosts=hosts, more_routes=more_routes)

        super().__init__(make_app, host=host, port=port)

    def stop(self) -> None:
        """End all streams, then the thread."""
        self._streams.stop()
        super().stop()


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT -> (host, port). Raises UserError."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
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


class Guard:
    """Refuses foreign Host headers and adds the safety headers to every answer."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
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


def bound_socket(host: str, port: int) -> socket.socket:
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
