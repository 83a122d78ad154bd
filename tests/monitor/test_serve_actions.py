"""`serve` with a token and a webhook, as a process on a real server: what is asked arrives as an order."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import messages as m
from common.bus import STREAM_START, Bus
from common.follower import decoded
from common.streams import ORDERS
from tests.faults import wait_until
from tests.monitor.test_monitor_cli import (
    DEADLINE_SECONDS,
    ENVIRONMENT,
    ON_ONE_SERVER,
    monitor,
    one_line,
    run,
    start,
)
from tests.monitor.test_webhook import Receiver, fake, receiver

__all__ = ["receiver", "run", "start"]  # fixtures
SECRET = "0123456789abcdef-secret"


def orders_of(bus: Bus) -> list[m.Message]:
    return [
        message
        for _, message in decoded(bus.read_after({ORDERS: STREAM_START}, max_count=1000, block_seconds=0.0))
    ]


@ON_ONE_SERVER
@pytest.mark.parametrize("way", ["file", "environment"])
def test_what_is_asked_on_the_page_is_ordered_and_alerts_are_told(
    run: Bus, server_url: str, run_id: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver, way: str,
) -> None:  # fmt: skip
    address, token_file = tmp_path / "page.address", tmp_path / "token"
    arguments = ["serve", "--redis", server_url, "--run-id", run_id, "--address-file", str(address)]
    secrets = {"HPT_PAGE_TOKEN": SECRET, "HPT_WEBHOOK": receiver.url}
    if way == "file":
        token_file.write_text(SECRET + "\n")
        arguments += ["--token-file", str(token_file), "--webhook", receiver.url]
        secrets = {}
    for name, value in secrets.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    process = start(*arguments)
    wait_until(address.exists, DEADLINE_SECONDS)
    url = address.read_text().strip()

    def shown() -> dict[str, Any]:
        with urllib.request.urlopen(f"{url}/api/snapshot", timeout=DEADLINE_SECONDS) as answer:
            return json.loads(answer.read())

    def ask(action: str, token: str) -> int:
        request = urllib.request.Request(f"{url}/api/actions/{action}", data=b"{}", method="POST")
        request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    wait_until(lambda: shown().get("progress", {}).get("step", 0) >= 100, DEADLINE_SECONDS)
    assert shown()["actions"] == {"enabled": True, "paused": False}
    assert ask("stop", SECRET[:-1]) == 401
    assert [ask(action, SECRET) for action in ("checkpoint", "pause")] == [204, 204]
    wait_until(lambda: shown()["run"]["veto"] == "a person paused prediction", DEADLINE_SECONDS)
    wait_until(
        lambda: [order["action"] for order in shown()["orders"]][:1] == ["checkpoint"], DEADLINE_SECONDS
    )
    given = orders_of(run)
    assert [type(order) for order in given if not isinstance(order, m.PhaseVeto)] == [m.CheckpointRequest]
    assert isinstance(given[-1], m.PhaseVeto)
    wait_until(lambda: "a person paused prediction; training goes on" in receiver.texts, DEADLINE_SECONDS)
    publisher = fake.publisher_of(run, "trainer", generation=2)
    lost = m.Alert(node="trainer", severity="error", kind="x", text="spike", step=101)
    publisher.send([publisher.prepare(lost)], give_up_seconds=0.0)
    wait_until(lambda: "spike" in receiver.texts, DEADLINE_SECONDS)
    assert len(set(receiver.texts)) == len(receiver.texts)
    with urllib.request.urlopen(f"{url}/metrics", timeout=DEADLINE_SECONDS) as answer:
        assert b"hpt_prediction_paused 1.0" in answer.read()
    process.terminate()
    _, log = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, log
    assert SECRET[:-1] not in log
    assert "secret" not in log


@pytest.mark.parametrize(
    ("option", "value", "cure"),
    [
        ("--token-file", "none", "openssl rand"),
        ("--token-file", "short", "openssl rand"),
        ("--webhook", "ftp://host/secret", "https://HOST/PATH"),
    ],
)
def test_a_wrong_token_file_or_webhook_is_one_line_with_a_cure(
    tmp_path: Path, option: str, value: str, cure: str
) -> None:
    (tmp_path / "short").write_text("short")
    value = value if "://" in value else str(tmp_path / value)
    line = one_line(monitor("serve", "--run-id", "x", "--redis", "memory://x", option, value), 2)
    assert cure in line
    assert "secret" not in line
