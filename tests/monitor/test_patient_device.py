"""A driver that hangs or breaks is a reading, and the monitor goes on."""

from __future__ import annotations

import threading

from common.clock import FakeClock
from common.messages import VramSample
from monitor_node.device import TrainerProcess
from monitor_node.patient_device import PatientDevice
from tests.faults import wait_until
from tests.monitor.fake_run import sample


class Moody:
    """Answers 1, 2, ... bytes, waits at the gate before each, breaks when told to."""

    is_gpu = True

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.answered = 0
        self.error: Exception | None = None

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        self.gate.wait(10.0)
        self.answered += 1
        if self.error is not None:
            raise self.error
        return sample(self.answered)


def test_a_device_that_answers_is_passed_through() -> None:
    device = PatientDevice(Moody(), patience_seconds=10.0)
    assert device.is_gpu
    assert [device.sample(None).used_bytes for _ in range(2)] == [1, 2]


def test_a_device_that_hangs_is_unknown_until_it_answers_and_its_late_answer_is_not_shown() -> None:
    moody, clock = Moody(), FakeClock()
    device = PatientDevice(moody, clock=clock, patience_seconds=0.01)
    moody.gate.clear()
    assert "has not answered for 0.0 s" in device.sample(None).unknown_reason
    clock.advance(7.0)
    read = device.sample(None)
    assert (read.used_bytes, read.total_bytes) == (None, None)
    assert "has not answered for 7.0 s" in read.unknown_reason
    moody.gate.set()
    wait_until(lambda: moody.answered >= 1)
    wait_until(lambda: device.sample(None).used_bytes is not None)
    assert moody.answered >= 2  # the first answer told of the time before


def test_whatever_a_device_raises_becomes_a_reason() -> None:
    moody = Moody()
    moody.error = OSError("libnvidia-ml.so.1 went away")
    device = PatientDevice(moody, patience_seconds=10.0)
    assert device.sample(None).unknown_reason == "OSError: libnvidia-ml.so.1 went away"
    moody.error = None
    assert device.sample(None).used_bytes == 2
