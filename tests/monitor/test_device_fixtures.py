"""Hosts as data (tests/monitor/nvml/*.toml): what is read from each, below the real package pynvml."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.clock import FakeClock
from monitor_node.device import TrainerProcess
from monitor_node.nvml_device import NvmlDevice
from tests.monitor.fake_nvml import GIB, FakeDriver, installed

FIXTURES = sorted((Path(__file__).parent / "nvml").glob("*.toml"))
REQUIRED = {"lost-gpu", "missing-pids", "mig", "unified-memory", "sentinel-values", "old-driver", "wsl"}


def trainer_here() -> TrainerProcess:
    """A process that is there and is not this one: pytest's parent plays the trainer."""
    parent = psutil.Process(os.getppid())
    return TrainerProcess(process_id=parent.pid, started_unix_seconds=parent.create_time())


def test_every_kind_of_host_that_is_known_to_go_wrong_has_a_fixture() -> None:
    assert {file.stem for file in FIXTURES} >= REQUIRED


@pytest.mark.parametrize("file", FIXTURES, ids=lambda file: file.stem)
def test_a_host_reads_as_its_fixture_says(file: Path) -> None:
    table = tomllib.loads(file.read_text())
    expected: dict[str, Any] = table["expected"]
    trainer = trainer_here()
    driver = FakeDriver.from_table(table, trainer=trainer.process_id)
    with installed(driver) as nvml:
        read = NvmlDevice(nvml, clock=FakeClock(), environment={}).sample(trainer)
    assert (read.source, read.device) == (expected["source"], expected["device"])
    assert (expected["reason"] in read.unknown_reason) if expected["reason"] else read.unknown_reason == ""
    assert read.trainer_bytes == in_bytes(expected.get("trainer_gib"))
    if expected.get("host_memory"):
        assert read.total_bytes == psutil.virtual_memory().total
        assert 0 < (read.used_bytes or 0) < read.total_bytes
    else:
        assert read.used_bytes == in_bytes(expected.get("used_gib"))
        assert read.total_bytes == in_bytes(expected.get("total_gib"))
    readings = {reading.name: reading for reading in read.readings}
    assert len(readings) == len(read.readings)
    for name, value in expected.get("readings", {}).items():
        assert (readings[name].value, readings[name].unknown_reason) == (pytest.approx(value), ""), name
    for name, reason in expected.get("unknown", {}).items():
        assert readings[name].value is None, name
        assert reason in readings[name].unknown_reason, name
    for reading in read.readings:
        assert (reading.value is None) == bool(reading.unknown_reason), reading
        assert "\n" not in reading.unknown_reason


def in_bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)
