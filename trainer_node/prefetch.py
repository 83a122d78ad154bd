"""Makes the next batches in a thread while the device works on this one. Changes no batch and no order.

A batch is a function of its position (data.py), so making one early is the same as making it later: what was
guessed wrong, after a restore or a resume, is thrown away and made again. Holds `depth` batches on the host,
pinned where a GPU is to fetch them; copies nothing to a device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import torch

Made = TypeVar("Made")

DEPTH = 2  # batches: the thread is one ahead even where one takes as long as a step


class Ahead(Generic[Made]):
    def __init__(
        self, make: Callable[[int], Made], *, depth: int = DEPTH, device: torch.device | None = None
    ) -> None:
        """`make` is called in the thread and here, also at the same time: it must be a pure function.

        `device` is the GPU that pinned memory is for, None without one.
        """
        self._make, self._depth = make, depth
        self._coming: dict[int, Future[Made]] = {}
        # The current GPU belongs to a thread: without this every rank would open its first one too.
        enter = partial(torch.cuda.set_device, torch.cuda.current_device()) if device is not None else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=enter)

    def at(self, position: int) -> Made:
        """Raises what `make` raises for this position, and nothing of other positions."""
        waiting = self._coming.pop(position, None)
        if waiting is None:
            self._forget()
        following = range(position + 1, position + 1 + self._depth)
        for later in set(self._coming) - set(following):
            self._coming.pop(later).cancel()
        for later in following:
            if later not in self._coming:
                self._coming[later] = self._thread.submit(self._make, later)
        return self._make(position) if waiting is None else waiting.result()

    def _forget(self) -> None:
        for future in self._coming.values():
            future.cancel()
        self._coming = {}
