"""Memory of the GPU, or MIG instance, that holds the trainer. Decides nothing, never raises for a sensor.

Which one: where NVML shows the trainer's process; else the first of CUDA_VISIBLE_DEVICES, the trainer's
own or, where that cannot be read, the monitor's; else the first there is, which the sample then says.
NVML knows no process namespaces: inside a container the trainer is usually invisible.
How: version 2 of the memory struct, since version 1 counts what the driver reserves as used (912 MB on
an idle A100); where it fails (old drivers, WSL) version 1, and the source says "nvml-v1". A GPU without
memory of its own (NotSupported, or a total of 0) is read as host memory, source "host".
When NVML fails, readings are unknown with its words, and NVML is started afresh with growing pauses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import psutil

from common.clock import Clock, SystemClock
from common.messages import Reading, VramSample
from monitor_node.device import SENTINEL_BYTES, SLOW_SECONDS, TrainerProcess, distrust
from monitor_node.nvml_calls import NOT_SUPPORTED, ask
from monitor_node.nvml_events import EventWatch
from monitor_node.nvml_leaves import Leaf, first_visible, list_leaves
from monitor_node.nvml_readings import HealthReader

FIRST_PAUSE_SECONDS = 2.0  # a hiccup costs two samples
LONGEST_PAUSE_SECONDS = 60.0  # a GPU that is gone for good: one try a minute
_PROCESS_LISTS = tuple(
    (f"nvmlDeviceGet{kind}RunningProcesses_v3", f"nvmlDeviceGet{kind}RunningProcesses_v2")
    for kind in ("Compute", "MPSCompute", "Graphics")
)


class _Failed(Exception):
    """Nothing can be read now; the text says why."""


class NvmlDevice:
    """See the module. `sample` is not for several threads at once."""

    is_gpu = True

    def __init__(
        self, nvml: Any, *, clock: Clock | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """`nvml` is the initialised module `pynvml` (package nvidia-ml-py)."""
        self._nvml = nvml
        self._clock = clock or SystemClock()
        self._environment = os.environ if environment is None else environment
        self._leaves: list[Leaf] = []  # empty = to be listed again
        self._label = "GPU"
        self._chosen_uuid = ""
        self._chosen_for: int | None = None  # process id of the trainer
        self._guess = ""  # says so where the choice is one
        self._search_due_seconds = 0.0
        self._health = HealthReader(nvml)
        self._events: EventWatch | None = None
        self._events_uuid = ""  # of the GPU that they are of
        self._fault = ""
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._retry_at_seconds = 0.0

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        now_seconds = self._clock.monotonic()
        if self._fault and not self._restarted(now_seconds):
            return self._unknown(now_seconds)
        try:
            leaf, trainer_bytes, trainer_reason = self._find(trainer, now_seconds)
            self._label = leaf.label
            used_bytes, total_bytes, source, reason = self._memory(leaf)
        except (self._nvml.NVMLError, _Failed) as error:
            self._fail(f"NVML: {error}", now_seconds)
            return self._unknown(now_seconds)
        self._pause_seconds = FIRST_PAUSE_SECONDS
        return VramSample(
            source=source,
            device=leaf.label,
            used_bytes=used_bytes,
            total_bytes=total_bytes,
            trainer_bytes=trainer_bytes if used_bytes is not None else None,
            unknown_reason=reason or trainer_reason,
            readings=self._readings(leaf, now_seconds),
        )

    def _memory(self, leaf: Leaf) -> tuple[int | None, int | None, str, str]:
        """Used and total bytes, source, and the reason for what is unknown."""
        nvml, source = self._nvml, "nvml"
        answer = ask(nvml, ("nvmlDeviceGetMemoryInfo",), leaf.handle, version=nvml.nvmlMemory_v2)
        if answer.value is None:
            source, answer = "nvml-v1", ask(nvml, ("nvmlDeviceGetMemoryInfo",), leaf.handle)
        if answer.value is None and answer.error != NOT_SUPPORTED:
            raise _Failed(answer.unknown_reason)
        if answer.value is None or answer.value.total == 0:
            host = psutil.virtual_memory()
            return int(host.total - host.available), int(host.total), "host", ""
        used_bytes, total_bytes, reason = _plausible(answer.value.used, answer.value.total)
        return used_bytes, total_bytes, source, reason

    def _readings(self, leaf: Leaf, now_seconds: float) -> tuple[Reading, ...]:
        is_slow_round = self._health.is_slow_round(leaf, now_seconds)
        readings = self._health.read(leaf, now_seconds)
        if self._events is not None and self._events_uuid != leaf.gpu_uuid:
            self._events.stop()
            self._events = None
        if is_slow_round and (self._events is None or not self._events.alive):
            self._events, self._events_uuid = EventWatch(self._nvml, leaf.gpu_handle), leaf.gpu_uuid
        if self._events is not None:
            readings += self._events.take()
            if is_slow_round:
                readings += (self._events.state(),)
        return readings

    def _find(self, trainer: TrainerProcess | None, now_seconds: float) -> tuple[Leaf, int | None, str]:
        """The leaf to read, bytes of the trainer there, and why these are unknown."""
        if not self._leaves:
            self._leaves = list_leaves(self._nvml)
            if not self._leaves:
                raise _Failed("lists no GPU")
        reason = distrust(trainer)
        is_here = trainer is not None and not reason
        is_new = trainer is not None and trainer.process_id != self._chosen_for
        if trainer is not None and is_here:
            leaf, held_bytes, reason = self._search(trainer.process_id, now_seconds, everywhere=is_new)
            if leaf is not None:
                self._chosen_uuid, self._chosen_for, self._guess = leaf.uuid, trainer.process_id, ""
                return leaf, held_bytes, reason
        if is_new or not self._chosen_uuid:
            self._choose_unseen(trainer.process_id if trainer is not None else None, is_here=is_here)
        chosen = self._chosen_leaf()
        if chosen is None:  # after a restart; another GPU's memory would be a lie
            raise _Failed(f"{self._label} is no longer listed")
        return chosen, None, reason + self._guess

    def _chosen_leaf(self) -> Leaf | None:
        return next((leaf for leaf in self._leaves if leaf.uuid == self._chosen_uuid), None)

    def _choose_unseen(self, process_id: int | None, *, is_here: bool) -> None:
        """For a trainer that NVML does not show."""
        environment = (_environment_of(process_id) if process_id and is_here else None) or self._environment
        told = first_visible(self._leaves, environment)
        chosen = told or self._leaves[0]
        self._chosen_uuid, self._chosen_for = chosen.uuid, process_id
        is_guess = told is None and len(self._leaves) > 1
        self._guess = f"; that it is on {chosen.label} is a guess" if is_guess else ""

    def _search(
        self, process_id: int, now_seconds: float, *, everywhere: bool
    ) -> tuple[Leaf | None, int | None, str]:
        """Where NVML shows the process, with its bytes. Other leaves than the chosen one now and then."""
        chosen = self._chosen_leaf()
        leaves = [] if chosen is None else [chosen]
        if everywhere or chosen is None or now_seconds >= self._search_due_seconds:
            self._search_due_seconds = now_seconds + SLOW_SECONDS
            leaves += [leaf for leaf in self._leaves if leaf is not chosen]
        reason = ""
        for leaf in leaves:
            for calls in _PROCESS_LISTS:
                answer = ask(self._nvml, calls, leaf.handle)
                if answer.value is None:
                    reason = reason or f"NVML processes: {answer.unknown_reason}"
                for process in answer.value or ():
                    if process.pid == process_id:
                        # None under WDDM and at the parent of MIG devices; driver 560 may say 0.
                        held_bytes = _sane(process.usedGpuMemory) or None
                        hidden = "" if held_bytes else "NVML hides the memory of single processes"
                        return leaf, held_bytes, hidden
        unseen = f"NVML shows process {process_id} on no GPU (a container without pid: host?)"
        return None, None, reason or unseen

    def _restarted(self, now_seconds: float) -> bool:
        """Whether NVML was started afresh. Not before the pause is over and nobody waits in NVML."""
        if now_seconds < self._retry_at_seconds or (self._events is not None and self._events.alive):
            return False
        self._events = None
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self._fail(f"NVML: {error}", now_seconds)
            return False
        self._fault, self._leaves = "", []
        return True

    def _fail(self, fault: str, now_seconds: float) -> None:
        self._fault = fault
        self._retry_at_seconds = now_seconds + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        if self._events is not None:
            self._events.stop()

    def _unknown(self, now_seconds: float) -> VramSample:
        wait_seconds = max(0.0, self._retry_at_seconds - now_seconds)
        return VramSample(
            source="nvml",
            device=self._label,
            used_bytes=None,
            total_bytes=None,
            trainer_bytes=None,
            unknown_reason=f"{self._fault}; next try in {wait_seconds:.0f} s",
        )


def _environment_of(process_id: int) -> Mapping[str, str] | None:
    try:
        return dict(psutil.Process(process_id).environ())
    except (psutil.Error, OSError):  # another user's
        return None


def _plausible(used: int, total: int) -> tuple[int | None, int | None, str]:
    """Used and total bytes, or None and the reason."""
    used_bytes, total_bytes = _sane(used), _sane(total)
    if used_bytes is None or not total_bytes or used_bytes > total_bytes:
        return None, total_bytes or None, f"NVML answered {used} of {total} bytes used"
    return used_bytes, total_bytes, ""


def _sane(value: int | None) -> int | None:
    return value if value is not None and 0 <= value < SENTINEL_BYTES else None
