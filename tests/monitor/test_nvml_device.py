"""A GPU over time: which one is read, what happens when it goes and comes back, what a sample costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from common.clock import FakeClock
from common.messages import Reading, VramSample
from monitor_node.device import SLOW_SECONDS
from monitor_node.nvml_device import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, NvmlDevice
from monitor_node.nvml_events import EventWatch
from tests.faults import wait_until
from tests.monitor.fake_nvml import GIB, LOST, FakeDriver, FakeGpu, installed
from tests.monitor.test_device_fixtures import trainer_here

TRAINER = trainer_here()
PID = TRAINER.process_id
READ = "nvmlDeviceGetMemoryInfo_v2"


class Bench:
    """A device on a driver that a test breaks and mends; a clock that only tests move."""

    def __init__(self) -> None:
        self.driver = FakeDriver([FakeGpu(uuid="GPU-aaaa"), FakeGpu(uuid="GPU-bbbb")])
        self.clock = FakeClock()
        self.environment: dict[str, str] = {}
        self.nvml: Any = None
        self._device: NvmlDevice | None = None

    @property
    def device(self) -> NvmlDevice:
        if self._device is None:
            self._device = NvmlDevice(self.nvml, clock=self.clock, environment=self.environment)
        return self._device

    def sample(self, after_seconds: float = 0.0) -> VramSample:
        self.clock.advance(after_seconds)
        return self.device.sample(TRAINER)

    def lose(self, *gpus: FakeGpu) -> None:
        """As Xid 79 does it: all calls fail, also the one that waits for events."""
        for gpu in gpus:
            gpu.errors = dict.fromkeys((READ, "nvmlDeviceGetMemoryInfo"), LOST)
        for _ in range(self.driver.event_sets):
            self.driver.events.put(LOST)
        wait_until(lambda: self.driver.event_sets == 0)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(psutil.Process, "environ", lambda self: {})  # of whoever started these tests
    bench = Bench()
    with installed(bench.driver) as nvml:
        bench.nvml = nvml
        yield bench


def named(read: VramSample, name: str) -> list[Reading]:
    return [reading for reading in read.readings if reading.name == name]


def test_the_gpu_that_holds_the_trainer_is_the_one_that_is_read(bench: Bench) -> None:
    bench.driver.gpus[0].processes = [(4194001, GIB)]  # nobody here: above every process id in use
    bench.driver.gpus[1].processes = [(PID, GIB)]
    assert bench.sample().device == "GPU 1 Fake"


def test_a_trainer_that_appears_on_another_gpu_is_followed(bench: Bench) -> None:
    assert bench.sample().device == "GPU 0 Fake"
    bench.driver.gpus[1].processes = [(PID, GIB)]
    assert bench.sample(after_seconds=SLOW_SECONDS).device == "GPU 1 Fake"


@pytest.mark.parametrize(
    ("environment", "device", "is_guess"),
    [
        ({}, 0, False),  # all alike: device 0 of CUDA is that of NVML
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, 1, False),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bb"}, 1, False),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, 0, True),
        ({"CUDA_VISIBLE_DEVICES": "7"}, 0, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, True),
        ({"CUDA_VISIBLE_DEVICES": "MIG-xyz"}, 0, True),
    ],
)
def test_without_its_process_the_gpu_follows_from_what_cuda_may_see(
    bench: Bench, environment: dict[str, str], device: int, is_guess: bool
) -> None:
    bench.environment = environment
    read = bench.sample()
    assert read.device == f"GPU {device} Fake"
    assert ("is a guess" in read.unknown_reason) == is_guess


def test_the_environment_of_the_trainer_counts_more_than_that_of_the_monitor(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.environment = {"CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setattr(psutil.Process, "environ", lambda self: {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"})
    assert bench.sample().device == "GPU 1 Fake"


@pytest.mark.parametrize(("order", "is_guess"), [("PCI_BUS_ID", False), ("FASTEST_FIRST", True)])
def test_a_number_among_unlike_gpus_means_something_only_in_bus_order(
    bench: Bench, order: str, is_guess: bool
) -> None:
    bench.driver.gpus[1].name = "Faster"
    bench.environment = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": order}
    read = bench.sample()
    assert read.device == ("GPU 0 Fake" if is_guess else "GPU 1 Faster")
    assert ("is a guess" in read.unknown_reason) == is_guess


def test_of_a_gpu_in_mig_mode_its_instances_can_be_named(bench: Bench) -> None:
    instances = [FakeGpu(uuid="MIG-1111", name="1g"), FakeGpu(uuid="MIG-1122", name="2g")]
    bench.driver.gpus[1].mig = list(instances)
    bench.environment = {"CUDA_VISIBLE_DEVICES": "MIG-1122"}
    assert bench.sample().device == "GPU 1 MIG 1 2g"


def test_a_lost_gpu_is_unknown_with_a_reason_and_read_again_after_a_restart_of_nvml(bench: Bench) -> None:
    assert bench.sample().used_bytes == 3 * GIB
    bench.lose(bench.driver.gpus[0])
    read = bench.sample(after_seconds=1.0)
    assert (read.used_bytes, read.total_bytes, read.trainer_bytes, read.readings) == (None, None, None, ())
    assert "GPU is lost; next try in 2 s" in read.unknown_reason
    bench.driver.gpus[0].errors = {}
    assert bench.sample(after_seconds=1.0).used_bytes is None
    assert bench.sample(after_seconds=1.0).used_bytes == 3 * GIB
    assert bench.driver.initialised == 1
    assert bench.driver.calls.count("nvmlShutdown") == 1


def test_a_gpu_that_stays_away_is_asked_for_less_and_less_often(bench: Bench) -> None:
    bench.lose(bench.driver.gpus[0])
    tries = []
    for second in range(400):
        before = bench.driver.calls.count("nvmlDeviceGetMemoryInfo_v2")
        assert bench.sample(after_seconds=1.0).used_bytes is None
        if bench.driver.calls.count("nvmlDeviceGetMemoryInfo_v2") > before:
            tries.append(second)
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[:6] == [FIRST_PAUSE_SECONDS * 2**n for n in range(5)] + [LONGEST_PAUSE_SECONDS]
    assert set(pauses[5:]) == {LONGEST_PAUSE_SECONDS}


def test_between_two_tries_a_lost_gpu_costs_no_call(bench: Bench) -> None:
    bench.lose(bench.driver.gpus[0])
    bench.sample()
    bench.driver.calls.clear()
    bench.sample(after_seconds=1.0)
    assert bench.driver.calls == []


def test_a_gpu_that_is_no_longer_listed_is_not_mistaken_for_its_neighbour(bench: Bench) -> None:
    bench.environment = {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"}
    bench.sample()
    bench.lose(bench.driver.gpus[0])
    bench.sample()
    del bench.driver.gpus[0]  # what was GPU 1 is now number 0
    read = bench.sample(after_seconds=FIRST_PAUSE_SECONDS)
    assert (read.used_bytes, read.device) == (None, "GPU 0 Fake")
    assert "no longer listed" in read.unknown_reason


def test_a_driver_that_does_not_start_again_is_a_reason(bench: Bench) -> None:
    bench.sample()
    bench.lose(bench.driver.gpus[0])
    bench.sample()
    bench.driver.errors["nvmlInitWithFlags"] = 9
    assert "Driver Not Loaded" in bench.sample(after_seconds=FIRST_PAUSE_SECONDS).unknown_reason


@pytest.mark.parametrize(
    ("used", "total"),
    [((1 << 64) - 1, 16 * GIB), (9223372036854775794, 16 * GIB), (GIB, (1 << 64) - 1), (17 * GIB, 16 * GIB)],
)
def test_a_sentinel_is_unknown(bench: Bench, used: int, total: int) -> None:
    bench.driver.gpus[0].memory = {"used": used, "total": total}
    read = bench.sample()
    assert read.used_bytes is None
    assert "NVML answered" in read.unknown_reason


@pytest.mark.parametrize("error", [2, 3, 13, 25, 999])
def test_where_version_2_fails_version_1_answers_and_the_source_says_so(bench: Bench, error: int) -> None:
    bench.driver.errors[READ] = error
    read = bench.sample()
    assert (read.source, read.used_bytes) == ("nvml-v1", 4 * GIB)


def test_slow_readings_and_silent_sensors_are_not_asked_for_every_second(bench: Bench) -> None:
    bench.driver.gpus[0].sensors = {"lacks": ["power"]}
    first = {reading.name for reading in bench.sample().readings}
    assert {"temperature", "power", "power_limit", "recovery_action", "remapped_rows", "events"} <= first
    bench.driver.calls.clear()
    second = {reading.name for reading in bench.sample(after_seconds=1.0).readings}
    assert second == {"temperature", "utilisation", "throttle"}
    assert len(set(bench.driver.calls) - {"nvmlEventSetWait_v2"}) <= 10
    third = {reading.name for reading in bench.sample(after_seconds=SLOW_SECONDS).readings}
    assert third == first


def test_an_event_is_a_reading_of_the_next_sample_and_only_of_that(bench: Bench) -> None:
    bench.sample()
    for event in ((0x8, 31), (0x8, 31), (0x8, 79), (0x2, 0), (0x2, 0), (0x2, 0)):
        bench.driver.events.put(event)
    wait_until(lambda: bench.driver.events.empty() and bench.driver.calls.count("nvmlEventSetWait_v2") >= 7)
    read = bench.sample(after_seconds=1.0)
    assert [reading.value for reading in named(read, "xid")] == [31.0, 79.0]
    assert [reading.value for reading in named(read, "double_bit_ecc")] == [3.0]
    assert named(bench.sample(after_seconds=1.0), "xid") == []


def test_a_watch_for_events_that_fails_says_so_and_is_started_again(bench: Bench) -> None:
    assert named(bench.sample(), "events")[0].value == 1.0
    bench.driver.events.put(999)
    wait_until(lambda: bench.driver.event_sets == 0)
    assert bench.sample(after_seconds=1.0).used_bytes == 3 * GIB
    assert named(bench.sample(after_seconds=SLOW_SECONDS), "events")[0].value == 1.0
    assert bench.driver.event_sets == 1


def test_when_the_trainer_moves_the_events_of_the_other_gpu_are_left(bench: Bench) -> None:
    bench.sample()
    bench.driver.gpus[1].processes = [(PID, GIB)]
    bench.sample(after_seconds=SLOW_SECONDS)
    assert bench.driver.registered == ["GPU-aaaa", "GPU-bbbb"]
    wait_until(lambda: bench.driver.event_sets == 1)


def test_a_watch_that_was_stopped_gives_its_event_set_back(bench: Bench) -> None:
    watch = EventWatch(bench.nvml, bench.nvml.nvmlDeviceGetHandleByIndex(0), wait_milliseconds=1)
    assert watch.alive
    watch.stop()
    wait_until(lambda: not watch.alive)
    assert bench.driver.event_sets == 0
    assert watch.state().unknown_reason == "the watch was stopped"


@pytest.mark.parametrize("call", ["nvmlEventSetCreate", "nvmlDeviceRegisterEvents"])
def test_events_that_cannot_be_had_are_unknown_and_leave_nothing_open(bench: Bench, call: str) -> None:
    bench.driver.errors[call] = 4
    state = named(bench.sample(), "events")[0]
    assert (state.value, state.unknown_reason) == (None, "NVML events: Insufficient Permissions")
    assert bench.driver.event_sets == 0
