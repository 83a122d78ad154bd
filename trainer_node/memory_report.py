"""The trainer's own account of its memory: who holds what, where, and how close it came to the end.

On a GPU the numbers are the allocator's. On a CPU there is no such account: what the process has of the
system (resident set) stands for `reserved_bytes`, and what the allocator would know is None. Holders are
counted from the tensors themselves; "rest" is what the process holds beyond them (activations and cuBLAS'
workspace, on a CPU the interpreter as well), so holders on the device add up to the whole. Decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from common.messages import Alert, Holder, MemoryReport, Message
from common.streams import TRAINER
from trainer_node.out_of_memory import OutOfMemory
from trainer_node.snapshot import optimizer_tensors
from trainer_node.split import local_of

if TYPE_CHECKING:
    from trainer_node.cycle import Cycle

INTERVAL, OUT_OF_MEMORY, ORDER = "interval", "out-of-memory", "order"  # besides the phases that begin
# Whichever comes first, so that a run of short steps is not told step by step.
REPORT_STEPS, REPORT_SECONDS = 64, 5.0

Report = Callable[["Cycle", str], None]  # (cycle, occasion)


def no_report(loop: Cycle, occasion: str) -> None:
    """For runs that nobody watches."""


class MemoryReports:
    """Called after every step with INTERVAL, and at once on every other occasion."""

    def __init__(
        self, emit: Callable[[Message], None], *, now_seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self._emit, self._now_seconds = emit, now_seconds
        self._next_step, self._next_seconds = 0, now_seconds() + REPORT_SECONDS

    def __call__(self, loop: Cycle, occasion: str) -> None:
        if occasion == INTERVAL and not self._is_due(loop.progress.step):
            return
        self._next_step = loop.progress.step + REPORT_STEPS
        self._next_seconds = self._now_seconds() + REPORT_SECONDS
        self._emit(memory_report(loop, occasion))

    def _is_due(self, step: int) -> bool:
        # A restore takes steps back, so the next one may be far away: the seconds find it.
        return step >= self._next_step or self._now_seconds() >= self._next_seconds


def tell_shortage(loop: Cycle, report: Report, shortage: OutOfMemory, what_was_done: str) -> None:
    """Counted, alerted and reported."""
    loop.memory.out_of_memory += 1
    text = f"memory ran out ({shortage.text}): {what_was_done}"
    step = loop.progress.step
    loop.emit(Alert(node=TRAINER, severity="warning", kind="out_of_memory", text=text, step=step))
    report(loop, OUT_OF_MEMORY)


def memory_report(loop: Cycle, occasion: str) -> MemoryReport:
    """Begins a new interval for `peak_bytes`."""
    device, batch = loop.task.device, loop.settings.batch
    stats = _allocator(device)
    reserved_bytes = stats.get("reserved_bytes.all.current") if stats else resident_bytes()
    allocated_bytes = stats.get("allocated_bytes.all.current")
    held = list(holders(loop))
    used_bytes = allocated_bytes if stats else reserved_bytes
    known_bytes = sum(holder.num_bytes for holder in held if holder.place == "device")
    if used_bytes is not None:
        held.append(Holder(name="rest", num_bytes=max(0, used_bytes - known_bytes), place="device"))
    return MemoryReport(
        step=loop.progress.step,
        occasion=occasion,
        allocated_bytes=allocated_bytes,
        reserved_bytes=reserved_bytes,
        inactive_split_bytes=stats.get("inactive_split_bytes.all.current"),
        peak_bytes=stats.get("allocated_bytes.all.peak"),
        alloc_retries=int(stats.get("num_alloc_retries", 0)),
        out_of_memory=loop.memory.out_of_memory,
        micro_batch=loop.memory.micro_batch(batch),
        accumulation=loop.memory.accumulation(batch),
        in_force=loop.memory.given_up,
        holders=tuple(held),
    )


def holders(loop: Cycle) -> Iterator[Holder]:
    """Everybody but the rest; on a CPU host memory is the device's."""
    model = loop.task.model
    parameters = list(model.parameters())
    places: list[tuple[str, str, int]] = [
        ("weights", "device", _num_bytes([*parameters, *model.buffers()])),
        ("optimizer", "device", _num_bytes(t for t in optimizer_tensors(loop.optimizers) if t.dim() > 0)),
        ("gradients", "device", _num_bytes(p.grad for p in parameters if p.grad is not None)),
    ]
    prediction = loop.prediction
    if prediction.basis is not None:
        places += [("averages", *held) for held in prediction.basis.averages.places()]
        if prediction.basis.history is not None:
            places += [("history", *held) for held in prediction.basis.history.places()]
    if prediction.tools is not None:
        store = prediction.tools.store
        places.append(("snapshot", store.place, store.stored_bytes))
    totals: dict[tuple[str, str], int] = {}
    for name, place, num_bytes in places:
        at = "device" if place == "host" and loop.task.device.type == "cpu" else place
        totals[name, at] = totals.get((name, at), 0) + num_bytes
    for (name, place), num_bytes in totals.items():
        yield Holder(name=name, num_bytes=num_bytes, place=place)


def held_bytes(device: torch.device) -> int:
    """Memory this process holds: reserved on the GPU, resident set on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return resident_bytes()


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _allocator(device: torch.device) -> dict[str, Any]:
    """The CUDA allocator's statistics; empty on a CPU, and under a back end that keeps none."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    torch.cuda.reset_peak_memory_stats(device)
    return stats


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local_of(t).numel() * t.element_size() for t in tensors)
