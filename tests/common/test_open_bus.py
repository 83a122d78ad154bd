"""Addresses: the good ones open, the bad ones are told in one line without the password."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.bus import STREAM_START, Entry, EntryId
from common.embedded import EmbeddedServer
from common.errors import SettingsError
from common.memory_bus import MemoryBus
from common.open_bus import open_bus, parse_redis_url
from common.redis_bus import RedisBus
from common.redis_link import RedisAddress, connect

ENTRY = Entry("history", EntryId(1, 1), "RunEnded", b"body", 1.0)


def parse(url: str, **environment: str) -> RedisAddress:
    return parse_redis_url(url, environment=environment)


def test_all_parts_of_an_address_are_read() -> None:
    address = parse("redis://alice:p%40ss%2Fword@example.org:7000/3")
    assert (address.host, address.port, address.database) == ("example.org", 7000, 3)
    assert (address.username, address.password) == ("alice", "p@ss/word")
    assert (address.tls, address.socket_path) == (False, "")
    assert address.shown == "redis://example.org:7000/3"
    socket = parse("unix://:secret@/run/my%20redis.sock?db=2")
    assert (socket.socket_path, socket.database, socket.password) == ("/run/my redis.sock", 2, "secret")
    defaults = parse("redis://example.org")
    assert (defaults.port, defaults.database, defaults.username, defaults.password) == (6379, 0, None, None)
    assert parse("redis://[::1]:6380").host == "::1"


def test_environment_fills_in_what_the_address_lacks(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.touch()
    address = parse("rediss://example.org", HPT_REDIS_PASSWORD="from-env", HPT_REDIS_CA=str(ca_file))
    assert (address.tls, address.password, address.ca_file) == (True, "from-env", str(ca_file))
    assert parse("redis://:in-url@example.org", HPT_REDIS_PASSWORD="from-env").password == "in-url"
    assert "from-env" not in repr(address)
    bus = open_bus(None, "run", environment={"HPT_REDIS_URL": "memory://from-env"})
    assert isinstance(bus, MemoryBus)


def test_tls_checks_certificate_and_host_name() -> None:
    options = connect(parse("rediss://example.org"), 1.0).connection_pool.connection_kwargs
    assert options["ssl_cert_reqs"] == "required"
    assert options["ssl_check_hostname"] is True


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "give --redis or set HPT_REDIS_URL"),
        ("localhost:6379", "unknown scheme"),
        ("http://:secret@localhost", "unknown scheme"),
        ("redis://:secret@localhost:port", "not a valid host and port"),
        ("redis://:secret@localhost:99999", "not a valid host and port"),
        ("redis://:secret/x@localhost", "not a valid host and port"),
        ("redis://[::1", "not a valid host and port"),
        ("redis://", "host is missing"),
        ("redis://:secret@", "host is missing"),
        ("redis://:secret@localhost/one", "database must be a number"),
        ("redis://:secret@localhost/-1", "database must be a number"),
        ("redis://:secret@localhost/²", "database must be a number"),
        ("redis://:secret@localhost?socket_timeout=9", "only option"),
        ("redis://:secret@localhost#part", "only option"),
        ("unix://run/redis.sock", "write the whole path"),
    ],
)
def test_unusable_address_is_one_line_with_the_cure(url: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as refusal:
        open_bus(url, "run", environment={})
    text = str(refusal.value)
    assert "secret" not in text
    assert len(text.splitlines()) == 1
    assert refusal.value.exit_code == 2


def test_missing_certificate_file_is_told_with_its_variable() -> None:
    with pytest.raises(SettingsError, match="HPT_REDIS_CA=/no/such"):
        open_bus("rediss://example.org", "run", environment={"HPT_REDIS_CA": "/no/such.pem"})


def test_opening_does_not_connect() -> None:
    bus = open_bus("redis://127.0.0.1:1", "run", environment={})
    assert isinstance(bus, RedisBus)
    bus.close()


def test_memory_address_is_shared_by_name() -> None:
    open_bus("memory://bus-a", "run", environment={}).publish([ENTRY])
    for url, found in (("memory://bus-a", [ENTRY]), ("memory://bus-b", [])):
        bus = open_bus(url, "run", environment={})
        assert bus.read_after({"history": STREAM_START}, max_count=9, block_seconds=0) == found


def test_embedded_address_starts_a_server_that_ends_with_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[EmbeddedServer] = []
    close = EmbeddedServer.close
    monkeypatch.setattr(EmbeddedServer, "close", lambda server: (closed.append(server), close(server)))
    bus = open_bus("embedded://", "run", environment={})
    bus.publish([ENTRY])
    assert bus.latest("history") == ENTRY
    bus.close()
    assert len(closed) == 1
    assert closed[0].process_id is None
