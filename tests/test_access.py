"""A whole run behind ACL and mutual TLS: each node is its own user, it works, and no secret is left anywhere.

One run is shared by the tests: trainer, predictor and monitor as processes of their own, on a server that
has loaded the file of `monitor-node acl`. Every secret in it is known here, so it can be looked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.errors import SettingsError
from common.open_bus import parse_redis_url
from common.recording import read_recording
from common.streams import NODES
from tests import nodes
from tests.secured_server import Certificates, SecuredServer, make_certificate, secured_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parent.parent
RUN = "guarded"
PAGE_TOKEN = "page-token-0123456789abcdef"
WEBHOOK_PATH = "webhook-path-0123456789abcdef"
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("HPT_")}
SETTINGS = [part for text in (*nodes.QUICK, "monitor.silent_seconds=0.6") for part in ("--set", text)]


@dataclass
class Guarded:
    """The server, who may enter it, and everything that was said or shown during the run."""

    folder: Path
    server: SecuredServer
    passwords: dict[str, str]
    environments: dict[str, dict[str, str]]
    command_lines: set[str] = field(default_factory=set)
    said: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    posted: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / RUN

    @property
    def secrets(self) -> dict[str, str]:
        return {**self.passwords, "page token": PAGE_TOKEN, "webhook path": WEBHOOK_PATH}


@contextlib.contextmanager
def receiver(posted: list[str]) -> Iterator[str]:
    """Address of a webhook receiver on loopback that keeps what it is sent."""

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Keep)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{WEBHOOK_PATH}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("redis-server") is None or shutil.which("openssl") is None:
        pytest.skip("redis-server or openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("localhost", "node"):
        make_certificate(folder, name)
    return folder


@pytest.fixture(scope="module")
def guarded(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A server with the users that the command made; nothing has run yet."""
    folder = tmp_path_factory.mktemp("access")
    users, secrets = folder / "made.acl", folder / "secrets"
    made = nodes.run_to_end(
        nodes.command(
            "monitor_node", "acl", "--run-id", "guard*", "--out", str(users), "--passwords", str(secrets)
        )
    )
    assert made.returncode == 0, made.stderr
    passwords = {file.name: file.read_text().strip() for file in secrets.iterdir()}
    tls = Certificates(server=certificates / "localhost.pem", clients=certificates / "node.pem")
    common = {
        **PLAIN,
        "HPT_REDIS_CA": str(certificates / "localhost.pem"),
        "HPT_REDIS_CERT": str(certificates / "node.pem"),
        "HPT_REDIS_KEY": str(certificates / "node.key"),
    }
    binary = shutil.which("redis-server")
    assert binary is not None
    (folder / "server").mkdir()
    with secured_server(binary, folder / "server", acl=users.read_text(), tls=tls) as server:
        common["HPT_REDIS_URL"] = server.url
        environments = {
            role: {**common, "HPT_REDIS_USERNAME": role, "HPT_REDIS_PASSWORD": password}
            for role, password in passwords.items()
        }
        predictor = environments["predictor"]  # as docker secrets arrive
        del predictor["HPT_REDIS_PASSWORD"]
        predictor["HPT_REDIS_PASSWORD_FILE"] = str(secrets / "predictor")
        yield Guarded(folder=folder, server=server, passwords=passwords, environments=environments)


