"""A driver that does not exist, below the real package nvidia-ml-py: pynvml's own code runs unchanged.

`FakeDriver` stands in for libnvidia-ml.so.1: pynvml looks its functions up by name and hands them ctypes
arguments, so versions, structs, missing functions and error classes are the package's own. What the
driver answers is data: a table such as tests/monitor/nvml/*.toml (see `from_table`). Python functions
of the module pynvml that a fixture calls missing are those that an older package lacks.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pynvml

from tests.faults import wait_until

GIB = 1 << 30
NOT_AVAILABLE = (1 << 64) - 1
SUCCESS, NOT_SUPPORTED, NOT_FOUND, TIMEOUT, LOST = 0, 3, 6, 10, 15
SIZE_TOO_SMALL = 7


@dataclass
class FakeGpu:
    """A whole GPU or a MIG instance of one."""

    uuid: str = "GPU-aaaa"
    name: str = "Fake"
    memory: dict[str, int] = field(
        default_factory=lambda: {"total": 16 * GIB, "used": 3 * GIB, "reserved": GIB}
    )
    processes: list[tuple[int, int | None]] = field(default_factory=list)  # (process id, bytes)
    process_list: str = "Compute"  # or "Graphics", "MPSCompute"
    mig: list[FakeGpu | None] = field(default_factory=list)  # None: a place without an instance
    sensors: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)  # function: NVML error


SENSORS: dict[str, Any] = {
    "temperature": 61,
    "power": 250_000,
    "power_limit": 300_000,
    "utilisation": 87,
    "throttle": 0,
    "recovery_action": 0,
    "remapped_rows": [0, 0, 0, 0],
    "ecc_uncorrected": 0,
}


class FakeDriver:
    def __init__(self, gpus: list[FakeGpu] | None = None) -> None:
        self.gpus = [FakeGpu()] if gpus is None else gpus
        self.errors: dict[str, int] = {}  # function: error, for all GPUs
        self.missing: set[str] = set()  # functions that this driver is too old for
        self.missing_in_package: set[str] = set()
        self.calls: list[str] = []
        self.events: queue.SimpleQueue[tuple[int, int] | int] = queue.SimpleQueue()  # (type, data) or error
        self.event_types = 0x8 | 0x2
        self.event_sets = 0  # open ones
        self.registered: list[str] = []  # UUIDs of the GPUs whose events were asked for
        self.initialised = 0

    @classmethod
    def from_table(cls, table: dict[str, Any], *, trainer: int) -> FakeDriver:
        """Keys: `gpu` (a list), `errors`, `missing`, `missing_in_package`. Sizes in GiB where the key
        says so; the process id 0 stands for the trainer, and -1 bytes for "not available".
        """
        driver = cls([_gpu(gpu, trainer) for gpu in table.get("gpu", [])])
        driver.errors = dict(table.get("errors", {}))
        driver.missing = set(table.get("missing", []))
        driver.missing_in_package = set(table.get("missing_in_package", []))
        return driver

    def __getattr__(self, name: str) -> Callable[..., int]:
        """pynvml's look-up in the library; AttributeError = this driver lacks the function."""
        body = _FUNCTIONS.get(name)
        if body is None or name in self.missing:
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.errors:
                return self.errors[name]
            if arguments and _is_handle(arguments[0]):
                gpu = self._gpu_at(arguments[0])
                if name in gpu.errors:
                    return gpu.errors[name]
                return int(body(self, gpu, *arguments[1:]))
            return int(body(self, *arguments))

        return function

    def package(self) -> Any:
        """The module pynvml, less what an older one lacks."""
        if not self.missing_in_package:
            return pynvml
        names = {name: value for name, value in vars(pynvml).items() if name not in self.missing_in_package}
        return types.SimpleNamespace(**names)

    def _gpu_at(self, handle: Any) -> FakeGpu:
        number = _address(handle) - 1
        gpu = self.gpus[number // 100]
        if number % 100 == 0:
            return gpu
        instance = gpu.mig[number % 100 - 1]
        assert instance is not None
        return instance

    def handle_of(self, gpu: FakeGpu) -> int:
        for index, whole in enumerate(self.gpus):
            for place, instance in enumerate([whole, *whole.mig]):
                if instance is gpu:
                    return 100 * index + place + 1
        raise AssertionError("not a GPU of this driver")


def _gpu(table: dict[str, Any], trainer: int) -> FakeGpu:
    memory = {key.removesuffix("_gib"): _bytes(key, value) for key, value in table["memory"].items()}
    processes = [
        (trainer if process["id"] == 0 else process["id"], None if held == -1 else held)
        for process in table.get("processes", [])
        for held in [_bytes("gib", process["gib"]) if "gib" in process else process["bytes"]]
    ]
    return FakeGpu(
        uuid=table["uuid"],
        name=table["name"],
        memory=memory,
        processes=processes,
        process_list=table.get("process_list", "Compute"),
        mig=[_gpu(instance, trainer) if instance else None for instance in table.get("mig", [])],
        sensors=dict(table.get("sensors", {})),
        errors=dict(table.get("errors", {})),
    )


def _bytes(key: str, value: float) -> int:
    return int(value * GIB) if key.endswith("gib") else int(value)


def _is_handle(argument: Any) -> bool:
    return isinstance(argument, pynvml.c_nvmlDevice_t)


def _address(handle: Any) -> int:
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)


