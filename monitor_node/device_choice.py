"""Which device a monitor reads: what the run asks for, or what the command line says instead.

Owns the words of `--device`: auto, cpu, cuda, fake:demo, fake:FILE. At most one GPU device is opened in
a process, because it has threads of its own and the run may change its mind. Reads nothing itself.
"""

from __future__ import annotations

import importlib
from typing import Any

from common.clock import Clock, SystemClock
from common.errors import UserError
from monitor_node.device import Device
from monitor_node.fake_device import open_fake
from monitor_node.nvml_device import NvmlDevice
from monitor_node.patient_device import PatientDevice
from monitor_node.process_device import ProcessDevice

FAKE = "fake:"
WORDS = ("auto", "cpu", "cuda")


class DeviceChoice:
    """Call it with the run's preference ("auto", "cpu", "cuda"); it answers with a Device."""

    def __init__(self, option: str | None = None, *, nvml: Any = None, clock: Clock | None = None) -> None:
        """`option` overrules the run. Raises UserError when it cannot be had: a wrong word or script, or
        `cuda` on a host without a GPU.
        """
        self._option = option
        self._clock = clock or SystemClock()
        self._nvml = nvml
        self._gpu: Device | None = None
        self._fake: Device | None = None
        if option is None or option in ("auto", "cpu"):
            return
        if option.startswith(FAKE):
            self._fake = open_fake(option.removeprefix(FAKE), clock=self._clock)
        elif option != "cuda":
            raise UserError(f"--device {option}: give one of {', '.join(WORDS)}, fake:demo or fake:FILE")
        elif reason := self._open_gpu():
            raise UserError(f"--device cuda: {reason}; use --device auto or cpu")

    def __call__(self, preference: str = "auto") -> Device:
        """Never raises: without the GPU that is asked for, the process is read and a reading says why."""
        if self._fake is not None:
            return self._fake
        wanted = self._option or preference
        if wanted == "cpu":
            return ProcessDevice(clock=self._clock)
        reason = self._open_gpu()
        if self._gpu is not None:
            return self._gpu
        return ProcessDevice(clock=self._clock, gpu_reason=reason if wanted == "cuda" else "")

    def _open_gpu(self) -> str:
        """Opens it once; why there is none, or ""."""
        if self._gpu is not None:
            return ""
        try:
            nvml = self._nvml or importlib.import_module("pynvml")
        except ImportError:
            return "the package nvidia-ml-py is not installed"
        try:
            nvml.nvmlInit()
            if not nvml.nvmlDeviceGetCount():
                return "NVML shows no GPU"
        except nvml.NVMLError as error:  # no driver, no library or no permission
            return f"NVML: {error}"
        self._gpu = PatientDevice(NvmlDevice(nvml, clock=self._clock), clock=self._clock)
        return ""
