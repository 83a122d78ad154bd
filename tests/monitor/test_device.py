"""Readings: unknown is None with a reason, never zero; a sensor never raises."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from monitor_node.device import (
    Device,
    NvmlDevice,
    ProcessDevice,
    ScriptedDevice,
    TrainerProcess,
    choose_device,
)
from tests.monitor.fake_run import heartbeat, sample

GIB = 1 << 30
ULLONG_MAX = (1 << 64) - 1


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


@dataclass
class FakeNvml:
    """A double of the module pynvml. Faults are data: `faults[call] = error number`."""

    used: int = 3 * GIB
    total: int = 16 * GIB
    gpus: int = 1
    processes: dict[int, list[tuple[int, int | None]]] = field(default_factory=dict)  # gpu: (pid, bytes)
    faults: dict[str, int] = field(default_factory=dict)
    nvmlMemory_v2: int = 0x02000028
    NVMLError = NVMLError
    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25

    def _call(self, name: str) -> None:
        if name in self.faults:
            raise NVMLError(self.faults[name])

    def nvmlInit(self) -> None:  # noqa: N802
        self._call("init")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._call("count")
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self._call("handle")
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"Fake"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:  # noqa: N802
        self._call("memory" if version is None else "memory_v2")
        reserved = GIB if version is None else 0  # version 1 counts what the driver reserves
        return SimpleNamespace(total=self.total, used=self.used + reserved)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        self._call("processes")
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.processes.get(handle, [])]


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


def test_version_2_of_the_memory_struct_is_read_when_the_driver_has_it(child: TrainerProcess) -> None:
    nvml = FakeNvml(processes={0: [(child.process_id, 2 * GIB)]})
    read = NvmlDevice(nvml).sample(child)
    assert (read.source, read.device, read.used_bytes, read.total_bytes) == (
        "nvml", "GPU 0 Fake", 3 * GIB, 16 * GIB,
    )  # fmt: skip
    assert (read.trainer_bytes, read.unknown_reason) == (2 * GIB, "")


@pytest.mark.parametrize("error", [2, 3, 13, 25])
def test_an_old_driver_answers_version_1_and_the_source_says_so(error: int) -> None:
    read = NvmlDevice(FakeNvml(faults={"memory_v2": error})).sample(None)
    assert (read.source, read.used_bytes) == ("nvml-v1", 4 * GIB)


def test_an_old_python_package_answers_version_1() -> None:
    class OldNvml(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # type: ignore[override]  # noqa: N802
            return SimpleNamespace(total=self.total, used=self.used)

    assert NvmlDevice(OldNvml()).sample(None).source == "nvml-v1"


@pytest.mark.parametrize("call", ["handle", "memory_v2"])
def test_a_lost_gpu_is_unknown_with_a_reason_and_never_zero(call: str, child: TrainerProcess) -> None:
    nvml = FakeNvml(processes={0: [(child.process_id, GIB)]})
    device = NvmlDevice(nvml)
    assert device.sample(child).used_bytes == 3 * GIB
    nvml.faults[call] = 15
    read = device.sample(child)
    assert (read.used_bytes, read.total_bytes, read.trainer_bytes) == (None, None, None)
    assert "error 15" in read.unknown_reason
    nvml.faults.clear()
    assert device.sample(child).used_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("used", "total"),
    [
        (ULLONG_MAX, 16 * GIB),
        (9223372036854775794, 16 * GIB),
        (0, 0),
        (GIB, ULLONG_MAX),
        (17 * GIB, 16 * GIB),
    ],
)
def test_a_sentinel_is_unknown(used: int, total: int) -> None:
    read = NvmlDevice(FakeNvml(used=used, total=total)).sample(None)
    assert read.used_bytes is None
    assert "NVML answered" in read.unknown_reason


def test_the_gpu_that_holds_the_trainer_is_the_one_that_is_read(child: TrainerProcess) -> None:
    nvml = FakeNvml(gpus=2, processes={0: [(1, GIB)], 1: [(child.process_id, GIB)]})
    assert NvmlDevice(nvml).sample(child).device == "GPU 1 Fake"


@pytest.mark.parametrize("held", [None, 0, ULLONG_MAX])
def test_a_hidden_process_size_is_unknown_while_the_device_is_known(
    held: int | None, child: TrainerProcess
) -> None:
    read = NvmlDevice(FakeNvml(processes={0: [(child.process_id, held)]})).sample(child)
    assert (read.used_bytes, read.trainer_bytes) == (3 * GIB, None)
    assert "hides" in read.unknown_reason


def test_a_process_list_without_the_trainer_leaves_its_bytes_unknown(child: TrainerProcess) -> None:
    read = NvmlDevice(FakeNvml(processes={0: [(1, GIB)]})).sample(child)
    assert (read.used_bytes, read.trainer_bytes) == (3 * GIB, None)
    assert str(child.process_id) in read.unknown_reason


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


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (None, "no heartbeat"),
        (TrainerProcess(process_id=2**22 + 7, started_unix_seconds=0.0), "not on this host"),
        (TrainerProcess(process_id=-1, started_unix_seconds=0.0), "not on this host"),
        (TrainerProcess(process_id=os.getpid(), started_unix_seconds=0.0), "another container"),
    ],
)
@pytest.mark.parametrize("device", [ProcessDevice(), NvmlDevice(FakeNvml())], ids=["rss", "nvml"])
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
    tmp_path: Path, line: str, file: str, text: str, expected: int | None
) -> None:
    limit = tmp_path / "cgroup" / file
    limit.parent.mkdir(parents=True)
    limit.write_text(text + "\n")
    proc = tmp_path / "proc" / str(os.getpid())
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(line + "\n")
    device = ProcessDevice(cgroup_root=tmp_path / "cgroup", proc=tmp_path / "proc")
    assert device.sample(None).total_bytes == (expected or psutil.virtual_memory().total)


def test_a_gpu_is_chosen_when_there_is_one_and_the_run_may_use_it() -> None:
    assert choose_device(nvml=FakeNvml()).is_gpu
    assert not choose_device("cpu", nvml=FakeNvml()).is_gpu
    assert not choose_device(nvml=FakeNvml(gpus=0)).is_gpu
    assert not choose_device(nvml=FakeNvml(faults={"init": 9})).is_gpu


def test_the_start_of_the_trainer_follows_from_its_uptime() -> None:
    process = TrainerProcess.of(heartbeat(process_id=5, uptime_seconds=40.0), 100.0)
    assert process == TrainerProcess(process_id=5, started_unix_seconds=60.0)


def test_a_scripted_device_plays_its_samples_and_repeats_the_last() -> None:
    device = ScriptedDevice([sample(1), sample(2)], is_gpu=True)
    assert [device.sample(None).used_bytes for _ in range(3)] == [1, 2, 2]
