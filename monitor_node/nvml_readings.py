"""What a GPU says of its health: heat, power, brakes, broken memory, and what the driver advises.

Owns the table of sensors, their units and plausible ranges. One reading a sensor; a sensor that answers
with several facts adds readings named `<sensor>.<fact>`: each brake that is on (`throttle.sw-thermal`),
an advice other than none (`recovery_action.reset-gpu`), rows that wait for a reset
(`remapped_rows.pending`). What a call cannot give is None with a reason; a value outside its range is
a sentinel (dcgm-exporter shows 9223372036854775794 degrees) and also None. Never raises for a sensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common.messages import Reading
from monitor_node.device import SLOW_SECONDS
from monitor_node.nvml_calls import Answer, ask
from monitor_node.nvml_leaves import Leaf

_GPU_SENSOR = 0  # NVML_TEMPERATURE_GPU
_RECOVERY_ACTION_FIELD = 230  # NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
_UNCORRECTED, _SINCE_BOOT = 1, 0  # NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC

# Bits of nvmlClocksEventReason*. 0x1 idle, 0x2 clocks set by the user and 0x100 display clock slow
# nothing down that the GPU would do by itself.
_BRAKES = {
    0x4: "sw-power-cap",
    0x8: "hw-slowdown",
    0x10: "sync-boost",
    0x20: "sw-thermal",
    0x40: "hw-thermal",
    0x80: "hw-power-brake",
}
_NO_BRAKES = 0x1 | 0x2 | 0x100
_ADVICE = {
    1: "reset-gpu",
    2: "reboot-node",
    3: "drain-p2p",
    4: "drain-and-reset",
    5: "recover-imex-domain",
    6: "reset-bus",
    7: "reboot-system",
}


@dataclass(frozen=True, kw_only=True)
class Sensor:
    name: str
    unit: str
    high: float  # the greatest plausible value; the least is 0, or -100 for degrees
    ask: Callable[[Any, Any], Answer]  # (nvml, handle)
    facts: Callable[[Any], dict[str, float]]  # name -> value; raises ValueError
    slow: bool = True
    of_leaf: bool = False  # asked of the MIG instance, not of the whole GPU


def _single(name: str, scale: float = 1.0) -> Callable[[Any], dict[str, float]]:
    return lambda value: {name: value * scale}


def throttle_facts(mask: int) -> dict[str, float]:
    """`throttle` = how many brakes are on (0 = the GPU runs freely), and one fact for each."""
    bits = [1 << bit for bit in range(mask.bit_length()) if mask & (1 << bit) & ~_NO_BRAKES]
    names = [_BRAKES.get(bit, f"bit-{bit:#x}") for bit in bits]
    return {"throttle": float(len(names)), **{f"throttle.{name}": 1.0 for name in names}}


def _recovery_facts(fields: Any) -> dict[str, float]:
    field = fields[0]
    if field.nvmlReturn != 0:
        raise ValueError(f"NVML error {field.nvmlReturn}: this driver or GPU does not say")
    code = int(field.value.uiVal)
    facts = {"recovery_action": float(code)}
    if code:
        facts[f"recovery_action.{_ADVICE.get(code, f'code-{code}')}"] = 1.0
    return facts


def _row_facts(rows: Any) -> dict[str, float]:
    correctable, uncorrectable, pending, failed = rows
    return {
        "remapped_rows": float(correctable + uncorrectable),
        "remapped_rows.pending": float(pending),  # 1 = a reset of the GPU takes them out of use
        "remapped_rows.failed": float(failed),  # 1 = no spare rows: the GPU has to be replaced
    }


SENSORS = (
    Sensor(
        name="temperature", unit="C", high=150.0, slow=False, facts=_single("temperature"),
        ask=lambda nvml, handle: ask(
            nvml, ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"), handle, _GPU_SENSOR
        ),
    ),
    Sensor(
        name="power", unit="W", high=10_000.0, slow=False, facts=_single("power", 1e-3),
        ask=lambda nvml, handle: ask(nvml, ("nvmlDeviceGetPowerUsage",), handle),
    ),
    Sensor(
        name="utilisation", unit="1", high=1.0, slow=False, of_leaf=True,
        ask=lambda nvml, handle: ask(nvml, ("nvmlDeviceGetUtilizationRates",), handle),
        facts=lambda rates: {"utilisation": rates.gpu / 100.0},
    ),
    Sensor(
        name="throttle", unit="1", high=64.0, slow=False, facts=throttle_facts,
        ask=lambda nvml, handle: ask(
            nvml,
            ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
            handle,
        ),
    ),
    Sensor(
        name="power_limit", unit="W", high=10_000.0, facts=_single("power_limit", 1e-3),
        ask=lambda nvml, handle: ask(nvml, ("nvmlDeviceGetEnforcedPowerLimit",), handle),
    ),
    Sensor(
        name="recovery_action", unit="1", high=1000.0, facts=_recovery_facts,
        ask=lambda nvml, handle: ask(nvml, ("nvmlDeviceGetFieldValues",), handle, [_RECOVERY_ACTION_FIELD]),
    ),
    Sensor(
        name="remapped_rows", unit="1", high=1e6, facts=_row_facts,
        ask=lambda nvml, handle: ask(nvml, ("nvmlDeviceGetRemappedRows",), handle),
    ),
    Sensor(
        name="ecc_uncorrected", unit="1", high=1e12, facts=_single("ecc_uncorrected"),
        ask=lambda nvml, handle: ask(
            nvml, ("nvmlDeviceGetTotalEccErrors",), handle, _UNCORRECTED, _SINCE_BOOT
        ),
    ),
)  # fmt: skip


class HealthReader:
    """Reads the fast sensors each time, the slow ones and those that do not answer every SLOW_SECONDS."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._silent: set[str] = set()  # sensors that gave nothing the last time
        self._slow_due_seconds = 0.0
        self._leaf_uuid = ""

    def is_slow_round(self, leaf: Leaf, now_seconds: float) -> bool:
        return leaf.uuid != self._leaf_uuid or now_seconds >= self._slow_due_seconds

    def read(self, leaf: Leaf, now_seconds: float) -> tuple[Reading, ...]:
        is_slow_round = self.is_slow_round(leaf, now_seconds)
        if is_slow_round:
            self._leaf_uuid, self._slow_due_seconds = leaf.uuid, now_seconds + SLOW_SECONDS
            self._silent = set()
        readings: list[Reading] = []
        for sensor in SENSORS:
            if (sensor.slow or sensor.name in self._silent) and not is_slow_round:
                continue
            readings += (found := tuple(read_sensor(self._nvml, leaf, sensor)))
            if found[0].value is None:
                self._silent.add(sensor.name)
        return tuple(readings)