@pytest.fixture(scope="module")
def whole(guarded: Guarded) -> Guarded:
    """The run: until jumps were applied; then the predictor is killed, which is an alert; then Ctrl-C."""
    run, logs = guarded.run, guarded.folder / "said"
    logs.mkdir()
    page_address = guarded.folder / "page.address"
    with contextlib.ExitStack() as things, receiver(guarded.posted) as webhook:
        guarded.environments["monitor"] |= {"HPT_PAGE_TOKEN": PAGE_TOKEN, "HPT_WEBHOOK": webhook}
        started: dict[str, subprocess.Popen[bytes]] = {}
        for role, arguments in {
            "monitor": ["monitor_node", "serve", "--run-id", RUN, "--http", "127.0.0.1:0", "--address-file",
                        str(page_address), "--record", str(run / "recording.hpt")],
            "predictor": ["predictor_node", "serve", "--run-id", RUN, "--heartbeat-seconds", "0.1",
                          "--state-dir", str(run / "checkpoints" / "predictor")],
            "trainer": ["trainer_node", "train", "--preset", "digits", "--steps", "100000", "--resume",
                        "--run-id", RUN, "--runs-dir", str(run.parent), *SETTINGS],
        }.items():  # fmt: skip
            log = things.enter_context((logs / role).open("wb"))
            started[role] = subprocess.Popen(
                nodes.command(*arguments), cwd=ROOT, env=guarded.environments[role], stdout=log, stderr=log
            )
            things.callback(started[role].wait)
            things.callback(started[role].kill)

        def said() -> str:
            return "\n".join(f"{file.name}: {file.read_text()}" for file in sorted(logs.iterdir()))

        def jumped() -> bool:
            assert all(process.poll() is None for process in started.values()), said()
            return any(o["delta_norm"] > 0 for o in nodes.metric_lines(run, "Outcome"))

        nodes.wait_for(jumped)
        guarded.command_lines |= {
            " ".join(process.cmdline())
            for root in started.values()
            for process in (psutil.Process(root.pid), *nodes.children_of(root.pid))
        }
        started["predictor"].kill()
        nodes.wait_for(lambda: any("silent" in body for body in guarded.posted))
        page = page_address.read_text().strip()
        guarded.shown |= shown_by(page)
        nodes.wait_for(lambda: any(order["done"] for order in snapshot_of(page)["orders"]))
        for role in ("trainer", "monitor"):
            started[role].terminate()
            assert started[role].wait(60) == 0, said()
        guarded.said |= {file.name: file.read_text() for file in logs.iterdir()}
    return guarded


