"""Memory of a run on a CPU: resident bytes of the trainer against what host and cgroup allow.

Also readings that tell why it is slow or near its end: what the host still has to give, swap of the
trainer and of the host, and the share of time in which work waited for memory (PSI, of the trainer's
cgroup where that is kept, else of the host). Linux only: elsewhere these are unknown with a reason.
Decides nothing, never raises.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import psutil

from common.clock import Clock, SystemClock
from common.messages import Reading, VramSample
from monitor_node.device import SENTINEL_BYTES, SLOW_SECONDS, TrainerProcess, distrust

_KIB = 1 << 10


class ProcessDevice:
    """Resident memory of the trainer and its children against what host and cgroup allow.

    Pages shared with a child are counted once for each: the sum is an upper bound.
    """

    is_gpu = False

    def __init__(
        self,
        *,
        cgroup_root: Path = Path("/sys/fs/cgroup"),
        proc: Path = Path("/proc"),
        clock: Clock | None = None,
        gpu_reason: str = "",
    ) -> None:
        """`gpu_reason`: why a GPU that the run asks for is not read; it becomes a reading."""
        self._cgroup_root = cgroup_root
        self._proc = proc
        self._clock = clock or SystemClock()
        self._gpu_reason = gpu_reason
        self._slow_due_seconds = 0.0

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        used_bytes: int | None = None
        reason = distrust(trainer)
        process_id = 0 if trainer is None else trainer.process_id
        if not reason:
            try:
                used_bytes = _tree_rss_bytes(process_id)
            except psutil.Error as error:
                reason = f"process {process_id}: {type(error).__name__}"
        here_id = process_id if not reason else os.getpid()
        return VramSample(
            source="rss",
            device="host memory",
            used_bytes=used_bytes,
            total_bytes=self._total_bytes(here_id),
            trainer_bytes=used_bytes,
            unknown_reason=reason,
            readings=self._readings(here_id, distrusted=reason),
        )

    def _readings(self, process_id: int, *, distrusted: str) -> tuple[Reading, ...]:
        now_seconds = self._clock.monotonic()
        if now_seconds < self._slow_due_seconds:
            return ()
        self._slow_due_seconds = now_seconds + SLOW_SECONDS
        meminfo, status = self._proc / "meminfo", self._proc / str(process_id) / "status"
        readings = [
            _read("host_available", "B", meminfo, lambda text: _kib(text, "MemAvailable") * _KIB),
            _read("host_swap", "B", meminfo, _swap_bytes),
            *self._pressure(process_id),
        ]
        if distrusted:
            readings.append(_unknown("trainer_swap", "B", str(status), distrusted))
        else:
            readings.append(_read("trainer_swap", "B", status, lambda text: _kib(text, "VmSwap") * _KIB))
        if self._gpu_reason:
            readings.append(_unknown("gpu", "1", "nvmlInit", self._gpu_reason))
        return tuple(readings)

    def _pressure(self, process_id: int) -> Iterator[Reading]:
        """Share of the last 10 s in which some work, or all of it, waited for memory."""
        own = [place / "memory.pressure" for place in self._cgroup_places(process_id)]
        file = next((file for file in own if file.is_file()), self._proc / "pressure" / "memory")
        for name, line in (("memory_stall_some", "some"), ("memory_stall_full", "full")):
            yield _read(name, "1", file, partial(_stall_share, line=line))

    def _total_bytes(self, process_id: int) -> int:
        limits = [psutil.virtual_memory().total, *self._cgroup_limits(process_id)]
        return int(min(limit for limit in limits if limit > 0))

    def _cgroup_limits(self, process_id: int) -> Iterable[int]:
        for place in self._cgroup_places(process_id):
            for name in ("memory.max", "memory.limit_in_bytes"):
                limit = _limit_bytes(place / name)
                if limit is not None:
                    yield limit

    def _cgroup_places(self, process_id: int) -> Iterator[Path]:
        """Folders of the process's cgroup and of all above it, innermost first; cgroup v1 and v2."""
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
                yield place
                if place == root:
                    break


def _read(name: str, unit: str, file: Path, value: Callable[[str], float]) -> Reading:
    try:
        number = value(file.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return _unknown(name, unit, str(file), f"{file}: {reason}")
    return Reading(name=name, value=number, unit=unit, source=str(file), unknown_reason="")


def _unknown(name: str, unit: str, source: str, reason: str) -> Reading:
    return Reading(name=name, value=None, unit=unit, source=source, unknown_reason=reason)


def _kib(text: str, key: str) -> float:
    """The value of a line like `MemAvailable:  123 kB`. Raises ValueError without such a line."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"has no line {key}")
    return float(found[1])


def _swap_bytes(text: str) -> float:
    return (_kib(text, "SwapTotal") - _kib(text, "SwapFree")) * _KIB


def _stall_share(text: str, *, line: str) -> float:
    """Of a pressure file, whose lines are like `some avg10=1.53 avg60=0.00 avg300=0.00 total=7`."""
    found = re.search(rf"^{line} avg10=(\d+\.\d+) ", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"has no line '{line} avg10=...'")
    return float(found[1]) / 100.0


def _tree_rss_bytes(process_id: int) -> int:
    process = psutil.Process(process_id)
    used_bytes = int(process.memory_info().rss)
    for child in process.children(recursive=True):
        try:
            used_bytes += int(child.memory_info().rss)
        except psutil.NoSuchProcess:
            continue  # ended between listing and reading
    return used_bytes


def _limit_bytes(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < SENTINEL_BYTES else None
