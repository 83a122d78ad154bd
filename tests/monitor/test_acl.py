"""Users with least rights: judged by a real server that has loaded the file which the command writes."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from common.bus import Bus, Entry, EntryId
from common.errors import BusRefused, NotPermitted, UserError
from common.open_bus import open_bus
from common.streams import HISTORY, NODES, STREAMS, generation_key, key_of
from monitor_node.acl import PAGE, ROLES, acl_text, hash_of
from monitor_node.acl_files import make_users
from tests.secured_server import SecuredServer, secured_server
from tests.servers import REAL_SERVERS, binary_of

ROOT = Path(__file__).resolve().parents[2]
RUN = "run-7"
READING = ("XREAD STREAMS {} 0", "XRANGE {} - +", "XREVRANGE {} + -", "XLEN {}", "XINFO STREAM {}")
SHARING = (
    "XGROUP CREATE {} g 0 MKSTREAM", "XREADGROUP GROUP g c STREAMS {} >", "XACK {} g 1-1",
    "XAUTOCLAIM {} g c 0 0", "XPENDING {} g - + 1",
)  # fmt: skip
APPENDING = ("XADD {} * b x",)
TRIMMING = ("XTRIM {} MINID 1",)
# Never for anybody, on any key.
FORBIDDEN = (
    "FLUSHALL", "FLUSHDB", "KEYS *", "SCAN 0", "CONFIG GET requirepass", "CONFIG SET maxmemory 1", "INFO",
    "EVAL return{} 0", "EVALSHA x 0", "FUNCTION LIST", "SCRIPT FLUSH", "ACL LIST", "ACL WHOAMI", "SHUTDOWN",
    "MONITOR", "DEBUG SLEEP 0", "CLIENT LIST", "CLIENT KILL ID 1", "REPLICAOF NO ONE", "SAVE", "BGSAVE",
    "MODULE LIST", "SLAVEOF NO ONE", "PUBLISH c x", "SUBSCRIBE c", "DEL {}", "UNLINK {}", "SET {} x",
    "DECR {}", "RENAME {} {}x", "EXPIRE {} 1", "XDEL {} 1-1", "XSETID {} 1-1", "XGROUP DESTROY {} g",
    "XCLAIM {} g c 0 1-1", "DUMP {}", "RESTORE {} 0 x", "MIGRATE h 1 {} 0 1", "OBJECT FREQ {}",
    "COPY {} {}x", "SORT {}", "SWAPDB 0 1", "WAIT 0 0",
)  # fmt: skip


@pytest.fixture(scope="module", params=REAL_SERVERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredServer]:
    binary = binary_of(request.param)
    if binary is None:
        pytest.skip(f"{request.param} is not installed")
    text = acl_text("*", {role: hash_of(f"{role}-password") for role in ROLES})
    with secured_server(binary, tmp_path_factory.mktemp("acl"), acl=text) as started:
        yield started


def bus_of(server: SecuredServer, role: str, run_id: str) -> Bus:
    environment = {"HPT_REDIS_USERNAME": role, "HPT_REDIS_PASSWORD": f"{role}-password"}
    return open_bus(server.url, run_id, environment=environment)


def is_allowed(server: SecuredServer, role: str, command: str, key: str = "") -> bool:
    words = command.replace("return{}", "return-1").format(*[key] * command.count("{}")).split(" ")
    try:
        answer = server.admin.execute_command("ACL", "DRYRUN", role, *words)
    except redis.ResponseError as error:
        if "not found" in str(error):  # a command that this server does not have
            return False
        raise
    return answer in (b"OK", "OK")


@pytest.mark.parametrize("role", ROLES)
def test_each_stream_has_one_writer_and_everybody_else_is_refused(server: SecuredServer, role: str) -> None:
    for stream, rule in STREAMS.items():
        key = key_of(RUN, stream)
        assert is_allowed(server, role, *APPENDING, key=key) == (rule.writer == role), stream
        assert is_allowed(server, role, *TRIMMING, key=key) == (role == "trainer" and stream == HISTORY)
        shares = role == "predictor" and stream == HISTORY
        assert {is_allowed(server, role, command, key) for command in SHARING} == {shares}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_reads_what_it_needs_and_no_more(server: SecuredServer, role: str) -> None:
    readable = {
        stream
        for stream in STREAMS
        if all(is_allowed(server, role, command, key_of(RUN, stream)) for command in READING)
    }
    unread = {
        "trainer": set(),
        "predictor": {"orders", "notes.trainer", "notes.monitor"},
        "monitor": set(),
        PAGE: set(),
    }
    assert set(STREAMS) - readable == unread[role]


@pytest.mark.parametrize("role", ROLES)
def test_each_node_counts_only_its_own_generations(server: SecuredServer, role: str) -> None:
    for node, command in itertools.product(NODES, ("INCRBY {} 3", "GET {}")):
        assert is_allowed(server, role, command, generation_key(RUN, node)) == (node == role)


@pytest.mark.parametrize("role", ROLES)
def test_nobody_may_administer_script_list_delete_or_touch_another_key(
    server: SecuredServer, role: str
) -> None:
    for command in FORBIDDEN:
        for key in (*(key_of(RUN, stream) for stream in STREAMS), generation_key(RUN, "trainer")):
            assert not is_allowed(server, role, command, key), command
    for command in (*READING, *SHARING, *APPENDING, *TRIMMING, "INCRBY {} 1"):
        for key in (
            "other",
            "hpt:other",
            f"hpt:{{{RUN}}}:blob.0",
            f"hpt:{{{RUN}}}:history.x",
            "x" + key_of(RUN, HISTORY),
        ):
            assert not is_allowed(server, role, command, key), (command, key)


def test_a_pattern_admits_its_runs_only(server: SecuredServer) -> None:
    for line in acl_text("nano-*", {"trainer": hash_of("x")}).splitlines():
        _, user, *rules = line.replace("user trainer", "user narrow").split(" ")
        rules = re.findall(r"\([^)]*\)|\S+", " ".join(rules))
        if user == "narrow":
            server.admin.execute_command("ACL", "SETUSER", user, *rules)
    for run, admitted in {"nano-1": True, "nano-": True, "nano": False, "big-1": False}.items():
        assert is_allowed(server, "narrow", "XADD {} * b x", key_of(run, HISTORY)) == admitted


def test_without_a_name_nobody_enters(server: SecuredServer) -> None:
    for environment in ({}, {"HPT_REDIS_PASSWORD": "x"}, {"HPT_REDIS_PASSWORD": "trainer-password"}):
        bus = open_bus(server.url, RUN, environment=environment)
        with contextlib.closing(bus), pytest.raises(BusRefused, match="HPT_REDIS_USERNAME"):
            bus.last_id(HISTORY)


@pytest.mark.parametrize("role", ROLES)
def test_the_bus_does_all_its_work_with_the_rights_of_its_role(server: SecuredServer, role: str) -> None:
    """What a quiet run may not send: claims, several streams at once, a retry."""
    run_id = f"work-{role}"
    bus = bus_of(server, role, run_id)
    own = [stream for stream, rule in STREAMS.items() if rule.writer == role]
    server.admin.execute_command("ACL", "LOG", "RESET")
    if role in NODES:
        generation = bus.next_generation(role, at_least=7)
        entries = [Entry(stream, EntryId(generation, n), "K", b"b", 1.0) for stream in own for n in (1, 2)]
        for _ in range(2):  # the second time they are there
            bus.publish(entries)
    if role == "predictor":
        bus.ensure_group(HISTORY, "g", after=EntryId(0, 0))
        with contextlib.closing(bus_of(server, "trainer", run_id)) as trainer:
            trainer.publish([Entry(HISTORY, EntryId(1, n), "K", b"b", 1.0) for n in (1, 2)])
        taken = bus.read_group(
            HISTORY, group="g", consumer="a", max_count=9, block_seconds=0.0, pending=False
        )
        assert len(taken) == 2
        assert len(bus.claim(HISTORY, group="g", consumer="b", idle_seconds=0.0, max_count=9)) == 2
        bus.read_group(HISTORY, group="g", consumer="b", max_count=9, block_seconds=0.0, pending=True)
        bus.ack(HISTORY, "g", [EntryId(1, 1)])
    if role == "trainer":
        bus.trim(HISTORY, below=EntryId(7, 2))
    if role in ("monitor", PAGE):
        assert bus.read_after(dict.fromkeys(STREAMS, EntryId(0, 0)), max_count=9, block_seconds=0.0) == (
            entries if role in NODES else []
        )
        assert bus.latest(HISTORY) is None
        assert sum(bus.length(stream) for stream in STREAMS) == 2 * len(own)
    bus.close()
    refused = server.admin.execute_command("ACL", "LOG")
    objects = {dict(zip(row[::2], row[1::2], strict=True))[b"object"] for row in refused}
    assert objects <= {b"client|setinfo", b"client"}, "only redis-py's greeting is refused"


def test_a_refusal_is_one_line_that_names_the_cure(server: SecuredServer) -> None:
    bus = bus_of(server, PAGE, RUN)
    for entries in (
        [Entry(HISTORY, EntryId(1, 1), "K", b"", 1.0)],
        [Entry(HISTORY, EntryId(1, n), "K", b"", 1.0) for n in (1, 2)],
    ):
        with pytest.raises(NotPermitted, match="monitor-node acl") as refusal:
            bus.publish(entries)
        assert refusal.value.exit_code == 2
        assert "\n" not in str(refusal.value)
        assert "page-password" not in str(refusal.value)
    bus.close()


# --- the command ---------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "monitor_node", "acl", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_prints_passwords_once_and_keeps_only_their_hashes() -> None:
    done = command("--run-id", "nano-*")
    assert done.returncode == 0
    passwords = dict(re.findall(r"HPT_REDIS_USERNAME=(\w+) HPT_REDIS_PASSWORD=(\S+)", done.stderr))
    assert set(passwords) == set(ROLES)
    assert len(set(passwords.values())) == len(ROLES)
    assert all(len(password) >= 43 for password in passwords.values())
    assert not any(password in done.stdout for password in passwords.values())
    assert done.stdout == acl_text("nano-*", {role: hash_of(word) for role, word in passwords.items()})
    assert "aclfile" in done.stderr


def test_files_are_for_their_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    users, folder = tmp_path / "users.acl", tmp_path / "secrets"
    former = os.umask(0)
    try:
        told = make_users("*", ["trainer", PAGE], out_file=users, password_folder=folder)
    finally:
        os.umask(former)
    files = [users, folder / "trainer", folder / PAGE]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 3
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    password = (folder / "trainer").read_text().strip()
    assert f"#{hash_of(password)}" in users.read_text()
    assert not any(password in text for text in (users.read_text(), *told))
    before = [file.read_bytes() for file in files]
    other = tmp_path / "other.acl"
    for out in (users, other):
        with pytest.raises(UserError, match="not overwritten"):
            make_users("*", ROLES, out_file=out, password_folder=folder)
    assert [file.read_bytes() for file in files] == before
    assert not other.exists()
    assert sorted(file.name for file in folder.iterdir()) == [PAGE, "trainer"]


@pytest.mark.parametrize("pattern", ["", " ", "a b", "x~*", "a}:history", "x)", "[ab]", "a\n", "é"])
def test_a_pattern_that_could_change_the_rules_is_one_line_and_nothing_is_written(
    tmp_path: Path, pattern: str
) -> None:
    with pytest.raises(UserError, match="--run-id") as refusal:
        make_users(pattern, ROLES, out_file=tmp_path / "users.acl", password_folder=tmp_path / "s")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
