"""What every memory sensor answers, and who the trainer is. Decides nothing, reads no memory.

Owns the Device protocol, the identity of the trainer's process, and a device that plays given samples.
What cannot be known is None with a reason, never zero: unsupported calls, lost GPUs, sentinels (values
near 2**64) and processes that are not on this host. Readings that change slowly are in some samples
only (every SLOW_SECONDS): a name that is absent was not read this time, and its newest reading holds.
Sensors: process_device.py, nvml_device.py, fake_device.py; device_choice.py picks one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import psutil

from common.messages import Heartbeat, VramSample

SLOW_SECONDS = 10.0  # between readings that hardly change: a recorded day stays small. Guess, untested.
# NVML's "not available" is 2**64 - 1, and dcgm-exporter shows 2**63 - 18: no device has 2**56 bytes.
SENTINEL_BYTES = 1 << 56
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
    """Plays the given samples in order, then repeats the last one. For tests."""

    def __init__(self, samples: Iterable[VramSample], *, is_gpu: bool) -> None:
        self.is_gpu = is_gpu
        self._samples = list(samples)

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        return self._samples.pop(0) if len(self._samples) > 1 else self._samples[0]


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
