"""How one run is divided among ranks: who has which part of a batch, and of each parameter.

Replicated (DDP): every rank has all of every parameter and a part of every batch. Sharded (FSDP2): of each
parameter it also has only some rows, as a DTensor whose local tensor is that part. What is measured on parts
becomes the measure of the whole here, so that all ranks hold the same numbers and come to the same verdict.
WHOLE is a single process: nothing is exchanged and nothing computed otherwise. Moves no weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import EnvironmentFault
from trainer_node.data import Batch
from trainer_node.fingerprint import fingerprint
from trainer_node.ranks import ONE_RANK, Ranks


class ReplicasDiffer(EnvironmentFault):
    """The ranks hold different weights although they took the same steps."""


@dataclass(frozen=True)
class Split:
    ranks: Ranks = ONE_RANK  # who train this model together, each on its part of every batch
    shards: Ranks = ONE_RANK  # among whom each parameter is cut; one: everybody has all of it
    # Around a backward pass whose gradients the ranks do not exchange yet.
    without_exchange: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def is_sharded(self) -> bool:
        return self.shards.size > 1

    def part_of(self, batch: Batch) -> Batch:
        """This rank's items of a batch; all of them where they cannot be dealt out evenly.

        Either way the mean over ranks of a mean loss is the mean loss of the whole batch.
        """
        items, size = len(batch.inputs), self.ranks.size
        if size == 1 or items % size:
            return batch
        share = items // size
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        return Batch(batch.inputs[mine], batch.targets[mine])

    def piece_size(self, size: int) -> int:
        """Of micro-batches that are `size` items in a single process."""
        return max(1, size // self.ranks.size)

    def mean_loss(self, loss: float) -> float:
        """Over ranks, of a loss of this rank's part. Float64 in, float64 out."""
        if self.ranks.size == 1:
            return loss
        return float(self.ranks.sum_(torch.tensor([loss], dtype=torch.float64))) / self.ranks.size

    def whole(self, loss: Tensor, norms_G: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss () over ranks and gradient norms (G,) over shards, on the norms' device: one exchange."""
        if self.ranks.size == 1:
            return loss, norms_G
        mean = (loss / self.ranks.size).to(norms_G).view(1)
        if not self.is_sharded:
            return self.ranks.sum_(mean)[0], norms_G
        numbers = self.ranks.sum_(torch.cat([mean, norms_G.square()]))
        return numbers[0], numbers[1:].sqrt()

    def fingerprint(self, tensors: Iterable[Tensor]) -> str:
        """Of the weights of all ranks; `tensors` are this rank's. Raises ReplicasDiffer."""
        mine = fingerprint(tensors)
        if self.ranks.size == 1:
            return mine
        found = [content.decode() for content in self.ranks.gather(mine.encode())]
        if self.is_sharded:
            return hashlib.blake2b("".join(found).encode(), digest_size=8).hexdigest()
        if len(set(found)) > 1:
            odd = next(rank for rank, text in enumerate(found) if text != found[0])
            raise ReplicasDiffer(
                f"the weights of rank {odd} ({found[odd]}) are not those of rank 0 ({found[0]}): faulty"
                " memory, or other software on one machine; resume the run from its last checkpoint"
            )
        return mine

    def starts_of(self, parameters: Sequence[Tensor]) -> list[int]:
        """Per parameter, how many of its weights, read flat, lie on lower ranks: where this shard begins."""
        if not self.is_sharded:
            return [0] * len(parameters)
        sizes = [local_of(parameter).numel() for parameter in parameters]
        of_all = [json.loads(content) for content in self.shards.gather(json.dumps(sizes).encode())]
        return [sum(column) for column in zip(*of_all[: self.shards.rank], strict=True)] or [0] * len(sizes)


WHOLE = Split()


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of it, in the same storage; an ordinary tensor is itself."""
    # Not by isinstance: the import of DTensor takes 0.7 s and 43 MB (2026-11-21), wanted by ranks only.
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor


def like(tensor: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's shard of a tensor that is cut as `tensor` is, in the same storage."""
    if not hasattr(tensor, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
