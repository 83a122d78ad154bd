"""The tensors of a run whose parameters are cut among ranks, in files that any number of ranks can read.

Written and read by torch.distributed.checkpoint in its safetensors form: every rank writes its own shards
into `shard-<rank>-...safetensors` of the same folder, each with its offsets; its other form keeps a pickle,
which nobody may load. The rest of a checkpoint (state.json, random state, seal) is checkpoint.py's. Names
begin with `model.`, `optimizer.`, `basis.` or `read_out.`; `number.model.` and so on have no dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import EnvironmentFault
from trainer_node.basis import Basis
from trainer_node.checkpoint_content import model_tensors, parameters_of, state_entries, unreadable
from trainer_node.loop import Loop
from trainer_node.ranks import are_several
from trainer_node.split import like, local_of

_NUMBER = "number."
_FILES = "shard-*.safetensors"


def is_sharded(folder: Path) -> bool:
    return any(folder.glob(_FILES))


def shards_of(loop: Loop, read_out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """All that a resume needs and the weights that count, by name; of what is cut, this rank's part."""
    found = {f"model.{name}": t for name, t in model_tensors(loop.task.model).items()}
    entries = state_entries(loop.optimizers)
    found |= {f"optimizer.{name}": value for name, value in entries if isinstance(value, Tensor)}
    if loop.basis is not None:
        for name, tensor in loop.basis.tensors().items():
            owner = owner_of(name, loop.basis)
            found[f"basis.{name}"] = tensor if owner is None else like(owner, tensor)
    found |= {f"read_out.{name}": t for name, t in (read_out or {}).items()}
    return {
        name if t.dim() else _NUMBER + name: t.detach() if t.dim() else t.detach().view(1)
        for name, t in found.items()
    }


def owner_of(name: str, basis: Basis) -> nn.Parameter | None:
    """The parameter that a tensor of the basis is cut like; None: every rank has all of it."""
    _, _, index = name.rpartition(".")
    return basis.owners[int(index)] if index.isdecimal() else None


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """A collective. Raises EnvironmentFault on every rank where one could not write."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise EnvironmentFault(f"{folder}: its shards were not written: {_first_line(error)}") from None


def read_shards(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """In place, whatever number of ranks wrote them; a collective where there are several ranks.

    Raises CheckpointError.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = dcp.HuggingFaceStorageReader(str(folder))
    alone = not are_several()
    try:
        with warnings.catch_warnings():
            if alone:  # it warns of just that
                warnings.simplefilter("ignore")
            dcp.load(dict(targets), storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        raise unreadable(folder, Exception(_first_line(error))) from None


def saved_kinds(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> whole shape and dtype of all that the files of a folder hold."""
    import torch.distributed.checkpoint as dcp

    found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (kind.size, kind.properties.dtype) for name, kind in found.items()}


def read_state(folder: Path, loop: Loop) -> dict[str, dict[str, Tensor]]:
    """What `shards_of` gave, on this loop's ranks, by kind and name; changes nothing of the loop.

    Weights and optimizer state are cut as the loop's parameters are, the basis is this rank's part. Raises
    CheckpointError, KeyError, IndexError or ValueError for a folder of another run.
    """
    kinds = saved_kinds(folder)
    targets = dict(_targets(kinds, loop))
    read_shards(folder, targets)
    found: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in targets.items():
        kind, _, rest = name.removeprefix(_NUMBER).partition(".")
        whole = tensor.view(()) if name.startswith(_NUMBER) else tensor
        found.setdefault(kind, {})[rest] = local_of(whole) if kind == "basis" else whole
    return found


def read_weights(folder: Path, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that count, whole, for the tensors of a model in one process."""
    kinds = saved_kinds(folder)
    chosen = {n: f"read_out.{n}" if f"read_out.{n}" in kinds else f"model.{n}" for n in names}
    targets = {saved: torch.empty(*kinds[saved][:1], dtype=kinds[saved][1]) for saved in chosen.values()}
    read_shards(folder, targets)
    return {name: targets[saved] for name, saved in chosen.items()}


def _targets(kinds: Mapping[str, tuple[torch.Size, torch.dtype]], loop: Loop) -> Iterator[tuple[str, Tensor]]:
    """Empty tensors to read into, each cut as what it is for."""
    weights = model_tensors(loop.task.model)
    parameters = [parameters_of(optimizer) for optimizer in loop.optimizers]
    for saved, (shape, dtype) in kinds.items():
        kind, _, name = saved.removeprefix(_NUMBER).partition(".")
        owner: Tensor | None = None
        if kind == "model":
            owner = weights.get(name)
        elif kind == "optimizer":
            number, index, _ = name.split(".", 2)
            owner = parameters[int(number)][int(index)]
        elif kind == "basis" and loop.basis is not None:
            owner = owner_of(name, loop.basis)
        else:
            continue  # weights that count, directions that this run has no use for, random state
        if owner is not None and owner.shape == shape:
            yield saved, like(owner, torch.empty_like(local_of(owner), dtype=dtype))
        elif kind == "basis" and owner is not None:
            raise ValueError(f"{saved} is {list(shape)}, its parameter {list(owner.shape)}")
        else:
            yield saved, torch.empty(shape, dtype=dtype)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[-200:]
