"""The random state of every rank, by name, for checkpoints: each rank draws its own dropout masks.

A single process has `cpu` and, on a GPU, `cuda`; rank r > 0 adds `cpu.r` and `cuda.r`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

from trainer_node.ranks import Ranks
from trainer_node.snapshot import random_state, set_random_state


def random_states(ranks: Ranks, device: torch.device) -> dict[str, Tensor]:
    """Those of all ranks, on every rank. A collective."""
    mine = random_state(device)
    if ranks.size == 1:
        return mine
    found = [load(content) for content in ranks.gather(save(mine))]
    return {_name(kind, rank): t for rank, states in enumerate(found) for kind, t in states.items()}


def put_random_state(states: Mapping[str, Tensor], ranks: Ranks, device: torch.device) -> None:
    """This rank's own; a rank that was not there when they were saved keeps what it has. Raises KeyError."""
    if "cpu" not in states:
        raise KeyError("cpu")
    mine = {kind: states[name] for kind in ("cpu", "cuda") if (name := _name(kind, ranks.rank)) in states}
    if mine:
        set_random_state(mine, device)


def _name(kind: str, rank: int) -> str:
    return kind if rank == 0 else f"{kind}.{rank}"