def _set_handle(reference: Any, number: int) -> int:
    ctypes.c_void_p.from_buffer(reference._obj).value = number
    return SUCCESS


def _set(reference: Any, value: int) -> int:
    reference._obj.value = value
    return SUCCESS


# What the library does, by name. First the driver, then the GPU of a handle where there is one.


def _init(driver: FakeDriver, flags: Any) -> int:
    driver.initialised += 1
    return SUCCESS


def _shutdown(driver: FakeDriver) -> int:
    driver.initialised -= 1
    return SUCCESS


def _handle_by_index(driver: FakeDriver, index: Any, reference: Any) -> int:
    gpu = driver.gpus[index.value]
    if "nvmlDeviceGetHandleByIndex_v2" in gpu.errors:
        return gpu.errors["nvmlDeviceGetHandleByIndex_v2"]
    return _set_handle(reference, 100 * index.value + 1)


def _text(value: Callable[[FakeGpu], str]) -> Callable[..., int]:
    def answer(driver: FakeDriver, gpu: FakeGpu, buffer: Any, size: Any) -> int:
        buffer.value = value(gpu).encode()
        return SUCCESS

    return answer


def _memory_v1(driver: FakeDriver, gpu: FakeGpu, reference: Any) -> int:
    memory = reference._obj
    memory.total = gpu.memory["total"] % (1 << 64)
    memory.used = gpu.memory["used"] + gpu.memory.get("reserved", 0)  # version 1 counts what is reserved
    return SUCCESS


def _memory_v2(driver: FakeDriver, gpu: FakeGpu, reference: Any) -> int:
    memory = reference._obj
    if memory.version != 0x02000028:
        return 25
    memory.total, memory.used = gpu.memory["total"], gpu.memory["used"]
    memory.reserved = gpu.memory.get("reserved", 0)
    return SUCCESS


def _process_list(kind: str) -> Callable[..., int]:
    def answer(driver: FakeDriver, gpu: FakeGpu, count: Any, array: Any) -> int:
        processes = gpu.processes if gpu.process_list == kind else []
        count._obj.value = len(processes)
        if array is None:
            return SIZE_TOO_SMALL if processes else SUCCESS
        for row, (process_id, held) in zip(array, processes, strict=False):
            row.pid, row.usedGpuMemory = process_id, NOT_AVAILABLE if held is None else held
        return SUCCESS

    return answer


def _mig_mode(driver: FakeDriver, gpu: FakeGpu, current: Any, pending: Any) -> int:
    if gpu.uuid.startswith("MIG") or "mig" in gpu.sensors.get("lacks", ()):
        return NOT_SUPPORTED
    return _set(current, int(bool(gpu.mig)))


def _mig_count(driver: FakeDriver, gpu: FakeGpu, reference: Any) -> int:
    return _set(reference, len(gpu.mig))


def _mig_handle(driver: FakeDriver, gpu: FakeGpu, index: Any, reference: Any) -> int:
    instance = gpu.mig[index.value]
    return NOT_FOUND if instance is None else _set_handle(reference, driver.handle_of(instance))


def _sensor(name: str, store: Callable[[Any, Any], int]) -> Callable[..., int]:
    def answer(driver: FakeDriver, gpu: FakeGpu, *arguments: Any) -> int:
        if gpu.uuid.startswith("MIG") or name in gpu.sensors.get("lacks", ()):
            return NOT_SUPPORTED
        return store(arguments, gpu.sensors.get(name, SENSORS[name]))

    return answer


def _last(arguments: Any, value: Any) -> int:
    return _set(arguments[-1], value)


def _temperature(arguments: Any, value: Any) -> int:
    arguments[0]._obj.temperature = value
    return SUCCESS


