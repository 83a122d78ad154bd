"""A node ends with its parent and on signals, gracefully first and at once on the second Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import parent

ROOT = Path(parent.__file__).resolve().parent.parent
CHILD = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from common import parent
stop = threading.Event()
parent.stop_on_signals(stop)
if "with-parent" in sys.argv:
    parent.stop_when_parent_goes(stop)
print("ready", flush=True)
stop.wait()
try:
    print("stopping", flush=True)
    if "stuck" in sys.argv:
        threading.Event().wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def start(children: list[subprocess.Popen[str]], *options: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    children.append(child)
    assert line(child) == "ready"
    return child


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_gracefully(children: list[subprocess.Popen[str]], number: signal.Signals) -> None:
    child = start(children)
    child.send_signal(number)
    assert line(child) == "stopping"
    assert child.wait(10) == 0


def test_second_interrupt_interrupts_at_once(children: list[subprocess.Popen[str]]) -> None:
    child = start(children, "stuck")
    child.send_signal(signal.SIGINT)
    assert line(child) == "stopping"
    child.send_signal(signal.SIGINT)
    assert line(child) == "interrupted"


def test_end_of_the_parents_pipe_stops(children: list[subprocess.Popen[str]]) -> None:
    child = start(children, "with-parent")
    assert child.stdin is not None
    child.stdin.write("ignored\n")
    child.stdin.close()
    assert line(child) == "stopping"
    assert child.wait(10) == 0
    child.stdin = None  # communicate would flush it


def test_without_the_flag_the_parents_pipe_means_nothing(children: list[subprocess.Popen[str]]) -> None:
    child = start(children)
    assert child.stdin is not None
    child.stdin.close()
    child.stdin = None
    child.send_signal(signal.SIGTERM)
    assert line(child) == "stopping"


def test_closed_stdin_counts_as_gone() -> None:
    stop = threading.Event()
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.close(write_end)
    parent.stop_when_parent_goes(stop, descriptor=read_end)
    assert stop.wait(10)
