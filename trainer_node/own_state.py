"""The state of Hybrid between two steps, as tensors, numbers and strings, and back.

Model, optimizers, data and random state are the loop's to save; the predictor keeps its own under the same
name. Reads nothing that was pickled: torch.load(weights_only=True) is enough for what is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import sealed_folder
from common.errors import CheckpointError
from trainer_node.cycle import Cycle
from trainer_node.memory_orders import put_in_force
from trainer_node.memory_state import memory_state_from_json
from trainer_node.progress import progress_from_json

VERSION = 1


def state_of(loop: Cycle, name: str, weights: str) -> dict[str, Any]:
    """`name` is that of the predictor's state of this moment, `weights` their fingerprint."""
    return {
        "version": VERSION,
        "name": name,
        "weights": weights,
        "progress": loop.progress.to_json(),
        "ledger": loop.ledger.to_json(),
        "memory": loop.memory.to_json(),
        "basis": {key: tensor.detach().cpu().clone() for key, tensor in loop.basis.tensors().items()}
        if loop.basis is not None
        else {},
    }


def read_state(loop: Cycle, state: Mapping[str, Any], weights: str) -> str:
    """Put it into a fresh loop; returns its name.

    Raises CheckpointError, and KeyError, TypeError or ValueError for a damaged one: everything is looked at
    before anything changes.
    """
    if state["version"] != VERSION:
        raise CheckpointError(f"a state of version {state['version']}, this release reads {VERSION}")
    if state["weights"] != weights:
        raise CheckpointError("the weights are not those of this state: load model and optimizers first")
    sealed_folder.age_key(state["name"])
    progress = progress_from_json(dict(state["progress"]), loop.rules)
    memory = memory_state_from_json(state["memory"])
    basis, saved = loop.basis, state["basis"]
    if basis is not None and saved:
        mine = {key: (tensor.shape, tensor.dtype) for key, tensor in basis.tensors().items()}
        if mine != {key: (tensor.shape, tensor.dtype) for key, tensor in saved.items()}:
            raise CheckpointError("the directions are of another model or basis: use that run's settings")
    loop.ledger.load(dict(state["ledger"]))
    put_in_force(loop, memory)
    loop.progress = progress
    if loop.basis is not None and saved:
        loop.basis.load(saved)
    return str(state["name"])
