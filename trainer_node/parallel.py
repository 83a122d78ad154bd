"""Puts a task onto several ranks: DistributedDataParallel or FSDP2 around its model, a part of each batch.

The model object, its parameter names and the order of the batches stay what they are in a single process: at
the same global batch (trainer.batch) the run is the same up to rounding, dropout apart, whose masks each rank
draws for itself. Every rank must build the same model before: DDP makes sure of it, FSDP2 cuts what it finds.
Trains nothing and talks to nobody but torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import SettingsError
from common.settings import ParallelSettings, TrainerSettings
from trainer_node.data import Batch, TrainBatches
from trainer_node.ranks import Ranks
from trainer_node.split import Split
from trainer_node.tasks import Task

_DROPOUT_STREAM = 0xD70  # apart from every seed that a user is likely to give


def on_ranks(task: Task, settings: TrainerSettings, ranks: Ranks) -> Task:
    """The same task with its model on all ranks and this rank's part of the data; itself on one rank.

    A collective. Raises SettingsError for a batch that cannot be dealt out evenly.
    """
    if ranks.size == 1:
        return task
    sequences, parallel = settings.batch.sequences, settings.parallel
    if sequences % ranks.size:
        raise SettingsError(
            f"trainer.batch.sequences = {sequences} cannot be dealt out to {ranks.size} ranks: make it a"
            f" multiple of {ranks.size} (it counts the whole batch, over all ranks)"
        )
    if parallel.kind == "fsdp" and settings.optimizer.name == "adamw8bit":
        raise SettingsError(
            "adamw8bit does not know cut parameters: take trainer.parallel.kind = ddp, or adamw"
        )
    if parallel.kind == "fsdp":
        shard(task.model, task.device, parallel)
        # In eager FSDP2 each piece reduces into the shards: the sum of pieces never exists whole.
        split, loss = Split(ranks=ranks, shards=ranks), task.loss
    else:
        replica = replicate(task.model, task.device, parallel)
        split = Split(ranks=ranks, without_exchange=replica.no_sync)

        def loss(batch: Batch) -> torch.Tensor:
            return replica(batch.inputs, batch.targets)

    if ranks.rank > 0:
        torch.manual_seed(settings.seed + _DROPOUT_STREAM * ranks.rank)
    return replace(
        task,
        loss=loss,
        train=RankBatches(task.train, split),
        validation=RankHeldOut(task.validation, split),
        split=split,
    )


def replicate(model: nn.Module, device: torch.device, parallel: ParallelSettings) -> DistributedDataParallel:
    """Whole copies; gradients are means over ranks after the last backward pass of a step."""
    replica = DistributedDataParallel(
        model, device_ids=[device.index or torch.cuda.current_device()] if device.type == "cuda" else None
    )
    if parallel.compression == "powersgd":
        # Vogels et al. 2019. Its memory of what was left out is no part of snapshots and checkpoints.
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

        state = powersgd.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=parallel.compression_rank,
            start_powerSGD_iter=parallel.compression_after_steps,
        )
        replica.register_comm_hook(state, powersgd.powerSGD_hook)
    return replica


def shard(model: nn.Module, device: torch.device, parallel: ParallelSettings) -> None:
    """In place: each rank keeps some rows of each parameter; whole blocks are gathered one at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    on_gpu = device.type == "cuda"
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=on_gpu) if parallel.cpu_offload else OffloadPolicy()
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    # The root too is cut again after a forward pass: a guard loss after a jump must not see the weights that
    # were gathered for the guard loss before it.
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


class RankBatches:
    """This rank's part of every training batch. Each rank makes the whole batch and keeps its part."""

    def __init__(self, batches: TrainBatches, split: Split) -> None:
        self._batches, self._split = batches, split

    def batch(self, position: int) -> Batch:
        return self._split.part_of(self._batches.batch(position))

    def epoch(self, position: int) -> float:
        return self._batches.epoch(position)

    def guard(self, index: int) -> Batch:
        return self._split.part_of(self._batches.guard(index))


class RankHeldOut(Sequence[Batch]):
    """This rank's part of every held-out batch, all of one that cannot be dealt out evenly."""

    def __init__(self, batches: Sequence[Batch], split: Split) -> None:
        self._batches, self._split = batches, split

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._split.part_of(self._batches[index])
