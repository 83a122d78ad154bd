"""The processes that train one model together: what they can say to each other, and who this one is.

Numbers travel by torch.distributed's collectives (NCCL for tensors of a GPU, gloo for the rest), words as
bytes of ours, never as pickled objects. Every method but `rank` and `size` is a collective: all ranks call
the same ones in the same order, or all hang. OneRank is a single process: no collective, no copy, the same
bits. A rank that fails ends its process; torchrun ends the others. Starts no process and decides nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import EnvironmentFault, SettingsError

# Longer than any rank keeps the others waiting: rank 0 waits for a predictor, writes a checkpoint.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class RankLost(EnvironmentFault):
    """Another rank is gone, or a collective with it failed: this one cannot go on alone."""


class Ranks(Protocol):
    @property
    def rank(self) -> int:
        """Of this process, from 0. Rank 0 alone talks to the bus and writes the run folder."""

    @property
    def size(self) -> int: ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """In place, over all ranks; the same tensor, the same bits on every rank. Waits for no device."""

    def gather(self, content: bytes) -> list[bytes]:
        """That of every rank, in order, on every rank."""

    def broadcast(self, content: bytes) -> bytes:
        """That of rank 0; what the others give does not matter."""

    def any(self, flag: bool) -> bool:
        """Whether it is true on one rank or more."""


class OneRank:
    rank, size = 0, 1

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, content: bytes) -> list[bytes]:
        return [content]

    def broadcast(self, content: bytes) -> bytes:
        return content

    def any(self, flag: bool) -> bool:
        return flag


class ProcessGroupRanks:
    """The default process group, which must know gloo for CPU tensors."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum_(self, tensor: Tensor) -> Tensor:
        with told_plainly():
            dist.all_reduce(tensor)
        return tensor

    def gather(self, content: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with told_plainly():
            dist.all_gather(sizes, torch.tensor([len(content)]))
            longest = max(1, *(int(size) for size in sizes))
            padded = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(padded, _bytes_tensor(content.ljust(longest, b"\0")))
        return [p.numpy().tobytes()[: int(size)] for p, size in zip(padded, sizes, strict=True)]

    def broadcast(self, content: bytes) -> bytes:
        size = torch.tensor([len(content)])
        with told_plainly():
            dist.broadcast(size, src=0)
            tensor = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == 0:
                tensor = _bytes_tensor(content)
            if tensor.numel():
                dist.broadcast(tensor, src=0)
        return tensor.numpy().tobytes()

    def any(self, flag: bool) -> bool:
        return bool(int(self.sum_(torch.tensor([int(flag)]))))


ONE_RANK = OneRank()


def are_several() -> bool:
    """Whether this process belongs to a group of two and more, ours or that of a user's own script."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def told_plainly() -> Iterator[None]:
    """A collective that failed is RankLost, one line; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        words = " ".join(str(error).split())[-120:]
        raise RankLost(
            f"another rank is gone (... {words}): run under torchrun with --max-restarts to go on by itself,"
            " or resume the run from its last checkpoint"
        ) from None


@contextmanager
def ranks_of_environment(kind: str, *, on_gpu: bool) -> Iterator[Ranks]:
    """The ranks that torchrun started, joined while the context lasts; OneRank without torchrun.

    `kind` is trainer.parallel.kind. Raises SettingsError for several ranks that were told to train alone,
    EnvironmentFault for more ranks than GPUs on this machine, RankLost when they do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ONE_RANK
        return
    if kind == "none":
        raise SettingsError(
            f"torchrun started {size} ranks and trainer.parallel.kind = none: each would train a model of its"
            " own; set it to ddp or fsdp"
        )
    if on_gpu:
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    with told_plainly():
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(_start_of_this_group(), store),
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    yield ProcessGroupRanks()
    dist.destroy_process_group()  # not after an error: it may wait for a rank that waits for this one


def _start_of_this_group() -> str:
    """A name that all ranks of this start share and the ranks of an earlier start never had.

    With torchrun's default rendezvous (static) its store outlives a restart (torch 2.13 makes a new one for
    c10d alone): a rank would find the address of its dead neighbour there and wait for it forever, seen in
    one restart of four. The count of restarts is one agent's: several agents need not agree on it.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return "start"
    return f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _take_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise EnvironmentFault(
            f"local rank {local_rank} finds {count} GPUs here: start torchrun with --nproc-per-node {count}"
        )
    torch.cuda.set_device(local_rank)


def _bytes_tensor(content: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
    )
