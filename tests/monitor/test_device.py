"""Who the trainer is: a process is believed only where number and start agree."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from monitor_node.device import Device, ScriptedDevice, TrainerProcess
from monitor_node.nvml_device import NvmlDevice
from monitor_node.process_device import ProcessDevice
from tests.monitor.fake_nvml import FakeDriver, installed
from tests.monitor.fake_run import heartbeat, sample


@pytest.fixture
def child() -> Iterator[TrainerProcess]:
    """A live process that plays the trainer; it holds 30 MB more than an idle interpreter."""
    script = "x = bytearray(30_000_000); print('up', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield TrainerProcess(process_id=process.pid, started_unix_seconds=time.time())
    process.communicate("\n")


@pytest.fixture(params=["rss", "nvml"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "rss":
        yield ProcessDevice()
        return
    with installed(FakeDriver()) as nvml:
        yield NvmlDevice(nvml)


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (None, "no heartbeat"),
        (TrainerProcess(process_id=2**22 + 7, started_unix_seconds=0.0), "not on this host"),
        (TrainerProcess(process_id=-1, started_unix_seconds=0.0), "not on this host"),
        (TrainerProcess(process_id=os.getpid(), started_unix_seconds=0.0), "another container"),
    ],
)
def test_a_process_that_is_not_here_is_unknown(
    device: Device, trainer: TrainerProcess | None, reason: str
) -> None:
    read = device.sample(trainer)
    assert read.trainer_bytes is None
    assert reason in read.unknown_reason


@pytest.mark.parametrize("shift_seconds", [-3600.0, +3600.0])
def test_a_process_with_the_same_number_but_another_start_is_not_the_trainer(
    child: TrainerProcess, shift_seconds: float
) -> None:
    namesake = TrainerProcess(
        process_id=child.process_id, started_unix_seconds=child.started_unix_seconds + shift_seconds
    )
    read = ProcessDevice().sample(namesake)
    assert read.used_bytes is None
    assert "another time" in read.unknown_reason


def test_resident_memory_of_the_trainer_counts_its_children(child: TrainerProcess) -> None:
    own = psutil.Process(child.process_id).memory_info().rss
    read = ProcessDevice().sample(child)
    assert read.source == "rss"
    assert read.used_bytes == read.trainer_bytes
    assert read.used_bytes is not None
    assert read.used_bytes == pytest.approx(own, rel=0.2)
    assert 30_000_000 < read.used_bytes < (read.total_bytes or 0)
    family = TrainerProcess(
        process_id=os.getppid(), started_unix_seconds=psutil.Process(os.getppid()).create_time()
    )
    whole = ProcessDevice().sample(family).used_bytes
    assert whole is not None
    assert whole > read.used_bytes + psutil.Process().memory_info().rss // 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the files of Linux")
def test_a_real_host_tells_what_it_has_left_and_the_swap_of_the_trainer(child: TrainerProcess) -> None:
    readings = {reading.name: reading for reading in ProcessDevice().sample(child).readings}
    assert 0 < (readings["host_available"].value or 0) <= psutil.virtual_memory().total
    assert (readings["trainer_swap"].value, readings["trainer_swap"].unit) == (0.0, "B")


def test_the_start_of_the_trainer_follows_from_its_uptime() -> None:
    process = TrainerProcess.of(heartbeat(process_id=5, uptime_seconds=40.0), 100.0)
    assert process == TrainerProcess(process_id=5, started_unix_seconds=60.0)


def test_a_scripted_device_plays_its_samples_and_repeats_the_last() -> None:
    device = ScriptedDevice([sample(1), sample(2)], is_gpu=True)
    assert [device.sample(None).used_bytes for _ in range(3)] == [1, 2, 2]
