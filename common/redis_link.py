"""Connections to one Redis server, and what its errors mean. The only module that imports redis.

Two kinds of connection: for commands (2 s) and for blocking reads (block + margin), because a
block longer than the socket timeout always fails (systems.md 1.4). redis-py never retries here:
it would duplicate writes (finding 2) and hide a dead server for a minute (finding 1). Connections
are made on first use and again after every failure. RESP2, so that reply shapes are the same in
redis-py 6.4, 7.4 and 8.1. No error text contains a password.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import redis
from redis import Redis as Redis  # for annotations elsewhere
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    TryAgainError,
)
from redis.retry import Retry

from common.bus import GroupLost
from common.errors import BusFull, BusRefused, BusUnavailable

COMMAND_SECONDS = 2.0
BLOCK_MARGIN_SECONDS = 2.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisAddress:
    """Where a server is and how to get in. `shown` is safe to print, the rest is not."""

    shown: str
    host: str = ""
    port: int = 6379
    socket_path: str = ""  # a Unix socket when not empty
    database: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None


def connect(address: RedisAddress, socket_seconds: float) -> redis.Redis:
    """A client that has not connected yet and never retries."""
    options: dict[str, Any] = {
        "db": address.database,
        "username": address.username,
        "password": address.password,
        "socket_timeout": socket_seconds,
        "socket_connect_timeout": COMMAND_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if address.socket_path:
        return redis.Redis(unix_socket_path=address.socket_path, **options)
    options.update(host=address.host, port=address.port, socket_keepalive=True)
    if address.tls:
        options.update(
            ssl=True,
            ssl_cert_reqs="required",
            ssl_check_hostname=True,
            ssl_ca_certs=address.ca_file,
            ssl_certfile=address.certificate_file,
            ssl_keyfile=address.key_file,
        )
    return redis.Redis(**options)


class RedisLink:
    """Runs operations on a client and translates what goes wrong. Thread-safe."""

    def __init__(self, shown: str, connect: Callable[[float], redis.Redis]) -> None:
        """`connect` takes the socket timeout in seconds; it must not talk to the server yet."""
        self.shown = shown
        self._connect = connect
        self._lock = threading.Lock()
        self._clients: dict[float, redis.Redis] = {}
        self._closed = False

    def call(self, operation: Callable[[redis.Redis], T], *, block_seconds: float = 0.0) -> T:
        """Result of `operation(client)`; with `block_seconds` on a connection that may wait that long.

        Raises BusUnavailable, BusFull, BusRefused or GroupLost; error replies inside a pipeline
        that was run with raise_on_error=False are the operation's own matter.
        """
        # Whole seconds: the waits of a caller differ a little each time, its connection need not.
        socket_seconds = math.ceil(block_seconds) + BLOCK_MARGIN_SECONDS if block_seconds else COMMAND_SECONDS
        client = self._client(socket_seconds)
        try:
            return operation(client)
        except redis.DataError:  # a value that redis-py cannot send: a mistake of ours
            raise
        except (redis.RedisError, OSError) as error:
            client.connection_pool.disconnect(inuse_connections=False)
            raise self.translate(error) from None
        finally:
            if self._closed:
                client.connection_pool.disconnect(inuse_connections=False)

    def translate(self, error: Exception) -> Exception:
        """What an error of redis-py means for us, in one line that names the cure."""
        text = text_of(error)
        meanings = (
            meaning
            for meaning, classes, marks in _MEANINGS
            if isinstance(error, classes) or any(mark in text for mark in marks)
        )
        meaning = next(meanings, BusUnavailable)
        return meaning(f"redis at {self.shown}: {_CURES[meaning]} ({text})")

    def close(self) -> None:
        """Close idle connections; one that is in use is closed by its user when it is done."""
        with self._lock:
            self._closed = True
            for client in self._clients.values():
                client.connection_pool.disconnect(inuse_connections=False)

    def _client(self, socket_seconds: float) -> redis.Redis:
        with self._lock:
            if self._closed:
                raise BusUnavailable(f"redis at {self.shown}: this bus is closed")
            if socket_seconds not in self._clients:
                self._clients[socket_seconds] = self._connect(socket_seconds)
            return self._clients[socket_seconds]


# First match counts. Classes and texts, because redis-py cuts the server's code ("NOAUTH ...") off
# where it has a class for it, and which it has differs between its versions.
_MEANINGS: tuple[tuple[type[Exception], tuple[type[Exception], ...], tuple[str, ...]], ...] = (
    # The last one is fakeredis' text for a stream that does not exist.
    (GroupLost, (), ("NOGROUP", "UNBLOCKED", "stream key no longer exists", "requires the key to exist")),
    (BusFull, (OutOfMemoryError,), ("OOM ", "MISCONF")),
    (
        BusRefused,
        (redis.AuthenticationError, NoPermissionError, redis.InvalidResponse),
        (
            "without any password configured",
            "WRONGPASS",
            "NOAUTH",
            "NOPERM",
            "CERTIFICATE_VERIFY_FAILED",
            "certificate verify failed",
        ),
    ),
    (
        BusUnavailable,
        (redis.BusyLoadingError, redis.ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError),
        ("BUSY ", "LOADING ", "READONLY ", "MASTERDOWN ", "CLUSTERDOWN ", "TRYAGAIN "),
    ),
    (BusRefused, (redis.ResponseError,), ()),
)

_CURES: dict[type[Exception], str] = {
    GroupLost: "the consumer group is gone; it must be made again",
    BusFull: "the server takes no writes; give it more memory or disk",
    BusRefused: "it answers but refuses us; check the address, HPT_REDIS_PASSWORD, the user's rights"
    " and HPT_REDIS_CA",
    BusUnavailable: "no usable answer; is it running, and is the address right?",
}


def text_of(error: Exception) -> str:
    """The server's own words in one line, without the command that redis-py quotes before them."""
    text = str(error).rpartition(" of pipeline caused error: ")[2].strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
