"""Events of one GPU: Xid errors, memory errors, a GPU that becomes unusable. Collected, not judged (xid.py).

Owns a thread that waits in NVML with a timeout and one event set. `take` hands over what has happened
since the last call, as readings: `xid` with the code as value, each other event with its count. A storm
(one bad kernel can raise Xid 31 thousands of times) is one reading a sample. The thread ends by itself
when it is told to or when NVML fails; nothing here raises.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import Any

from common.messages import Reading
from monitor_node.nvml_calls import NOT_SUPPORTED, TIMEOUT

WAIT_MILLISECONDS = 1000  # how long a stop may take; an event ends the wait at once
XID = "xid"
NAMES = {  # nvmlEventType*; the last six are unknown to drivers before 2025
    0x2: "double_bit_ecc",
    0x8: XID,
    0x400: "dram_retirement",
    0x800: "dram_retirement_failure",
    0x1000: "poison",
    0x2000: "poison_fatal",
    0x4000: "gpu_unavailable",
    0x8000: "recovery_action_event",
}
_SOURCE = "nvmlEventSetWait_v2"


class EventWatch:
    """Events of the GPU with this handle from now on. MIG instances have none of their own."""

    def __init__(self, nvml: Any, gpu_handle: Any, *, wait_milliseconds: int = WAIT_MILLISECONDS) -> None:
        self._nvml = nvml
        self._wait_milliseconds = wait_milliseconds
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, int]] = Counter()  # (name, Xid or 0) -> how often
        self._unknown_reason = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            event_set = _registered(nvml, gpu_handle)
        except nvml.NVMLError as error:
            self._unknown_reason = f"NVML events: {error}"
            return
        self._thread = threading.Thread(target=self._watch, args=(event_set,), name="gpu-events", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """While it is, NVML must not be shut down."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Returns at once; the thread ends within the wait."""
        self._stop.set()

    def take(self) -> tuple[Reading, ...]:
        with self._lock:
            seen, self._seen = self._seen, Counter()
        return tuple(
            Reading(
                name=name, value=float(code if name == XID else count), unit="1", source=_SOURCE,
                unknown_reason="",
            )
            for (name, code), count in sorted(seen.items())
        )  # fmt: skip

    def state(self) -> Reading:
        """`events` = 1 while they are watched; None with the reason why they are not."""
        with self._lock:
            reason = self._unknown_reason
        value = None if reason else 1.0
        return Reading(name="events", value=value, unit="1", source=_SOURCE, unknown_reason=reason)

    def _watch(self, event_set: Any) -> None:
        reason = "the watch was stopped"
        while not self._stop.is_set():
            try:
                event = self._nvml.nvmlEventSetWait_v2(event_set, self._wait_milliseconds)
            except self._nvml.NVMLError as error:
                if error.value == TIMEOUT:
                    continue
                reason = f"NVML events: {error}"
                break
            name = NAMES.get(int(event.eventType), f"event_{event.eventType:#x}")
            with self._lock:
                self._seen[name, int(event.eventData) if name == XID else 0] += 1
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlEventSetFree(event_set)
        with self._lock:
            self._unknown_reason = reason


def _registered(nvml: Any, gpu_handle: Any) -> Any:
    """An event set for what we want to know and this GPU can tell. Raises NVMLError."""
    wanted = int(nvml.nvmlDeviceGetSupportedEventTypes(gpu_handle)) & sum(NAMES)
    if not wanted:
        raise nvml.NVMLError(NOT_SUPPORTED)
    event_set = nvml.nvmlEventSetCreate()
    try:
        nvml.nvmlDeviceRegisterEvents(gpu_handle, wanted, event_set)
    except nvml.NVMLError:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlEventSetFree(event_set)
        raise
    return event_set
