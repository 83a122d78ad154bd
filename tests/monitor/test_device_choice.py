"""Which device is read: the run's wish, unless the command line says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.clock import FakeClock
from common.errors import UserError
from common.messages import VramSample
from monitor_node.device_choice import DeviceChoice
from tests.monitor.fake_nvml import FakeDriver, driver_loaded, installed


def gpu_reading(read: VramSample) -> list[str]:
    return [reading.unknown_reason for reading in read.readings if reading.name == "gpu"]


def test_a_gpu_is_chosen_when_there_is_one_and_the_run_may_use_it() -> None:
    with installed(FakeDriver()) as nvml:
        choose = DeviceChoice(nvml=nvml)
        assert choose("auto").is_gpu
        assert choose("cuda").is_gpu
        assert not choose("cpu").is_gpu


def test_the_gpu_is_opened_once_however_often_the_run_changes_its_mind() -> None:
    with installed(FakeDriver()) as nvml:
        choose = DeviceChoice(nvml=nvml)
        assert choose("auto") is choose("cuda")


@pytest.mark.parametrize(
    ("gpus", "error", "reason"), [(0, 0, "NVML shows no GPU"), (1, 9, "NVML: Driver Not Loaded")]
)
def test_without_a_gpu_the_process_is_read_and_a_run_that_wants_one_is_told_why(
    gpus: int, error: int, reason: str
) -> None:
    driver = FakeDriver() if gpus else FakeDriver([])
    driver.errors = {"nvmlInitWithFlags": error} if error else {}
    with installed(driver) as nvml:
        choose = DeviceChoice(nvml=nvml)
        assert not choose("auto").is_gpu
        assert gpu_reading(choose("auto").sample(None)) == []
        assert gpu_reading(choose("cuda").sample(None)) == [reason]
        with pytest.raises(UserError, match=f"--device cuda: {reason}; use --device auto or cpu"):
            DeviceChoice("cuda", nvml=nvml)


def test_the_command_line_comes_before_the_run(tmp_path: Path) -> None:
    script = tmp_path / "card.fake"
    script.write_text("device Mine\n0 1 GiB\n")
    with driver_loaded(FakeDriver()):
        assert not DeviceChoice("cpu")("cuda").is_gpu
        assert DeviceChoice("cuda")("cpu").is_gpu
        assert DeviceChoice("auto")("cpu").is_gpu
        assert DeviceChoice(f"fake:{script}")("cpu").sample(None).device == "Mine"


def test_the_demo_ships() -> None:
    read = DeviceChoice("fake:demo", clock=FakeClock())("auto").sample(None)
    assert (read.source, read.device) == ("fake", "Demo card")


@pytest.mark.parametrize("option", ["gpu", "fake", ""])
def test_a_word_that_is_none_names_those_that_are(option: str) -> None:
    with pytest.raises(UserError, match="auto, cpu, cuda, fake:demo or fake:FILE"):
        DeviceChoice(option)
