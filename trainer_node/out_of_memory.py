"""Memory that runs out: telling it from other errors, and making room again.

`attempt` turns the error into a value, because nothing can be freed inside an except block: the traceback
holds the frames, and the frames hold the tensors (pytorch #18853). What is done about it is decided by
real_step.py, jump.py and loop.py.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from common.errors import EnvironmentFault
from trainer_node.ranks import are_several

# What torch and CUDA's libraries raise as a plain RuntimeError. Matched whole: "out of memory." alone, as
# accelerate has it, lets the first one slip through.
_TEXTS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
PICTURE_NAME = "out-of-memory.pickle"
PICTURE_ENTRIES = 100_000  # newest allocations in it; torch's own examples take this many

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """The allocator's words, one line."""

    text: str


class MemoryExhausted(EnvironmentFault):
    """There is nothing left to give up. The state is that before the step, whole, and may be saved."""

    def __init__(self, shortage: OutOfMemory) -> None:
        self.shortage = shortage
        super().__init__(
            f"one sequence at a time does not fit into memory ({shortage.text}): take a smaller"
            " trainer.model (context_tokens, width, layers) or a larger device"
        )


class TornUpdate(EnvironmentFault):
    """Memory ran out while weights were being written: they are of no step and must not be saved."""

    def __init__(self, where: str, shortage: OutOfMemory) -> None:
        self.shortage = shortage
        super().__init__(
            f"memory ran out inside {where} ({shortage.text}): the weights are torn, so nothing is saved;"
            " make room on the device and resume the run from its last checkpoint"
        )


class RankOutOfMemory(EnvironmentFault):
    """One rank cannot do a part of a step again by itself: the others are past it, or wait for it."""

    def __init__(self, shortage: OutOfMemory) -> None:
        super().__init__(
            f"memory ran out on one rank ({shortage.text}) and the others cannot go back with it: the run"
            " ends here, its last checkpoint is whole; torchrun --max-restarts goes on from it by itself."
            " Take a smaller trainer.batch.sequences, a larger trainer.batch.accumulation, or kind = fsdp"
        )


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _TEXTS)


def attempt(work: Callable[[], _T], *, at_once: Callable[[], None] | None = None) -> _T | OutOfMemory:
    """What `work` returns, or that memory ran out; then nothing of `work` is alive any more.

    `at_once` is called before that, while everything still is where it was. Raises RankOutOfMemory where this
    process is one of several ranks.
    """
    try:
        return work()
    except MemoryExhausted as error:
        text = str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).strip().partition("\n")[0]
        if at_once is not None:
            at_once()
    if are_several():
        raise RankOutOfMemory(OutOfMemory(text))
    return OutOfMemory(text)


def release(parameters: Iterable[Tensor]) -> None:
    """Drop the gradients, collect garbage and give the allocator's cache back."""
    for parameter in parameters:
        parameter.grad = None
    clean_up()


def clean_up() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


class Picture:
    """A snapshot for torch's memory visualiser (pytorch.org/memory_viz), newest shortage only; CUDA only.

    The first one shows what was held, and from then on the allocator notes who allocates, so that the second
    one also says by which line. Not before: that costs 2 us an allocation (torch's own figure). The file is
    a pickle that torch writes; nothing of ours ever reads it. The functions are private to torch: where they
    are missing or fail, there is no picture, and training goes on.
    """

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self._path = folder / PICTURE_NAME if folder is not None and device.type == "cuda" else None
        self._is_noting = False

    def take(self) -> None:
        if self._path is None:
            return
        try:
            torch.cuda.memory._dump_snapshot(str(self._path))  # type: ignore[no-untyped-call]
            if not self._is_noting:
                torch.cuda.memory._record_memory_history(max_entries=PICTURE_ENTRIES, stacks="python")
                self._is_noting = True
        except Exception as error:  # private functions: whatever they raise, the run is worth more
            _log.warning("no picture of the memory: %s", error)
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