def read_sensor(nvml: Any, leaf: Leaf, sensor: Sensor) -> Iterator[Reading]:
    """At least one reading; the first has the sensor's name."""
    if leaf.is_mig and sensor.of_leaf:
        yield _unknown(sensor, "NVML", "NVML does not tell it for a MIG instance")
        return
    answer = sensor.ask(nvml, leaf.gpu_handle)
    if answer.value is None:
        yield _unknown(sensor, answer.source, answer.unknown_reason)
        return
    try:
        facts = _plausible(sensor, answer.value)
    except ValueError as error:
        yield _unknown(sensor, answer.source, f"{answer.source}: {error}")
        return
    source = f"{answer.source} of the whole GPU" if leaf.is_mig else answer.source
    for name, value in facts.items():
        yield Reading(name=name, value=value, unit=sensor.unit, source=source, unknown_reason="")


def _plausible(sensor: Sensor, value: Any) -> dict[str, float]:
    low = -100.0 if sensor.unit == "C" else 0.0
    facts = sensor.facts(value)
    for name, number in facts.items():
        if not low <= number <= sensor.high:
            raise ValueError(f"answered {number:.0f} {sensor.unit} for {name}")
    return {name: float(number) for name, number in facts.items()}


def _unknown(sensor: Sensor, source: str, reason: str) -> Reading:
    return Reading(name=sensor.name, value=None, unit=sensor.unit, source=source, unknown_reason=reason)
