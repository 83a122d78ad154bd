"""An allocator with a budget, on a CPU: counts every storage that torch makes and raises torch's own error.

As a CUDA allocator would: what is alive counts, what is dropped is free at once, and what a traceback still
holds is not free. Beyond the budget an operation raises torch.OutOfMemoryError from where it is, forward,
backward, update or jump. Storages that existed before count when they are first written to, or by `adopt`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SimulatedMemory(TorchDispatchMode):
    def __init__(self, budget_bytes: float = float("inf")) -> None:
        super().__init__()
        self.budget_bytes = budget_bytes
        self.used_bytes = self.peak_bytes = self.raised = 0
        self.strike: Callable[[], bool] = lambda: False  # asked at every new storage: raise here?
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs) if kwargs else func(*args)
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(tensor, Tensor) and self._count(tensor.untyped_storage()):
                is_over = self.used_bytes > self.budget_bytes
                if is_over or self.strike():
                    self.raised += 1
                    del made, tensor
                    raise torch.OutOfMemoryError(f"simulated: {self.used_bytes} bytes in use at {func}")
        return made

    def _count(self, storage: torch.UntypedStorage) -> bool:
        """True if it is new."""
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive or num_bytes == 0:
            return False
        self._alive[key] = (num_bytes, weakref.ref(storage, partial(self._free, key)))
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return True

    def _free(self, key: int, _: object) -> None:
        self.used_bytes -= self._alive.pop(key)[0]


def within(*names: str) -> bool:
    """Whether files or functions of all these names are at work now."""
    frame, missing = sys._getframe(1), set(names)
    while frame is not None and missing:
        code = frame.f_code
        missing -= {code.co_name, code.co_filename.rpartition("/")[2]}
        frame = frame.f_back  # type: ignore[assignment]
    return not missing
