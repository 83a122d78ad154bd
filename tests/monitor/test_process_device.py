"""Host memory: the tightest limit counts, and what a kernel does not keep is unknown."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from common.clock import FakeClock
from common.messages import Reading
from monitor_node.device import SLOW_SECONDS
from monitor_node.process_device import ProcessDevice

KIB = 1 << 10
MEMINFO = """MemTotal:       16000000 kB
MemFree:         1000000 kB
MemAvailable:    4000000 kB
SwapTotal:       2000000 kB
SwapFree:        1500000 kB
"""
PRESSURE = """some avg10=12.50 avg60=3.00 avg300=1.00 total=1
full avg10=2.00 avg60=1.00 avg300=0.00 total=1
"""


class Host:
    """Files of /proc and /sys/fs/cgroup for this very process, which plays the trainer's host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock()

    def write(self, file: str, text: str) -> None:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def device(self, *, gpu_reason: str = "") -> ProcessDevice:
        return ProcessDevice(
            cgroup_root=self.folder / "cgroup", proc=self.folder / "proc", clock=self.clock,
            gpu_reason=gpu_reason,
        )  # fmt: skip

    def readings(self) -> dict[str, Reading]:
        return {reading.name: reading for reading in self.device().sample(None).readings}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("line", "file", "text", "expected"),
    [
        ("0::/job", "job/memory.max", "1000000", 1_000_000),
        ("0::/job/inner", "job/memory.max", "1000000", 1_000_000),
        ("0::/job", "job/memory.max", "max", None),
        ("4:memory:/job", "memory/memory.limit_in_bytes", "1000000", 1_000_000),
        ("4:memory:/", "memory/memory.limit_in_bytes", "9223372036854771712", None),
    ],
)
def test_the_total_is_the_tightest_of_host_and_cgroup(
    host: Host, line: str, file: str, text: str, expected: int | None
) -> None:
    host.write(f"cgroup/{file}", text + "\n")
    host.write(f"proc/{os.getpid()}/cgroup", line + "\n")
    assert host.device().sample(None).total_bytes == (expected or psutil.virtual_memory().total)


def test_what_the_host_has_left_and_its_swap_are_told_in_bytes(host: Host) -> None:
    host.write("proc/meminfo", MEMINFO)
    readings = host.readings()
    assert (readings["host_available"].value, readings["host_available"].unit) == (4_000_000 * KIB, "B")
    assert readings["host_swap"].value == 500_000 * KIB


def test_pressure_is_a_share_of_the_time(host: Host) -> None:
    host.write("proc/pressure/memory", PRESSURE)
    readings = host.readings()
    assert (readings["memory_stall_some"].value, readings["memory_stall_full"].value) == (0.125, 0.02)


def test_the_pressure_of_the_trainers_own_cgroup_comes_before_that_of_the_host(host: Host) -> None:
    host.write("proc/pressure/memory", PRESSURE)
    host.write(f"proc/{os.getpid()}/cgroup", "0::/job\n")
    host.write("cgroup/job/memory.pressure", PRESSURE.replace("12.50", "50.00"))
    reading = host.readings()["memory_stall_some"]
    assert reading.value == 0.5
    assert reading.source.endswith("cgroup/job/memory.pressure")


def test_a_kernel_without_these_files_leaves_every_reading_unknown_with_the_file(host: Host) -> None:
    readings = host.readings()
    assert set(readings) == {
        "host_available", "host_swap", "memory_stall_some", "memory_stall_full", "trainer_swap",
    }  # fmt: skip
    assert all(reading.value is None for reading in readings.values())
    assert "pressure/memory: No such file" in readings["memory_stall_some"].unknown_reason
    assert "no heartbeat" in readings["trainer_swap"].unknown_reason


@pytest.mark.parametrize("text", ["", "MemAvailable: many\n", "some avg10= avg60=0.00\n"])
def test_a_file_of_another_form_is_unknown_and_not_zero(host: Host, text: str) -> None:
    host.write("proc/meminfo", text)
    host.write("proc/pressure/memory", text)
    assert all(reading.value is None for reading in host.readings().values())


def test_readings_of_the_host_come_now_and_then_memory_every_time(host: Host) -> None:
    device = host.device()
    assert device.sample(None).readings
    host.clock.advance(SLOW_SECONDS / 2)
    assert device.sample(None).readings == ()
    host.clock.advance(SLOW_SECONDS / 2)
    assert device.sample(None).readings


def test_a_gpu_that_the_run_asks_for_and_that_is_not_read_is_a_reading(host: Host) -> None:
    gpu = next(r for r in host.device(gpu_reason="no driver").sample(None).readings if r.name == "gpu")
    assert (gpu.value, gpu.unknown_reason) == (None, "no driver")
