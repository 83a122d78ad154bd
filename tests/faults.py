"""Faults as data: a proxy between a client and a Redis server that loses what it is told to lose.

    with FaultProxy(server_url) as proxy:
        proxy.drop_reply(b"XADD")            the server executes, the client never hears of it
        proxy.cut_request(b"XADD", at=40)    the server gets 40 bytes of the request, then nothing
        proxy.hold_replies()                 the server is silent from now on
        proxy.cut()                          every connection breaks now
        proxy.refuse(True)                   new connections break at once: the server is away

Connect to `proxy.url`. A rule waits for a request that contains its command, fires once per
`times`, and is counted in `fired`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import unquote, urlsplit

_CHUNK_BYTES = 1 << 16


def wait_until(law: Callable[[], bool], deadline_seconds: float = 10.0) -> None:
    """Poll until `law()` holds; fails the test when it does not in time."""
    until_seconds = time.monotonic() + deadline_seconds
    while not law():
        assert time.monotonic() < until_seconds, "waited in vain"
        time.sleep(0.002)


@dataclass
class _Rule:
    command: bytes
    left: int
    at: int | None = None  # None: drop the reply; else: bytes of the request that get through


class FaultProxy:
    """Loopback TCP in front of a server on TCP or a Unix socket."""

    def __init__(self, server_url: str) -> None:
        parts = urlsplit(server_url)
        self._server = unquote(parts.path) if parts.scheme == "unix" else (parts.hostname, parts.port or 6379)
        self._listener = socket.create_server(("127.0.0.1", 0))
        credentials, at, _ = parts.netloc.rpartition("@")
        self.url = f"redis://{credentials}{at}127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.fired = 0
        self.connections = 0
        self._rules: list[_Rule] = []
        self._refusing = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def drop_reply(self, command: bytes, *, times: int = 1) -> None:
        with self._lock:
            self._rules.append(_Rule(command, times))

    def cut_request(self, command: bytes, *, at: int, times: int = 1) -> None:
        with self._lock:
            self._rules.append(_Rule(command, times, at))

    def hold_replies(self) -> None:
        self._flowing.clear()

    def release_replies(self) -> None:
        self._flowing.set()

    def refuse(self, refusing: bool) -> None:
        self._refusing = refusing

    def cut(self) -> None:
        with self._lock:
            broken, self._open = self._open, []
        for end in broken:
            _break(end)

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._refusing = True
        self._flowing.set()
        _break(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(5.0)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            family = socket.AF_UNIX if isinstance(self._server, str) else socket.AF_INET
            server = socket.socket(family)
            try:
                server.connect(self._server)
            except OSError:
                server.close()
                client.close()
                continue
            silenced = threading.Event()
            with self._lock:
                self.connections += 1
                self._open += [client, server]
            for pump in (self._requests, self._replies):
                thread = threading.Thread(target=pump, args=(client, server, silenced), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _requests(self, client: socket.socket, server: socket.socket, silenced: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while chunk := client.recv(_CHUNK_BYTES):
                rule = None if silenced.is_set() else self._rule_for(chunk)  # once per request
                if rule is None:
                    server.sendall(chunk)
                    continue
                if rule.at is None:
                    silenced.set()
                    server.sendall(chunk)
                else:
                    server.sendall(chunk[: rule.at])
                    break
        if not silenced.is_set():
            self._end(client, server)

    def _replies(self, client: socket.socket, server: socket.socket, silenced: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while chunk := server.recv(_CHUNK_BYTES):
                self._flowing.wait()
                if silenced.is_set():
                    break
                client.sendall(chunk)
        self._end(client, server)

    def _rule_for(self, chunk: bytes) -> _Rule | None:
        with self._lock:
            for rule in self._rules:
                if rule.left and rule.command in chunk:
                    rule.left -= 1
                    self.fired += 1
                    return rule
        return None

    def _end(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open = [end for end in self._open if end not in ends]
        for end in ends:
            _break(end)


def _break(end: socket.socket) -> None:
    """Wake whoever waits on it, then close."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
