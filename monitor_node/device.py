"""Reads memory: of a GPU by NVML, else of the trainer's process. Decides nothing.

Owns the mapping from a sensor to a VramSample. What cannot be known is None with a reason, never
zero: unsupported calls, lost GPUs, sentinels (values near 2**64, totals of 0) and processes that
are not on this host. NVML calls: version 2 of the memory struct, since version 1 counts what the
driver reserves as used (912 MB on an idle A100); drivers without it answer version 1 and the
sample's source says so ("nvml-v1"). Never raises for a sensor; never keeps a GPU busy.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from common.messages import Heartbeat, VramSample

# NVML's "not available" is 2**64 - 1, and dcgm-exporter shows 2**63 - 18: no device has 2**56 bytes.
_SENTINEL_BYTES = 1 << 56
# From the start of a process to its first heartbeat: imports of torch on a cold disk. Guess, untested.
_LONGEST_START_SECONDS = 600.0
_CLOCK_SLACK_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainerProcess:
    """The trainer as its heartbeat names it; `started_unix_seconds` is when the node began to run."""

    process_id: int
    started_unix_seconds: float

    @classmethod
    def of(cls, heartbeat: Heartbeat, sent_unix_seconds: float) -> TrainerProcess:
        started = sent_unix_seconds - heartbeat.uptime_seconds
        return cls(process_id=heartbeat.process_id, started_unix_seconds=started)


class Device(Protocol):
    is_gpu: bool

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        """Never raises; what is unknown is None with a reason."""


class ScriptedDevice:
    """Plays the given samples in order, then repeats the last one. For tests and demonstrations."""

    def __init__(self, samples: Iterable[VramSample], *, is_gpu: bool) -> None:
        self.is_gpu = is_gpu
        self._samples = list(samples)

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        return self._samples.pop(0) if len(self._samples) > 1 else self._samples[0]


class ProcessDevice:
    """Resident memory of the trainer and its children against what host and cgroup allow.

    Pages shared with a child are counted once for each: the sum is an upper bound.
    """

    is_gpu = False

    def __init__(self, *, cgroup_root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> None:
        self._cgroup_root = cgroup_root
        self._proc = proc

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        used_bytes: int | None = None
        reason = distrust(trainer)
        process_id = 0 if trainer is None else trainer.process_id
        if not reason:
            try:
                used_bytes = _tree_rss_bytes(process_id)
            except psutil.Error as error:
                reason = f"process {process_id}: {type(error).__name__}"
        return VramSample(
            source="rss",
            device="host memory",
            used_bytes=used_bytes,
            total_bytes=self._total_bytes(process_id if not reason else os.getpid()),
            trainer_bytes=used_bytes,
            unknown_reason=reason,
        )

    def _total_bytes(self, process_id: int) -> int:
        limits = [psutil.virtual_memory().total, *self._cgroup_limits(process_id)]
        return int(min(limit for limit in limits if limit > 0))

    def _cgroup_limits(self, process_id: int) -> Iterable[int]:
        """Limits of the process's cgroup and all above it; cgroup v1 and v2."""
        try:
            lines = (self._proc / str(process_id) / "cgroup").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = self._cgroup_root / controllers
            folder = root / path.lstrip("/")
            for place in (folder, *folder.parents):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    limit = _read_bytes(place / name)
                    if limit is not None:
                        yield limit
                if place == root:
                    break


