"""Asks another device in a thread of its own, so that a driver that hangs does not stop the monitor.

NVML calls can block for minutes while a GPU falls off the bus. Owns the waiting: an answer that is late
is unknown with a reason, and thrown away when it comes, because it tells of an earlier time. One
question at a time. Any exception of the device becomes a reason here: the one place that says "a
sensor never ends the monitor".
"""

from __future__ import annotations

import queue
import threading

from common.clock import Clock, SystemClock
from common.messages import VramSample
from monitor_node.device import Device, TrainerProcess

PATIENCE_SECONDS = 0.5  # once a hang; a sound sample takes milliseconds


class PatientDevice:
    def __init__(
        self, device: Device, *, clock: Clock | None = None, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self.is_gpu = device.is_gpu
        self._device = device
        self._clock = clock or SystemClock()
        self._patience_seconds = patience_seconds
        self._questions: queue.SimpleQueue[TrainerProcess | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[VramSample] = queue.SimpleQueue()
        self._asked_at_seconds: float | None = None  # of the question that is still open
        self._name = "the device"
        threading.Thread(target=self._answer, name="device", daemon=True).start()

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        now_seconds = self._clock.monotonic()
        if self._asked_at_seconds is not None:
            try:
                self._answers.get_nowait()  # late
            except queue.Empty:
                return self._silent(now_seconds - self._asked_at_seconds)
        self._asked_at_seconds = now_seconds
        self._questions.put(trainer)
        try:
            sample = self._answers.get(timeout=self._patience_seconds)
        except queue.Empty:
            return self._silent(self._patience_seconds)
        self._asked_at_seconds = None
        self._name = sample.device
        return sample

    def _answer(self) -> None:
        while True:
            trainer = self._questions.get()
            try:
                sample = self._device.sample(trainer)
            except Exception as error:  # a sensor must not end the monitor, whatever its library does
                sample = _unknown(self._name, f"{type(error).__name__}: {error}")
            self._answers.put(sample)

    def _silent(self, seconds: float) -> VramSample:
        return _unknown(self._name, f"{self._name} has not answered for {seconds:.1f} s")


def _unknown(device: str, reason: str) -> VramSample:
    return VramSample(
        source="none", device=device, used_bytes=None, total_bytes=None, trainer_bytes=None,
        unknown_reason=reason,
    )  # fmt: skip
