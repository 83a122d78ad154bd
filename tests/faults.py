"""Faults as data: a proxy between a client and a Redis server that loses, delays and damages as told.

    with FaultProxy(server_url, seed=1) as proxy:
        proxy.drop_reply(b"XADD")            the server executes, the client never hears of it
        proxy.drop_reply(b"XADD", share=0.1) the same for one in ten such requests, until further notice
        proxy.cut_request(b"XADD", at=40)    the server gets 40 bytes of the request, then nothing
        proxy.damage_request(b"XADD")        one bit of the longest value that is no key of ours
        proxy.damage_reply(b"XREAD", anywhere=True)  one bit of the reply is flipped, protocol included
        proxy.delay(requests_seconds=0.1, replies_seconds=0.2)   every piece passes that much later
        proxy.throttle(10_000)               bytes per second in each direction of each connection
        proxy.hold_replies()                 the server is silent from now on
        proxy.cut()                          every connection breaks now
        proxy.refuse(True)                   new connections break at once: the server is away
        proxy.heal()                         no rule, no delay, no throttle any more

Connect to `proxy.url`. A rule waits for a request that contains its command and fires `times` times,
or for a `share` of such requests. Every fault is counted in `fired_by_kind`, rules also in `fired`.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import unquote, urlsplit

_CHUNK_BYTES = 1 << 16
_PARTS_A_SECOND = 20  # of what is throttled
_KEY = b"hpt:"  # a write under another key is a loss, not damage
_VALUE = re.compile(rb"\$(\d+)\r\n")  # the head of a RESP bulk string


def wait_until(law: Callable[[], bool], deadline_seconds: float = 10.0) -> None:
    """Poll until `law()` holds; fails the test when it does not in time."""
    until_seconds = time.monotonic() + deadline_seconds
    while not law():
        assert time.monotonic() < until_seconds, "waited in vain"
        time.sleep(0.002)


@dataclass
class _Rule:
    kind: str  # key of fired_by_kind
    command: bytes
    left: int  # how often it still fires; counts nothing when `share` is given
    share: float | None = None
    at: int = 0  # cut_request: bytes that get through
    anywhere: bool = False  # damage: also keys, lengths and type bytes


@dataclass
class _Damage:
    """A flip that is due on one direction of a connection."""

    rng: random.Random
    kind: str = ""  # empty: none due
    anywhere: bool = False
    bytes_ahead: int | None = None  # the place is known and that far behind the pieces passed so far

    def order(self, kind: str, *, anywhere: bool) -> None:
        self.kind, self.anywhere, self.bytes_ahead = kind, anywhere, None

    def applied(self, piece: bytes) -> tuple[bytes, bool]:
        """The piece as it goes on, and whether it was changed."""
        if not self.kind:
            return piece, False
        if self.bytes_ahead is None:
            self.bytes_ahead = self._place(piece)
        if self.bytes_ahead >= len(piece):
            self.bytes_ahead -= len(piece)
            return piece, False
        place, self.kind = self.bytes_ahead, ""
        flipped = piece[place] ^ (1 << self.rng.randrange(8))
        return piece[:place] + bytes([flipped]) + piece[place + 1 :], True

    def _place(self, piece: bytes) -> int:
        """Anywhere, or within the longest value whose head is in the piece: it may end in a later one."""
        found = _VALUE.finditer(piece)
        heads = [(int(head[1]), head.end()) for head in found if not piece.startswith(_KEY, head.end())]
        num_bytes, start = max(heads, default=(0, 0))
        if self.anywhere or not num_bytes:
            return self.rng.randrange(len(piece))
        return start + self.rng.randrange(num_bytes)


@dataclass
class _Connection:
    client: socket.socket
    server: socket.socket
    in_request: _Damage
    in_reply: _Damage
    silenced: threading.Event = field(default_factory=threading.Event)


class FaultProxy:
    """Loopback TCP in front of a server on TCP or a Unix socket."""

    def __init__(self, server_url: str, *, seed: int = 0) -> None:
        """`seed` decides shares and flipped bits; with several connections their order does, too."""
        parts = urlsplit(server_url)
        self._server = unquote(parts.path) if parts.scheme == "unix" else (parts.hostname, parts.port or 6379)
        self._listener = socket.create_server(("127.0.0.1", 0))
        credentials, at, _ = parts.netloc.rpartition("@")
        self.url = f"redis://{credentials}{at}127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.fired = 0
        self.fired_by_kind: Counter[str] = Counter()
        self.connections = 0
        self._rng = random.Random(seed)
        self._rules: list[_Rule] = []
        self._refusing = False
        self._delays_seconds = {"request": 0.0, "reply": 0.0}
        self._bytes_per_second: float | None = None
        self._flowing = threading.Event()
        self._flowing.set()
        self._closing = threading.Event()
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def drop_reply(self, command: bytes, *, times: int = 1, share: float | None = None) -> None:
        self._add(_Rule("dropped_reply", command, times, share))

    def cut_request(self, command: bytes, *, at: int, times: int = 1, share: float | None = None) -> None:
        self._add(_Rule("cut_request", command, times, share, at=at))

    def damage_request(
        self, command: bytes, *, times: int = 1, share: float | None = None, anywhere: bool = False
    ) -> None:
        self._add(_Rule("damaged_request", command, times, share, anywhere=anywhere))

    def damage_reply(
        self, command: bytes, *, times: int = 1, share: float | None = None, anywhere: bool = False
    ) -> None:
        self._add(_Rule("damaged_reply", command, times, share, anywhere=anywhere))

    def delay(self, *, requests_seconds: float = 0.0, replies_seconds: float = 0.0) -> None:
        self._delays_seconds = {"request": requests_seconds, "reply": replies_seconds}

    def throttle(self, bytes_per_second: float | None) -> None:
        """None: as fast as it goes."""
        self._bytes_per_second = bytes_per_second

    def heal(self) -> None:
        """End all rules, delays and the throttle; let replies flow and connections in."""
        with self._lock:
            self._rules.clear()
        self.delay()
        self.throttle(None)
        self.release_replies()
        self.refuse(False)

    def hold_replies(self) -> None:
        self._flowing.clear()

    def release_replies(self) -> None:
        self._flowing.set()

    def refuse(self, refusing: bool) -> None:
        self._refusing = refusing

    def cut(self) -> None:
        with self._lock:
            broken, self._open = self._open, []
            self.fired_by_kind["cut_connection"] += len(broken) // 2
        for end in broken:
            _break(end)

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._refusing = True
        self._closing.set()
        self._flowing.set()
        _break(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(5.0)
            assert not thread.is_alive()

    def _add(self, rule: _Rule) -> None:
        with self._lock:
            self._rules.append(rule)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                self._count("refused_connection")
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX if isinstance(self._server, str) else socket.AF_INET)
            try:
                server.connect(self._server)
            except OSError:
                server.close()
                client.close()
                continue
            with self._lock:
                self.connections += 1
                self._open += [client, server]
                seeds = self._rng.getrandbits(32), self._rng.getrandbits(32)
            damages = [_Damage(random.Random(seed)) for seed in seeds]
            connection = _Connection(client, server, *damages)
            for pump in (self._requests, self._replies):
                thread = threading.Thread(target=pump, args=(connection,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _requests(self, connection: _Connection) -> None:
        with contextlib.suppress(OSError):
            while piece := connection.client.recv(_CHUNK_BYTES):
                rule = None if connection.silenced.is_set() else self._rule_for(piece)  # once per request
                if rule is not None and rule.kind == "cut_request":
                    connection.server.sendall(piece[: rule.at])
                    break
                if rule is not None and rule.kind == "dropped_reply":
                    connection.silenced.set()
                elif rule is not None:
                    damage = connection.in_request if rule.kind == "damaged_request" else connection.in_reply
                    damage.order(rule.kind, anywhere=rule.anywhere)
                self._pass_on(piece, connection.in_request, connection.server, "request")
        if not connection.silenced.is_set():
            self._end(connection.client, connection.server)

    def _replies(self, connection: _Connection) -> None:
        with contextlib.suppress(OSError):
            while piece := connection.server.recv(_CHUNK_BYTES):
                if not self._flowing.is_set():
                    self._count("held_reply")
                    self._flowing.wait()
                if connection.silenced.is_set():
                    break
                self._pass_on(piece, connection.in_reply, connection.client, "reply")
        self._end(connection.client, connection.server)

    def _pass_on(self, piece: bytes, damage: _Damage, end: socket.socket, direction: str) -> None:
        kind = damage.kind
        piece, changed = damage.applied(piece)
        if changed:
            self._count(kind)
        if delay_seconds := self._delays_seconds[direction]:
            self._count(f"delayed_{direction}")
            self._closing.wait(delay_seconds)
        if (rate := self._bytes_per_second) is None:
            end.sendall(piece)
            return
        self._count(f"throttled_{direction}")
        part_bytes = max(1, int(rate / _PARTS_A_SECOND))
        for start in range(0, len(piece), part_bytes):
            part = piece[start : start + part_bytes]
            end.sendall(part)
            self._closing.wait(len(part) / rate)

    def _rule_for(self, piece: bytes) -> _Rule | None:
        with self._lock:
            for rule in self._rules:
                if rule.command not in piece:
                    continue
                if rule.share is not None:
                    fires = self._rng.random() < rule.share
                else:
                    fires = rule.left > 0
                    rule.left -= fires
                if fires:
                    self.fired += 1
                    if rule.kind in ("dropped_reply", "cut_request"):
                        self.fired_by_kind[rule.kind] += 1
                    return rule
        return None

    def _count(self, kind: str) -> None:
        with self._lock:
            self.fired_by_kind[kind] += 1

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
