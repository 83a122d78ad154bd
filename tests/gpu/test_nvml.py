"""The same on a real card, where there is one: all other tests of NVML end at a driver that is made up."""

from __future__ import annotations

import time
from typing import Any

import pynvml
import pytest

from monitor_node.nvml_device import NvmlDevice
from monitor_node.nvml_readings import SENSORS


@pytest.fixture
def nvml() -> Any:
    try:
        pynvml.nvmlInit()
        if not pynvml.nvmlDeviceGetCount():
            pytest.skip("needs an NVIDIA GPU; NVML lists none")
    except pynvml.NVMLError as error:
        pytest.skip(f"needs an NVIDIA GPU; NVML: {error}")
    return pynvml


@pytest.mark.gpu
def test_a_real_gpu_is_read_and_what_it_lacks_has_a_reason(nvml: Any) -> None:
    read = NvmlDevice(nvml).sample(None)
    assert read.source in ("nvml", "nvml-v1", "host")
    assert 0 < (read.used_bytes or 0) < (read.total_bytes or 0)
    readings = {reading.name: reading for reading in read.readings}
    assert {sensor.name for sensor in SENSORS} | {"events"} <= set(readings)
    for reading in read.readings:
        assert (reading.value is None) == bool(reading.unknown_reason), reading
    assert 0 < (readings["temperature"].value or 0) < 110


@pytest.mark.gpu
def test_a_sample_of_a_real_gpu_costs_less_than_a_hundredth_of_its_second(nvml: Any) -> None:
    device = NvmlDevice(nvml)
    device.sample(None)
    begun_seconds = time.process_time()
    for _ in range(50):
        device.sample(None)
    assert (time.process_time() - begun_seconds) / 50 < 0.01
