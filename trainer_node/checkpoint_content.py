"""What is in a checkpoint: files by name, tensors out of model and optimizers and back. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError
from trainer_node.fingerprint import fingerprint
from trainer_node.groups import dtype_name
from trainer_node.loop import Loop
from trainer_node.optim.state import check_state
from trainer_node.snapshot import random_state
from trainer_node.split import local_of
from trainer_node.strict_json import without_nan

STATE_VERSION = 3
READ_OUT = "read_out.safetensors"  # parameters; buffers are those of model.safetensors

Content = bytes | Mapping[str, Tensor]


def files_of(
    loop: Loop,
    housekeeping: Mapping[str, Any],
    read_out: Mapping[str, Tensor] | None,
    random: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Content]]:
    """One after the other, so that what has to be read for one is gone before the next."""
    optimizer_tensors, _ = optimizer_state(loop.optimizers)
    yield "model.safetensors", model_tensors(loop.task.model)
    yield "optimizer.safetensors", optimizer_tensors
    if loop.basis is not None:
        yield "basis.safetensors", loop.basis.tensors()
    yield from files_beside_tensors(loop, housekeeping, random)
    if read_out is not None:
        yield READ_OUT, read_out


def files_beside_tensors(
    loop: Loop, housekeeping: Mapping[str, Any], random: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Content]]:
    """`random` is the random state of all ranks; None: that of this process."""
    yield "random.safetensors", random_state(loop.task.device) if random is None else random
    state = {
        "version": STATE_VERSION,
        "generation": loop.generation,
        "parameters": parameter_table(loop.task.model),
        "optimizer_values": {n: v for n, v in state_entries(loop.optimizers) if not isinstance(v, Tensor)},
        "progress": loop.progress.to_json(),
        "ledger": loop.ledger.to_json(),
        "housekeeping": dict(housekeeping),
        "memory": loop.memory.to_json(),
        "packing": loop.settings.data.packing,
    }
    yield "state.json", json.dumps(without_nan(state), sort_keys=True).encode()


def facts_of(loop: Loop) -> dict[str, Any]:
    """For the manifest. A collective where parameters are cut among ranks."""
    # On the host: its sums would take a few MiB of a device that may have none left.
    held = (local_of(p).detach().cpu() for p in loop.task.model.parameters() if p.requires_grad)
    split = loop.task.split
    weights = split.fingerprint(held) if split.is_sharded else fingerprint(held)
    return {"step": loop.progress.step, "generation": loop.generation, "fingerprint": weights}


def parameter_table(model: nn.Module) -> dict[str, list[Any]]:
    """Name -> [shape, dtype] of everything that a checkpoint of this model holds."""
    return table_of(model_tensors(model))


def table_of(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Name -> [shape, dtype]."""
    return {name: [list(t.shape), dtype_name(t.dtype)] for name, t in tensors.items()}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers, contiguous as they are."""
    persistent = model.state_dict(keep_vars=True)
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {name: t.detach() for name, t in {**dict(model.named_parameters()), **buffers}.items()}


def check_same_model(folder: Path, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises CheckpointError that names the first difference."""
    if saved == mine:
        return
    different = sorted(n for n in {*saved, *mine} if saved.get(n) != mine.get(n))
    name = different[0]
    raise CheckpointError(
        f"{folder}: is of another model: {name} is {saved.get(name, 'missing')} there and"
        f" {mine.get(name, 'missing')} here; use the config.toml of its run"
    )


def optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and other values of the state, by `optimizer.parameter.key`."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in state_entries(optimizers):
        if isinstance(value, Tensor):
            # One table of bitsandbytes serves all parameters; a file of tensors holds none twice.
            is_shared = value.numel() > 0 and value.data_ptr() in seen
            seen.add(value.data_ptr())
            tensors[name] = value.detach().cpu().clone() if is_shared else value
        else:
            values[name] = value
    return contiguous(tensors), values


def state_entries(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, Any]]:
    """As they are kept: not by `state_dict`, in which bitsandbytes hides its 8-bit moments."""
    for number, optimizer in enumerate(optimizers):
        for index, parameter in enumerate(parameters_of(optimizer)):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{number}.{index}.{key}", value


def check_optimizer_state(tensors: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Every tensor has the shape that it must have. Raises ValueError, IndexError, KeyError."""
    entries: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, index, key = name.split(".", 2)
        entries.setdefault((int(number), int(index)), {})[key] = tensor
    parameters = [parameters_of(optimizer) for optimizer in optimizers]
    for (number, index), found in entries.items():
        check_state(parameters[number][index], found)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of `state_dict`'s indices."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def load_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """The reverse of `optimizer_state`."""
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in {**tensors, **values}.items():
        number, index, key = name.split(".", 2)
        states[int(number)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.state.clear()  # before the new one is allocated: a device may not hold both
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without a copy, or with one on the host: an emergency checkpoint allocates nothing on the device."""
    return {n: t.detach() if t.is_contiguous() else t.detach().cpu().contiguous() for n, t in tensors.items()}


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    words = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{folder}: cannot be read ({type(error).__name__}: {words}); use an older checkpoint"
    )