def _rates(arguments: Any, value: Any) -> int:
    arguments[0]._obj.gpu = value
    return SUCCESS


def _rows(arguments: Any, value: Any) -> int:
    for reference, number in zip(arguments, value, strict=True):
        _set(reference, number)
    return SUCCESS


def _fields(arguments: Any, value: Any) -> int:
    row = arguments[1]._obj[0]
    assert row.fieldId == 230
    row.nvmlReturn = NOT_SUPPORTED if value == -1 else SUCCESS
    row.value.uiVal = max(value, 0)
    return SUCCESS


def _event_types(driver: FakeDriver, gpu: FakeGpu, reference: Any) -> int:
    return NOT_SUPPORTED if gpu.uuid.startswith("MIG") else _set(reference, driver.event_types)


def _event_set(driver: FakeDriver, reference: Any) -> int:
    driver.event_sets += 1
    return _set_handle(reference, 77)


def _register(driver: FakeDriver, gpu: FakeGpu, types: Any, event_set: Any) -> int:
    driver.registered.append(gpu.uuid)
    return SUCCESS


def _free(driver: FakeDriver, event_set: Any) -> int:
    driver.event_sets -= 1
    return SUCCESS


def _wait(driver: FakeDriver, event_set: Any, reference: Any, milliseconds: Any) -> int:
    try:
        event = driver.events.get(timeout=milliseconds.value / 1000)
    except queue.Empty:
        return TIMEOUT
    if isinstance(event, int):
        return event
    reference._obj.eventType, reference._obj.eventData = event
    return SUCCESS


_FUNCTIONS: dict[str, Callable[..., int]] = {
    "nvmlInitWithFlags": _init,
    "nvmlShutdown": _shutdown,
    "nvmlDeviceGetCount_v2": lambda driver, reference: _set(reference, len(driver.gpus)),
    "nvmlDeviceGetHandleByIndex_v2": _handle_by_index,
    "nvmlDeviceGetUUID": _text(lambda gpu: gpu.uuid),
    "nvmlDeviceGetName": _text(lambda gpu: gpu.name),
    "nvmlDeviceGetMemoryInfo": _memory_v1,
    "nvmlDeviceGetMemoryInfo_v2": _memory_v2,
    **{
        f"nvmlDeviceGet{kind}RunningProcesses_{version}": _process_list(kind)
        for kind in ("Compute", "MPSCompute", "Graphics")
        for version in ("v2", "v3")
    },
    "nvmlDeviceGetMigMode": _mig_mode,
    "nvmlDeviceGetMaxMigDeviceCount": _mig_count,
    "nvmlDeviceGetMigDeviceHandleByIndex": _mig_handle,
    "nvmlDeviceGetTemperatureV": _sensor("temperature", _temperature),
    "nvmlDeviceGetTemperature": _sensor("temperature", _last),
    "nvmlDeviceGetPowerUsage": _sensor("power", _last),
    "nvmlDeviceGetEnforcedPowerLimit": _sensor("power_limit", _last),
    "nvmlDeviceGetUtilizationRates": _sensor("utilisation", _rates),
    "nvmlDeviceGetCurrentClocksEventReasons": _sensor("throttle", _last),
    "nvmlDeviceGetCurrentClocksThrottleReasons": _sensor("throttle", _last),
    "nvmlDeviceGetFieldValues": _sensor("recovery_action", _fields),
    "nvmlDeviceGetRemappedRows": _sensor("remapped_rows", _rows),
    "nvmlDeviceGetTotalEccErrors": _sensor("ecc_uncorrected", _last),
    "nvmlDeviceGetSupportedEventTypes": _event_types,
    "nvmlEventSetCreate": _event_set,
    "nvmlDeviceRegisterEvents": _register,
    "nvmlEventSetFree": _free,
    "nvmlEventSetWait_v2": _wait,
}


@contextlib.contextmanager
def installed(driver: FakeDriver) -> Iterator[Any]:
    """The module pynvml on this driver, initialised. Event threads are ended at the end."""
    with driver_loaded(driver):
        nvml = driver.package()
        with contextlib.suppress(pynvml.NVMLError):
            nvml.nvmlInit()
        yield nvml


@contextlib.contextmanager
def driver_loaded(driver: FakeDriver) -> Iterator[None]:
    former = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache)
    pynvml.nvmlLib = driver
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield
    finally:
        for _ in range(driver.event_sets):
            driver.events.put(LOST)
        wait_until(lambda: driver.event_sets == 0)
        pynvml.nvmlLib = former[0]
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(former[1])