class NvmlDevice:
    """The GPU that holds the trainer, or GPU 0 while NVML does not show the trainer on any.

    NVML knows no process namespaces: inside a container the trainer is usually invisible.
    """

    is_gpu = True

    def __init__(self, nvml: Any) -> None:
        """`nvml` is the initialised module `pynvml` (package nvidia-ml-py), or a double of it."""
        self._nvml = nvml
        self._index = 0

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        trainer_bytes, trainer_reason = self._find_trainer(trainer)
        device, source = f"GPU {self._index}", "nvml"
        used_bytes: int | None = None
        total_bytes: int | None = None
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(self._index)
            device = f"GPU {self._index} {_text(self._nvml.nvmlDeviceGetName(handle))}"
            memory, source = self._memory(handle)
            used_bytes, total_bytes, reason = _plausible(memory.used, memory.total)
        except self._nvml.NVMLError as error:
            reason = f"NVML: {error}"
        return VramSample(
            source=source,
            device=device,
            used_bytes=used_bytes,
            total_bytes=total_bytes,
            trainer_bytes=trainer_bytes if used_bytes is not None else None,
            unknown_reason=reason or trainer_reason,
        )

    def _memory(self, handle: Any) -> tuple[Any, str]:
        """The memory struct and the source it came from."""
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2), "nvml"
        except (AttributeError, TypeError):  # an nvidia-ml-py from before the struct
            pass
        except nvml.NVMLError as error:
            without_v2 = (
                nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
                nvml.NVML_ERROR_NOT_SUPPORTED,
                nvml.NVML_ERROR_INVALID_ARGUMENT,
                nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
            )
            if error.value not in without_v2:
                raise
        return nvml.nvmlDeviceGetMemoryInfo(handle), "nvml-v1"

    def _find_trainer(self, trainer: TrainerProcess | None) -> tuple[int | None, str]:
        """Bytes of the trainer, and why they are unknown; remembers which GPU it is on."""
        if reason := distrust(trainer):
            return None, reason
        assert trainer is not None
        nvml = self._nvml
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == trainer.process_id:
                        self._index = index
                        # None under WDDM and at the parent of MIG devices; driver 560 may say 0.
                        held_bytes = _sane(process.usedGpuMemory) or None
                        return held_bytes, "" if held_bytes else "NVML hides the memory of single processes"
        except nvml.NVMLError as error:
            return None, f"NVML processes: {error}"
        return None, f"NVML shows process {trainer.process_id} on no GPU (a container without pid: host?)"


def choose_device(preference: str = "auto", *, nvml: Any = None) -> Device:
    """NVML when it has a device and `preference` ("auto", "cpu", "cuda") allows it, else the process."""
    if preference != "cpu":
        try:
            nvml = nvml or importlib.import_module("pynvml")
        except ImportError:
            return ProcessDevice()
        try:
            nvml.nvmlInit()
            if nvml.nvmlDeviceGetCount() > 0:
                return NvmlDevice(nvml)
        except nvml.NVMLError:
            pass  # no driver, no library or no permission: this host has no GPU for us
    return ProcessDevice()


def distrust(trainer: TrainerProcess | None) -> str:
    """Why the process that the heartbeat names is not the trainer on this host; "" = it is.

    A process id from another host or container may exist here by chance, so the start times have
    to agree as well.
    """
    if trainer is None:
        return "no heartbeat of the trainer yet"
    process_id = trainer.process_id
    if process_id == os.getpid():
        return f"process {process_id} is the monitor itself: the trainer runs in another container"
    try:
        created_seconds = psutil.Process(process_id).create_time()
    except (psutil.Error, ValueError):
        return f"process {process_id} of the trainer is not on this host"
    start_seconds = trainer.started_unix_seconds - created_seconds
    if not -_CLOCK_SLACK_SECONDS <= start_seconds <= _LONGEST_START_SECONDS:
        return f"process {process_id} on this host is not the trainer: it started at another time"
    return ""


def _tree_rss_bytes(process_id: int) -> int:
    process = psutil.Process(process_id)
    used_bytes = int(process.memory_info().rss)
    for child in process.children(recursive=True):
        try:
            used_bytes += int(child.memory_info().rss)
        except psutil.NoSuchProcess:
            continue  # ended between listing and reading
    return used_bytes


def _read_bytes(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _SENTINEL_BYTES else None


def _plausible(used: int, total: int) -> tuple[int | None, int | None, str]:
    """Used and total bytes, or None and the reason."""
    used_bytes, total_bytes = _sane(used), _sane(total)
    if used_bytes is None or not total_bytes or used_bytes > total_bytes:
        return None, total_bytes or None, f"NVML answered {used} of {total} bytes used"
    return used_bytes, total_bytes, ""


def _sane(value: int | None) -> int | None:
    return value if value is not None and 0 <= value < _SENTINEL_BYTES else None


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
