"""Connections to one Redis server, and what its errors mean. The only module that imports redis.

Two kinds of connection: for commands (2 s) and for blocking reads (block + margin), because a
block longer than the socket timeout always fails (systems.md 1.4). redis-py never retries here:
it would duplicate writes (finding 2) and hide a dead server for a minute (finding 1). Connections
are made on first use and again after every failure. RESP2, so that reply shapes are the same in
redis-py 6.4, 7.4 and 8.1. No error text contains a password.
A byte that changes on the way makes redis-py raise almost anything, or take a good password for a
wrong one. So a refusal counts only when fresh connections repeat it to the letter.
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
from redis.sentinel import MasterNotFoundError, Sentinel

from common.bus import GroupLost
from common.errors import BusFull, BusRefused, BusUnavailable, NotPermitted

COMMAND_SECONDS = 2.0
BLOCK_MARGIN_SECONDS = 2.0

T = TypeVar("T")


class DamagedReply(redis.RedisError):
    """A reply that cannot be true: try again."""


# What redis-py, and whoever takes its replies apart, raises about bytes that make no sense.
_NONSENSE = (ValueError, TypeError, LookupError, AttributeError, MemoryError)
_REFUSALS_BELIEVED = 3  # equal ones in a row


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisAddress:
    """Where a server is and how to get in. `shown` is safe to print, the rest is not."""

    shown: str
    host: str = ""
    port: int = 6379
    sentinels: tuple[
        tuple[str, int], ...
    ] = ()  # (host, port) of who knows where it is; then `host` is unused
    service: str = ""  # what Sentinel calls it
    sentinel_password: str | None = field(default=None, repr=False)
    socket_path: str = ""  # a Unix socket when not empty
    database: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None


def connect(address: RedisAddress, socket_seconds: float) -> redis.Redis:
    """A client that has not connected yet and never retries.

    With Sentinels every new connection asks them for the master first; the connections of a failed
    call are never used again (RedisLink), so the call after a fail-over finds the new one.
    """
    options: dict[str, Any] = {
        "socket_timeout": socket_seconds,
        "socket_connect_timeout": COMMAND_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    login: dict[str, Any] = {
        "db": address.database,
        "username": address.username,
        "password": address.password,
    }
    if address.socket_path:
        return redis.Redis(unix_socket_path=address.socket_path, **options, **login)
    options["socket_keepalive"] = True
    if address.tls:
        options.update(
            ssl=True,
            ssl_cert_reqs="required",
            ssl_check_hostname=True,
            ssl_ca_certs=address.ca_file,
            ssl_certfile=address.certificate_file,
            ssl_keyfile=address.key_file,
        )
    if not address.sentinels:
        return redis.Redis(host=address.host, port=address.port, **options, **login)
    ask_sentinel = {**options, "socket_timeout": COMMAND_SECONDS, "password": address.sentinel_password}
    sentinel: Any = Sentinel(address.sentinels, sentinel_kwargs=ask_sentinel)  # type: ignore[no-untyped-call]
    master: redis.Redis = sentinel.master_for(address.service, **options, **login)
    return master


class RedisLink:
    """Runs operations on a client and translates what goes wrong. Thread-safe."""

    def __init__(self, shown: str, connect: Callable[[float], redis.Redis]) -> None:
        """`connect` takes the socket timeout in seconds; it must not talk to the server yet."""
        self.shown = shown
        self._connect = connect
        self._lock = threading.Lock()
        self._clients: dict[float, redis.Redis] = {}
        self._closed = False
        self._spoke_redis = False  # a call has succeeded

    def call(self, operation: Callable[[redis.Redis], T], *, block_seconds: float = 0.0) -> T:
        """Result of `operation(client)`; with `block_seconds` on a connection that may wait that long.

        Raises BusUnavailable, BusFull, BusRefused or GroupLost; error replies inside a pipeline
        that was run with raise_on_error=False are the operation's own matter.
        """
        # Whole seconds: the waits of a caller differ a little each time, its connection need not.
        socket_seconds = math.ceil(block_seconds) + BLOCK_MARGIN_SECONDS if block_seconds else COMMAND_SECONDS
        client = self._client(socket_seconds)
        try:
            result = operation(client)
        except redis.DataError:  # a value that redis-py cannot send: a mistake of ours
            raise
        except (redis.RedisError, OSError, *_NONSENSE) as error:
            client.connection_pool.disconnect(inuse_connections=False)
            if self._spoke_redis and isinstance(error, redis.InvalidResponse):
                raise BusUnavailable(f"redis at {self.shown}: a damaged answer ({text_of(error)})") from None
            raise self._believed(self.translate(error), client, operation) from None
        else:
            self._spoke_redis = True
            return result
        finally:
            if self._closed:
                client.connection_pool.disconnect(inuse_connections=False)

    def renew(self) -> None:
        """Use none of the idle connections again: what came over one of them was damaged."""
        with self._lock:
            for client in self._clients.values():
                client.connection_pool.disconnect(inuse_connections=False)

    def _believed(
        self, refusal: Exception, client: redis.Redis, operation: Callable[[redis.Redis], object]
    ) -> Exception:
        """A refusal that is not repeated was damage. What the repetition brings is as good as lost on
        the way, which every caller stands: writes have ids, groups keep what they gave out.
        """
        for _ in range(_REFUSALS_BELIEVED - 1):
            if not isinstance(refusal, BusRefused):
                break
            try:
                operation(client)
                again: Exception | None = None
            except (redis.RedisError, OSError, *_NONSENSE) as error:
                client.connection_pool.disconnect(inuse_connections=False)
                again = self.translate(error)
            if str(again) != str(refusal):
                return BusUnavailable(f"{refusal}; another answer differed, asking again")
        return refusal

    def translate(self, error: Exception) -> Exception:
        """What an error of redis-py means for us, in one line that names the cure."""
        text = text_of(error)
        meanings = (
            meaning
            for meaning, classes, marks in _MEANINGS
            if isinstance(error, classes) or any(mark in text for mark in marks)
        )
        meaning = next(meanings, BusUnavailable)
        # A server that refuses our certificate may close before its reason has come through.
        is_tls = any(mark in text for mark in ("EOF occurred in violation of protocol", "[SSL] PEM lib"))
        hint = "; over TLS: are HPT_REDIS_CERT and HPT_REDIS_KEY what it wants?" if is_tls else ""
        return meaning(f"redis at {self.shown}: {_CURES[meaning]}{hint} ({text})")

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


def ask_twice(client: redis.Redis, found_in: Callable[[Any], T], *command: Any, **options: Any) -> T:
    """What `found_in` makes of the reply to a command that only reads, asked for twice at one moment.

    Raises DamagedReply when the two differ: a flipped bit in a number shows in nothing else.
    """
    with client.pipeline(transaction=False) as pipe:  # a server does what came in one piece in one go
        for _ in range(2):
            pipe.execute_command(*command, **options)  # type: ignore[no-untyped-call]
        first, second = pipe.execute(raise_on_error=False)
    for reply in (first, second):
        if isinstance(reply, Exception):
            raise reply
    found = found_in(first)
    if found != found_in(second):
        raise DamagedReply(f"two replies to {command[0]} at one moment differ")
    return found


# First match counts. Classes and texts, because redis-py cuts the server's code ("NOAUTH ...") off
# where it has a class for it, and which it has differs between its versions.
_MEANINGS: tuple[tuple[type[Exception], tuple[type[Exception], ...], tuple[str, ...]], ...] = (
    # The last one is fakeredis' text for a stream that does not exist.
    (GroupLost, (), ("NOGROUP", "UNBLOCKED", "stream key no longer exists", "requires the key to exist")),
    (BusFull, (OutOfMemoryError,), ("OOM ", "MISCONF")),
    (NotPermitted, (NoPermissionError,), ("NOPERM",)),
    (
        BusRefused,
        (redis.AuthenticationError, redis.InvalidResponse),
        (
            "without any password configured",
            "WRONGPASS",
            "NOAUTH",
            "CERTIFICATE_VERIFY_FAILED",
            "certificate verify failed",
            "ALERT_CERTIFICATE_REQUIRED",  # ours is missing
            "ALERT_UNKNOWN_CA",  # or not one that the server trusts
            "ALERT_BAD_CERTIFICATE",
            "ALERT_HANDSHAKE_FAILURE",
        ),
    ),
    (
        BusUnavailable,
        (redis.BusyLoadingError, redis.ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError),
        ("BUSY ", "LOADING ", "READONLY ", "MASTERDOWN ", "CLUSTERDOWN ", "TRYAGAIN "),
    ),
    (BusRefused, (redis.ResponseError, *_NONSENSE), ()),
)

_CURES: dict[type[Exception], str] = {
    GroupLost: "the consumer group is gone; it must be made again",
    BusFull: "the server takes no writes; give it more memory or disk",
    NotPermitted: "this user may not do that; use the user of this node, with the rights that"
    " `monitor-node acl` writes",
    BusRefused: "it answers but refuses us; check the address, HPT_REDIS_USERNAME, HPT_REDIS_PASSWORD,"
    " HPT_REDIS_CA, and HPT_REDIS_CERT and HPT_REDIS_KEY where the server wants a certificate of ours",
    BusUnavailable: "no usable answer; is it running, and is the address right?",
}


def text_of(error: Exception) -> str:
    """The server's own words in one line, without the command that redis-py quotes before them."""
    text = str(error).rpartition(" of pipeline caused error: ")[2].strip()
    if isinstance(error, MasterNotFoundError):  # redis-py adds all it knows of the Sentinels, passwords too
        text = text.partition(" : ")[0]
    if isinstance(error, _NONSENSE):
        text = f"{type(error).__name__}: {text}"
    return ascii(text.splitlines()[0][:200])[1:-1] if text else type(error).__name__