def snapshot_of(page: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{page}/api/snapshot") as answer:
        return json.load(answer)


def shown_by(page: str) -> dict[str, str]:
    """What the page answers, to who may and to who may not act."""
    answers = {}
    for path in ("/", "/api/snapshot", "/metrics", "/healthz"):
        with urllib.request.urlopen(page + path) as answer:
            answers[path] = answer.read().decode() + str(answer.headers)
    for token, status in {PAGE_TOKEN: 204, PAGE_TOKEN[:-1]: 401}.items():
        request = urllib.request.Request(
            f"{page}/api/actions/checkpoint", b"{}", {"Authorization": f"Bearer {token}"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                told, code = answer.read().decode() + str(answer.headers), answer.status
        except urllib.error.HTTPError as error:
            with error:
                told, code = error.read().decode() + str(error.headers), error.code
        assert code == status
        answers[f"action {status}"] = told
    return answers


def test_the_environment_names_user_and_password_but_not_for_an_address_that_has_one(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("in-file\n")
    environment = {"HPT_REDIS_USERNAME": "trainer", "HPT_REDIS_PASSWORD_FILE": str(file)}
    for url, both, expected in [
        ("redis://h", {}, ("trainer", "in-file")),
        ("redis://h", {"HPT_REDIS_PASSWORD": "in-env"}, ("trainer", "in-env")),
        ("redis://alice@h", {}, ("alice", "in-file")),
        ("redis://alice:mine-1@h", {}, ("alice", "mine-1")),
        ("unix://:mine-1@/s", {}, (None, "mine-1")),  # the private server of `up` knows no names
    ]:
        address = parse_redis_url(url, environment=environment | both)
        assert (address.username, address.password) == expected
        assert not any(word in repr(address) for word in ("mine-1", "in-file", "in-env"))


@pytest.mark.parametrize("content", [b"", b"\n", b"secret-1\nsecret-2", b"secret-\xff"])
def test_a_password_file_that_is_none_is_one_line_without_its_content(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match="HPT_REDIS_PASSWORD_FILE") as refusal:
        parse_redis_url("redis://h", environment={"HPT_REDIS_PASSWORD_FILE": str(file)})
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_whole_run_needs_no_more_than_the_rights_of_the_table(whole: Guarded) -> None:
    outcomes = nodes.metric_lines(whole.run, "Outcome")
    assert any(outcome["delta_norm"] > 0 for outcome in outcomes)
    assert nodes.summary_of(whole.run)["status"] == "stopped"
    recording = read_recording(whole.run / "recording.hpt")
    assert {entry.stream for entry in recording.entries} >= {
        "history",
        "decisions",
        "orders",
        "notes.monitor",
    }
    log = whole.server.admin.execute_command("ACL", "LOG")
    refused = {dict(zip(row[::2], row[1::2], strict=True))[b"object"] for row in log}
    assert refused <= {b"client|setinfo", b"client"}, "only redis-py's greeting is refused"


def test_no_secret_is_said_shown_posted_recorded_or_in_a_command_line(whole: Guarded) -> None:
    places = {**whole.said, **whole.shown, "webhook": "\n".join(whole.posted)}
    places["command lines"] = "\n".join(whole.command_lines)
    files = [file for file in whole.run.rglob("*") if file.is_file()]
    assert {"recording.hpt", "config.toml", "summary.json", "metrics.jsonl"} <= {file.name for file in files}
    contents = {str(file): file.read_bytes() for file in files}
    contents |= {place: text.encode() for place, text in places.items()}
    found = [(name, place) for name, secret in whole.secrets.items()
             for place, content in contents.items() if secret.encode() in content]  # fmt: skip
    assert found == []
    for role in NODES:
        assert any(f"{role}_node" in line for line in whole.command_lines)
    assert any(json.loads(body)["node"] for body in whole.posted)


@pytest.mark.parametrize(
    ("user", "arguments"),
    [
        ("page", ["predictor_node", "serve", "--run-id", RUN]),
        ("trainer", ["monitor_node", "status", "--run-id", "another-run"]),
    ],
)
def test_a_node_with_the_wrong_user_ends_with_one_line_that_names_the_cure(
    guarded: Guarded, user: str, arguments: list[str]
) -> None:
    done = nodes.run_to_end(nodes.command(*arguments), cwd=ROOT, env=guarded.environments[user])
    assert done.returncode == 2, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if not text.startswith("{")]
    assert "monitor-node acl" in line
    assert not any(secret in done.stdout + done.stderr for secret in guarded.passwords.values())


def test_a_node_without_its_certificate_ends_with_one_line_that_names_the_cure(guarded: Guarded) -> None:
    environment = guarded.environments["page"] | {"HPT_REDIS_CERT": "", "HPT_REDIS_KEY": ""}
    done = nodes.run_to_end(
        nodes.command("monitor_node", "status", "--run-id", RUN), cwd=ROOT, env=environment
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert "HPT_REDIS_CERT" in line


def test_a_password_in_an_argument_is_warned_of_and_not_repeated(guarded: Guarded) -> None:
    password = guarded.passwords["page"]
    url = guarded.server.url.replace("://", f"://page:{password}@")
    environment = guarded.environments["page"] | {"HPT_REDIS_PASSWORD": "", "HPT_REDIS_USERNAME": ""}
    done = nodes.run_to_end(
        nodes.command("monitor_node", "status", "--run-id", "guard-none", "--redis", url),
        cwd=ROOT,
        env=environment,
    )
    warning, refusal = done.stderr.splitlines()
    assert re.match(r"warning: .*HPT_REDIS_PASSWORD$", warning)
    assert "guard-none" in refusal  # there is no such run: the password was taken
    assert done.returncode == 1
    assert password not in done.stdout + done.stderr
