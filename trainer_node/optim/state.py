"""What optimizers hold besides weights: every tensor of it, and the shapes that each may have.

For snapshots, which restore all of it, and for checkpoints, which refuse what does not fit. Counters may be
in the state of a parameter or in a group; rates, decays and betas in a group belong to the schedule, not to
the state. Decides nothing about when.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainer_node.optim.directions import BLOCK_WEIGHTS

_SCHEDULED = ("params", "lr", "betas", "momentum", "weight_decay")
_CODES = 256  # of 8 bits


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """Every state tensor, in a fixed order; of a tensor that wraps others (8-bit, sharded), those."""
    return [
        tensor
        for optimizer in optimizers
        for entries in (*_entries_in_order(optimizer), *group_state(optimizer))
        for _, value in sorted(entries.items())
        for tensor in leaf_tensors(value)
    ]


def leaf_tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a value of the state is or holds, the live ones."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from leaf_tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from leaf_tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from leaf_tensors(inner)


def with_own_containers(value: Any) -> Any:
    """A copy of dicts and lists, all the way down, that holds the same tensors."""
    if isinstance(value, Mapping):
        return {key: with_own_containers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_own_containers(inner) for inner in value]
    return value


def group_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Per group what an optimizer may count in it; what a schedule sets is left out."""
    return [{k: v for k, v in group.items() if k not in _SCHEDULED} for group in optimizer.param_groups]


def put_group_state(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """The reverse of `group_state`: what was counted since is gone."""
    for group, kept in zip(optimizer.param_groups, saved, strict=True):
        for key in set(group) - set(kept) - set(_SCHEDULED):
            del group[key]
        group.update(kept)


def check_state(parameter: Tensor, entries: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless every tensor has its parameter's shape, or that of an 8-bit moment's scales.

    Native code takes these shapes for granted: a shorter tensor would be read and written past its end.
    """
    blocks = -(-parameter.numel() // BLOCK_WEIGHTS)
    helpers = {"absmax": torch.Size([blocks]), "qmap": torch.Size([_CODES])}
    for key, tensor in entries.items():
        wanted = helpers.get(key[:-1], parameter.shape)
        if tensor.shape != wanted and not (key == "step" and tensor.numel() == 1):
            raise ValueError(f"optimizer state {key} is {list(tensor.shape)}, not {list(wanted)}")
        if key[:-1] in helpers and tensor.dtype != torch.float32:
            raise ValueError(f"optimizer state {key} is {tensor.dtype}, not float32")
        missing = {f"absmax{key[-1]}", f"qmap{key[-1]}"} - set(entries)
        if tensor.dtype == torch.uint8 and missing:
            raise ValueError(f"optimizer state {key} has no {min(missing)}")


def _entries_in_order(optimizer: torch.optim.Optimizer) -> Iterator[Mapping[str, Any]]:
    """By parameter in the order of the groups, then what is kept under other keys."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        yield optimizer.state.get(parameter, {})
    known = {id(parameter) for parameter in parameters}
    for key, value in optimizer.state.items():
        if id(key) not in known:
            yield value if isinstance(value, Mapping) else {"": value}
