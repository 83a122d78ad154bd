"""Ranks that are threads of one process: the contract of trainer_node/ranks.py without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

DEADLINE_SECONDS = 30.0


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=DEADLINE_SECONDS)
        self.given: list[Any] = [None] * size


class ThreadRank:
    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def _exchange(self, value: Any) -> list[Any]:
        self._meeting.given[self.rank] = value
        self._meeting.barrier.wait()
        found = list(self._meeting.given)
        self._meeting.barrier.wait()
        return found

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._exchange(tensor.clone())).sum(dim=0))

    def gather(self, content: bytes) -> list[bytes]:
        return self._exchange(content)

    def broadcast(self, content: bytes) -> bytes:
        return self._exchange(content)[0]

    def any(self, flag: bool) -> bool:
        return any(self._exchange(flag))


def on_threads(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """What `work` returns on each rank, in order; the first error that it raises."""
    meeting = _Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [ThreadRank(rank, size, meeting) for rank in range(size)]))
