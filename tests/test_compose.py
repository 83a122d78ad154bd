"""docker-compose.yml and Dockerfile describe what really exists: no engine needed to find out.

Command lines are parsed by the real command-line interfaces, the Redis command and its health check
run against a real redis-server, and the file is validated by `docker-compose config`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from monitor_node.acl import ROLES, acl_text, hash_of

ROOT = Path(__file__).resolve().parent.parent
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_TEXT)["services"]
USERS_TEXT = (ROOT / "docs" / "compose-acl.yml").read_text(encoding="utf-8")
WITH_USERS: dict[str, dict[str, Any]] = yaml.safe_load(USERS_TEXT)["services"]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NODES = [name for name, service in SERVICES.items() if "build" in service]
OBSERVABILITY = ("prometheus", "grafana")
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(:[-?])?([^}]*)\}")
PASSWORD = "s3cret-for-tests"


def filled(text: str) -> str:
    """Text with compose's defaults filled in and `$$` unescaped, as the container sees it."""
    return VARIABLE.sub(lambda match: match[3] if match[2] == ":-" else "value", text).replace("$$", "$")


def test_one_service_per_node_and_the_others_only_on_request() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles == {
        **dict.fromkeys(("redis", "trainer", "predictor", "monitor")),
        "trainer-gpu": ["gpu"],
        **{name: ["observability"] for name in OBSERVABILITY},
    }
    [device] = SERVICES["trainer-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["trainer-gpu"]["command"] == SERVICES["trainer"]["command"]
    assert "trainer" not in SERVICES["trainer-gpu"]["depends_on"]


@pytest.mark.parametrize("name", NODES)
def test_every_command_line_is_understood_by_its_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = [filled(part) for part in SERVICES[name]["command"]]
    module = SCRIPTS[program].partition(":")[0]
    for key, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(key, filled(value))
    cli = importlib.import_module(module).cli
    assert isinstance(cli, click.Group)
    assert arguments[0] in cli.commands
    cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])  # UsageError for an unknown option


@pytest.mark.parametrize("name", NODES)
def test_a_node_waits_for_a_healthy_redis_drains_and_runs_without_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert int(service["stop_grace_period"].removesuffix("s")) >= 30
    assert service["restart"] == "on-failure:5"
    assert service["cap_drop"] == ["ALL"]
    assert "runs:/runs" in service["volumes"]
    assert set(service["environment"]) == {"HPT_REDIS_URL", "HPT_REDIS_PASSWORD"}


def test_a_restarted_trainer_goes_on_with_its_run() -> None:
    assert "--resume" in SERVICES["trainer"]["command"]


def test_only_pages_are_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "monitor": ["127.0.0.1:8765:8765"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    assert all(service["networks"] == ["private"] for service in SERVICES.values())
    assert not any("network_mode" in service for service in SERVICES.values())


def test_the_password_is_required_and_in_no_file() -> None:
    users = {name: service for name, service in SERVICES.items() if name not in OBSERVABILITY}
    stated = [service["environment"] for service in users.values()]
    values = [value for table in stated for key, value in table.items() if "PASSWORD" in key or "AUTH" in key]
    assert len(values) == len(users)
    assert all(value.startswith("${HPT_REDIS_PASSWORD:?") for value in values)
    assert "PASSWORD" not in DOCKERFILE


def test_every_variable_is_documented() -> None:
    page = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
    used = {match[1] for match in VARIABLE.finditer(COMPOSE_TEXT + USERS_TEXT)}
    documented = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert used == documented
    for match in VARIABLE.finditer(COMPOSE_TEXT):
        if match[2] == ":-":
            assert f"| `{match[1]}` | `{match[3]}` |" in page, "the documented default is another one"


def test_every_path_and_stage_of_the_dockerfile_exists() -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
        for source in shlex.split(line)[:-1]
    ]
    missing = [source for source in copied if not (ROOT / source).exists()]
    if missing == ["README.md"]:
        pytest.skip("README.md is not written yet")
    assert not missing
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    stages = set(re.findall(r"^FROM .+ AS (\w+)$", DOCKERFILE, re.MULTILINE))
    assert {SERVICES[name]["build"]["target"] for name in NODES} < stages
    arguments = {key for name in NODES for key in SERVICES[name]["build"].get("args", {})}
    assert arguments <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def test_the_images_run_pinned_and_not_as_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert all("USER hpt" in stage for stage in stages if not stage.startswith("python:"))
    for line in re.findall(r"pip install (.+)", DOCKERFILE):
        assert "-c constraints.txt" in line or "--no-deps" in line
    assert "PYTHONUNBUFFERED=1" in DOCKERFILE


