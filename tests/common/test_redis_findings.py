"""Findings 1-4 and 6 of the study of Redis (reference/systems.md, section 0), on real servers.

Each law is shown against a fault, and where a naive client breaks it, that it does.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common import redis_link
from common.bus import STREAM_START, Bus, Entry, EntryId
from common.clock import SystemClock
from common.errors import BusUnavailable, Fenced
from common.messages import RunEnded
from common.open_bus import parse_redis_url
from common.publisher import Publisher
from common.stream_records import records_by_stream
from common.streams import HISTORY
from tests.faults import FaultProxy

ROOT = Path(redis_link.__file__).resolve().parent.parent


def entries(first: int, last: int, *, generation: int = 1) -> list[Entry]:
    return [
        Entry(HISTORY, EntryId(generation, sequence), "Observation", b"body of %d" % sequence, 1.5)
        for sequence in range(first, last + 1)
    ]


def everything(bus: Bus) -> list[Entry]:
    return bus.read_after({HISTORY: STREAM_START}, max_count=10_000, block_seconds=0)


def publisher_on(bus: Bus, *, generation: int = 1) -> Publisher:
    return Publisher(bus, writer="trainer", generation=generation, clock=SystemClock(), rng=random.Random(1))


def message(step: int) -> RunEnded:
    return RunEnded(step=step, reason="stopped")


# Finding 1: blocking readers and socket timeouts


def test_finding_1_block_longer_than_the_command_timeout_is_no_error(
    near_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "COMMAND_SECONDS", 0.2)
    assert near_bus.read_after({HISTORY: STREAM_START}, max_count=1, block_seconds=0.5) == []
    near_bus.ensure_group(HISTORY, "g", after=STREAM_START)
    found = near_bus.read_group(
        HISTORY, group="g", consumer="p", max_count=1, block_seconds=0.5, pending=False
    )
    assert found == []


def test_finding_1_silent_server_is_told_after_one_try(
    far_bus: Bus, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert far_bus.read_after({HISTORY: STREAM_START}, max_count=1, block_seconds=0.01) == []
    connections = proxy.connections
    proxy.hold_replies()
    monkeypatch.setattr(redis_link, "COMMAND_SECONDS", 0.1)
    monkeypatch.setattr(redis_link, "BLOCK_MARGIN_SECONDS", 0.05)
    with pytest.raises(BusUnavailable):
        far_bus.read_after({HISTORY: STREAM_START}, max_count=1, block_seconds=0.01)
    with pytest.raises(BusUnavailable):
        far_bus.length(HISTORY)
    assert proxy.connections <= connections + 2
    proxy.release_replies()
    assert far_bus.length(HISTORY) == 0


# Finding 2: a write whose reply is lost


def test_finding_2_naive_client_duplicates_a_write_whose_reply_is_lost(
    proxy: FaultProxy, near_bus: Bus, run_id: str
) -> None:
    """The fault is real: this is what happens without our rules."""
    address = parse_redis_url(proxy.url, environment={})
    naive = redis.Redis(
        host=address.host, port=address.port, password=address.password, retry=Retry(NoBackoff(), 1)
    )
    proxy.drop_reply(b"XADD")
    naive.xadd(f"hpt:{{{run_id}}}:history", {"k": "x"})
    naive.close()
    assert proxy.fired == 1
    assert near_bus.length(HISTORY) == 2


@pytest.mark.parametrize("num_entries", [1, 2, 100])
def test_finding_2_lost_replies_duplicate_nothing(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy, num_entries: int
) -> None:
    proxy.drop_reply(b"XADD", times=3)
    publisher = publisher_on(far_bus)
    sent = [publisher.prepare(message(step)) for step in range(num_entries)]
    publisher.send(sent, give_up_seconds=30)
    assert proxy.fired == 3
    assert everything(near_bus) == sent


@pytest.mark.parametrize("arrived_bytes", [10, 300, 3_000])
def test_finding_2_half_sent_batch_leaves_no_hole(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy, arrived_bytes: int
) -> None:
    proxy.cut_request(b"XADD", at=arrived_bytes)
    with pytest.raises(BusUnavailable):
        far_bus.publish(entries(1, 50))
    assert everything(near_bus) == []
    far_bus.publish(entries(1, 50))
    assert everything(near_bus) == entries(1, 50)


# Finding 3: explicit ids


def test_finding_3_stale_writer_is_refused_by_the_server(far_bus: Bus, near_bus: Bus) -> None:
    stale, current = publisher_on(near_bus, generation=1), publisher_on(far_bus, generation=2)
    kept = [stale.prepare(message(1)), current.prepare(message(2)), current.prepare(message(3))]
    stale.send(kept[:1], give_up_seconds=5)
    current.send(kept[1:2], give_up_seconds=5)
    with pytest.raises(Fenced):
        stale.send([stale.prepare(message(9))], give_up_seconds=5)
    current.send(kept[2:], give_up_seconds=5)
    assert everything(near_bus) == kept


# Finding 4: a lost XREADGROUP reply


def test_finding_4_entries_of_a_lost_reply_wait_in_the_own_pending_list(
    far_bus: Bus, near_bus: Bus, proxy: FaultProxy
) -> None:
    near_bus.publish(entries(1, 3))
    far_bus.ensure_group(HISTORY, "g", after=STREAM_START)

    def read(*, pending: bool) -> list[int]:
        found = far_bus.read_group(
            HISTORY, group="g", consumer="p", max_count=9, block_seconds=0, pending=pending
        )
        return [delivery.entry.id.sequence for delivery in found]

    proxy.drop_reply(b"XREADGROUP")
    with pytest.raises(BusUnavailable):
        read(pending=False)
    assert read(pending=False) == []
    assert read(pending=True) == [1, 2, 3]


# Finding 6: healthchecks


def healthcheck(url: str, password: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "common.healthcheck", url],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
        env={"HPT_REDIS_PASSWORD": password, "PATH": "/usr/bin:/bin", "PYTHONPATH": _python_path()},
    )  # fmt: skip


def _python_path() -> str:
    return str(Path(redis.__file__).resolve().parent.parent)


def test_finding_6_healthcheck_is_good_only_with_the_right_password(server_url: str) -> None:
    address = parse_redis_url(server_url, environment={})
    bare_url = f"unix://{address.socket_path}"
    good = healthcheck(bare_url, address.password or "")
    assert (good.returncode, good.stdout) == (0, "PONG\n")
    for password in ("", "wrong-password"):
        bad = healthcheck(bare_url, password)
        assert bad.returncode == 1
        assert "PONG" not in bad.stdout
        assert len(bad.stderr.splitlines()) == 1
        assert "HPT_REDIS_PASSWORD" in bad.stderr
        assert "wrong-password" not in bad.stderr


def test_finding_6_redis_cli_ping_calls_a_locked_server_healthy(server_url: str) -> None:
    """Why there is a healthcheck of our own."""
    client = shutil.which("redis-cli")
    if client is None:
        pytest.skip("redis-cli is not installed")
    socket_path = parse_redis_url(server_url, environment={}).socket_path
    told = subprocess.run(
        [client, "-s", socket_path, "ping"], capture_output=True, text=True, timeout=30, check=False
    )
    assert told.returncode == 0
    assert "PONG" not in told.stdout


# Section 1.4: reply shapes of redis-py


@pytest.mark.parametrize(
    "reply",
    [
        [[b"key", [(b"1-1", {b"k": b"v"}), (b"1-2", {b"k": b"w"})]]],
        {b"key": [[(b"1-1", {b"k": b"v"}), (b"1-2", {b"k": b"w"})]]},
        {b"key": [(b"1-1", {b"k": b"v"}), (b"1-2", {b"k": b"w"})]},
    ],
)
def test_all_reply_shapes_mean_the_same(reply: object) -> None:
    assert records_by_stream(reply) == {
        b"key": [(EntryId(1, 1), {b"k": b"v"}), (EntryId(1, 2), {b"k": b"w"})]
    }


@pytest.mark.parametrize("reply", [[], {}, None])
def test_all_shapes_of_nothing_are_empty(reply: object) -> None:
    assert records_by_stream(reply) == {}
