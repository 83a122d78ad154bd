"""A fail-over under Sentinel: writers and readers find the new master by trying again, and go on."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from redis.sentinel import MasterNotFoundError

from common.bus import STREAM_START, Bus
from common.clock import SystemClock
from common.errors import BusUnavailable, SettingsError
from common.follower import Follower
from common.messages import RunEnded
from common.open_bus import open_bus, parse_redis_url
from common.publisher import Publisher
from common.redis_link import RedisLink, connect
from common.streams import HISTORY
from tests.campaign.servers import SentinelPair
from tests.faults import wait_until

MOST_TRIES = 200  # each waits for up to 0.1 s; Sentinel needs about 1.5 s


def sequences(bus: Bus) -> list[int]:
    found = bus.read_after({HISTORY: STREAM_START}, max_count=100, block_seconds=0)
    return [entry.id.sequence for entry in found]


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_after_a_fail_over_publishing_and_reading_go_on(tmp_path: Path) -> None:
    with SentinelPair(tmp_path) as pair:
        bus = open_bus(pair.url, "run", environment={})
        publisher = Publisher(bus, writer="trainer", generation=1, clock=SystemClock(), rng=random.Random(1))
        follower = Follower(bus, [HISTORY], clock=SystemClock(), rng=random.Random(2))
        sent = [publisher.prepare(RunEnded(step=step, reason="")) for step in range(1, 7)]
        bus.publish(sent[:3])
        assert follower.read(0.1) == sent[:3]
        wait_until(pair.in_step, 30)
        pair.fail_over()

        refused = 0
        for _ in range(MOST_TRIES):
            try:
                bus.publish(sent[3:])
                break
            except BusUnavailable:
                refused += 1
                SystemClock().sleep(0.1)
        assert 0 < refused < MOST_TRIES
        assert pair.failed_over()
        assert sequences(bus) == [1, 2, 3, 4, 5, 6]
        read = [entry for _ in range(3) for entry in follower.read(0.1)]
        assert read == sent[3:]
        assert follower.resets == 0
        bus.close()


def test_all_parts_of_a_sentinel_address_are_read() -> None:
    address = parse_redis_url(
        "redis+sentinel://alice:p%40ss@one.example:7000,two.example/my%20run/3",
        environment={"HPT_SENTINEL_PASSWORD": "of-sentinel"},
    )
    assert address.sentinels == (("one.example", 7000), ("two.example", 26379))
    assert (address.service, address.database, address.tls) == ("my run", 3, False)
    assert (address.username, address.password) == ("alice", "p@ss")
    assert address.shown == "redis+sentinel://one.example:7000,two.example/my%20run/3"
    assert "p@ss" not in repr(address)
    assert "of-sentinel" not in repr(address)
    over_ipv6 = parse_redis_url("redis+sentinel://[::1]:7000/hpt", environment={})
    assert over_ipv6.sentinels == (("::1", 7000),)


def test_sentinel_and_server_get_their_own_passwords_and_the_same_tls() -> None:
    environment = {"HPT_REDIS_PASSWORD": "of-server", "HPT_SENTINEL_PASSWORD": "of-sentinel"}
    client = connect(parse_redis_url("rediss+sentinel://somewhere/hpt/2", environment=environment), 7.0)
    to_server = client.connection_pool.connection_kwargs
    to_sentinel = client.connection_pool.sentinel_manager.sentinels[0].connection_pool.connection_kwargs
    assert (to_server["password"], to_server["db"], to_server["socket_timeout"]) == ("of-server", 2, 7.0)
    assert to_sentinel["password"] == "of-sentinel"
    assert to_sentinel.get("db", 0) == 0
    for options in (to_server, to_sentinel):
        assert options["ssl_cert_reqs"] == "required"
        assert options["ssl_check_hostname"] is True


def test_sentinels_that_are_away_are_told_without_their_password() -> None:
    bus = open_bus(
        "redis+sentinel://:of-server@127.0.0.1:1/hpt", "run", environment={"HPT_SENTINEL_PASSWORD": "secret"}
    )
    with pytest.raises(BusUnavailable, match="No master found for 'hpt'") as refusal:
        bus.last_id(HISTORY)
    assert "secret" not in str(refusal.value)
    assert "of-server" not in str(refusal.value)
    bus.close()


def test_what_redis_py_knows_of_the_sentinels_is_not_passed_on() -> None:
    """Its version 6.4 lists their passwords."""
    error = MasterNotFoundError("No master found for 'hpt' : <Connection(password=secret)> - Error(1)")
    meant = RedisLink("somewhere", lambda seconds: pytest.fail("no need to connect")).translate(error)
    assert type(meant) is BusUnavailable
    assert "secret" not in str(meant)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis+sentinel://:secret@localhost:26379", "service's name is missing"),
        ("redis+sentinel://:secret@localhost:26379,/hpt", "a host or the service's name"),
        ("redis+sentinel://:secret@localhost:port/hpt", "not a valid host and port"),
        ("redis+sentinel://:secret@localhost/hpt/one", "database must be a number"),
        ("redis+sentinel://:secret@localhost/hpt?socket_timeout=9", "only option"),
        ("unix+sentinel://:secret@localhost/hpt", "unknown scheme"),
    ],
)
def test_unusable_sentinel_address_is_one_line_with_the_cure(url: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as refusal:
        open_bus(url, "run", environment={})
    text = str(refusal.value)
    assert "secret" not in text
    assert len(text.splitlines()) == 1
