"""A state of tensors, numbers, strings, lists and mappings as one safetensors file. Nothing is pickled.

The tree is JSON in the file's metadata; a tensor in it is the mapping {"tensor": its name}. Tuples come back
as lists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import CheckpointError

TREE, MARK = "tree", "tensor"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises OSError, and TypeError for what is none of these things."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_without_tensors(state, tensors))
    unfinished = path.with_name(f".{path.name}")
    save_file(tensors, unfinished, metadata={TREE: tree})
    os.replace(unfinished, path)


def read_state(path: Path) -> Any:
    """On the host. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            tree = json.loads((file.metadata() or {})[TREE])
        return _with_tensors(tree, tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no state of prediction: {error!r}"[:300]) from None


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # no two may share their memory
        return {MARK: name}
    if isinstance(value, Mapping):
        return {key: _without_tensors(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(entry, tensors) for entry in value]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {MARK}:
            return tensors[value[MARK]]
        return {key: _with_tensors(entry, tensors) for key, entry in value.items()}
    return [_with_tensors(entry, tensors) for entry in value] if isinstance(value, list) else value
