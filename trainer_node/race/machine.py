"""The machine that a run ran on: its name, its clock, and how much memory the run held."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import torch

from common.clock import Clock, CoreClock, SystemClock
from common.settings import RunSettings
from trainer_node.tasks import Task


def forget_peak(device: torch.device) -> None:
    """The peak starts again from now, where the system allows it (Linux, GPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """Most memory held since forget_peak: of the GPU, or resident (Linux; elsewhere what is held now)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return int(psutil.Process().memory_info().rss)


def machine() -> str:
    """Processor, cores, threads used, torch version."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = name or "unknown processor"
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    cores, threads = psutil.cpu_count() or 1, torch.get_num_threads()
    return f"{name}, {cores} cores, {threads} threads used, torch {torch.__version__}"


def clock_for(settings: RunSettings, task: Task) -> Clock:
    """Wall time; with one thread on a CPU the core's own, which other work on the machine cannot lengthen."""
    alone = task.device.type == "cpu" and settings.trainer.threads == 1
    return CoreClock() if alone else SystemClock()