@pytest.mark.parametrize("name", [n for n in NODES if SERVICES[n]["build"]["target"] == "light"])
def test_a_node_of_the_light_image_starts_without_torch(name: str) -> None:
    module = SCRIPTS[SERVICES[name]["command"][0]].partition(":")[0]
    program = (
        "import sys; sys.modules['torch'] = None\n"  # makes every import of it fail
        f"from {module} import cli\ncli(['--help'], standalone_mode=False)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def redis_socket(tmp_path: Path) -> Iterator[Path]:
    """The compose file's own Redis command."""
    with redis_of(SERVICES["redis"], tmp_path) as path:
        yield path


@contextlib.contextmanager
def redis_of(service: dict[str, Any], tmp_path: Path, *, users: str = "") -> Iterator[Path]:
    """A service's Redis command, run by the local redis-server on a Unix socket."""
    if not shutil.which("redis-server") or not shutil.which("redis-cli"):
        if os.environ.get("CI"):
            pytest.fail("redis-server and redis-cli must be there in CI")
        pytest.skip("needs redis-server and redis-cli on PATH")
    shell, option, script = service["command"]
    short_folder = tempfile.mkdtemp(prefix="hpt-")  # a socket's path has at most about 104 bytes
    path = Path(short_folder) / "s"
    start = "docker-entrypoint.sh redis-server -"
    assert start in script
    (tmp_path / "users.acl").write_text(users)
    script = filled(script).replace("/users.acl", shlex.quote(str(tmp_path / "users.acl")))
    script = script.replace(start, f"redis-server - --port 0 --unixsocket {shlex.quote(str(path))}")
    process = subprocess.Popen(
        [shell, option, script],
        cwd=tmp_path,
        env={**os.environ, "REDISCLI_AUTH": PASSWORD},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 10
        while not answers(path) and time.monotonic() < deadline:
            assert process.poll() is None, "the server did not start"
        command_line = Path(f"/proc/{process.pid}/cmdline")
        if command_line.exists():
            assert PASSWORD.encode() not in command_line.read_bytes()
        yield path
    finally:
        process.terminate()
        assert process.wait(timeout=10) == 0  # `exec`: SIGTERM reaches the server itself
        shutil.rmtree(short_folder)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def redis_cli(path: Path, *arguments: str, password: str = PASSWORD, user: str = "default") -> str:
    command = ["redis-cli", "-s", str(path), "--user", user, *arguments]
    environment = {**os.environ, "REDISCLI_AUTH": password}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_redis_keeps_its_data_evicts_nothing_and_wants_the_password(redis_socket: Path) -> None:
    wanted = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "maxmemory": str(512 << 20),
        "requirepass": PASSWORD,
    }
    for key, value in wanted.items():
        assert redis_cli(redis_socket, "config", "get", key).split() == [key, value]
    assert "NOAUTH" in redis_cli(redis_socket, "get", "x", password="")
    assert "redis-data:/data" in SERVICES["redis"]["volumes"]


def test_the_health_check_fails_without_the_password(redis_socket: Path) -> None:
    kind, check = SERVICES["redis"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    check = filled(check).replace("redis-cli", f"redis-cli -s {shlex.quote(str(redis_socket))}")

    def code(password: str) -> int:
        environment = {**os.environ, "REDISCLI_AUTH": password}
        return subprocess.run(["sh", "-c", check], env=environment, stderr=subprocess.DEVNULL).returncode

    assert code(PASSWORD) == 0
    assert code("") != 0
    assert code("wrong") != 0


def test_with_users_each_node_is_its_own_and_nobody_enters_without_a_name(tmp_path: Path) -> None:
    hashes = {role: hash_of(f"{role}-{PASSWORD}") for role in ROLES}
    with redis_of(WITH_USERS["redis"], tmp_path, users=acl_text("*", hashes)) as path:
        for role in ROLES:
            assert redis_cli(path, "ping", user=role, password=f"{role}-{PASSWORD}") == "PONG\n"
        assert "PONG" not in redis_cli(path, "ping")
        assert "NOPERM" in redis_cli(path, "flushall", user="trainer", password=f"trainer-{PASSWORD}")
        check = filled(WITH_USERS["redis"]["healthcheck"]["test"][1])
        check = check.replace("redis-cli", f"redis-cli -s {shlex.quote(str(path))}")
        for password, code in {f"page-{PASSWORD}": 0, PASSWORD: 1}.items():
            environment = {**os.environ, "REDISCLI_AUTH": password}
            done = subprocess.run(["sh", "-c", check], env=environment, stderr=subprocess.DEVNULL)
            assert done.returncode == code
    assert {name: WITH_USERS[name]["environment"]["HPT_REDIS_USERNAME"] for name in NODES} == {
        name: name.removesuffix("-gpu") for name in NODES
    }


@pytest.fixture
def docker_compose() -> str:
    program = shutil.which("docker-compose")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("docker-compose must be there in CI")
        pytest.skip("needs docker-compose on PATH; it validates without an engine")
    return program


def test_the_compose_file_is_valid(docker_compose: str) -> None:
    names = ["HPT_REDIS_PASSWORD", *(f"HPT_{role.upper()}_PASSWORD" for role in ROLES)]
    environment = {**os.environ, **dict.fromkeys(names, PASSWORD)}
    for files in ([], ["-f", "docker-compose.yml", "-f", "docs/compose-acl.yml"]):
        subprocess.run([docker_compose, *files, "config", "-q"], cwd=ROOT, env=environment, check=True)


def test_without_a_password_compose_stops_and_names_the_cure(docker_compose: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)  # away from a developer's own .env
    environment = {key: value for key, value in os.environ.items() if key != "HPT_REDIS_PASSWORD"}
    result = subprocess.run(
        [docker_compose, "config", "-q"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "docs/compose.md" in result.stderr
