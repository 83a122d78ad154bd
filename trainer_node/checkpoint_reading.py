"""Reads a checkpoint back: verified first, checked against this run, then put in place. Writes no file.

One folder serves any number of ranks: of whole copies all ranks read the same files, of shards each reads its
own part (sharded_checkpoint.py), also where another number of ranks wrote them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common import sealed_folder
from common.control_rules import any_on
from common.errors import SENSELESS, CheckpointError
from common.messages import MemoryAction
from trainer_node import sharded_checkpoint
from trainer_node.checkpoint_content import (
    READ_OUT,
    STATE_VERSION,
    check_optimizer_state,
    check_same_model,
    load_optimizers,
    model_tensors,
    parameter_table,
    table_of,
    unreadable,
)
from trainer_node.controls import as_allowed, check_place
from trainer_node.loop import Loop
from trainer_node.memory_orders import put_in_force
from trainer_node.memory_state import MemoryState, memory_state_from_json
from trainer_node.progress import Progress, progress_from_json
from trainer_node.random_states import put_random_state
from trainer_node.strict_json import with_nan


@dataclass(frozen=True, slots=True)
class Saved:
    """What a verified folder holds, on the host; of what is cut among ranks, this rank's part."""

    tensors: dict[str, dict[str, Tensor]]
    progress: Progress
    optimizer_values: dict[str, Any]
    ledger: dict[str, Any]
    housekeeping: dict[str, Any]
    memory: MemoryState


def load(folder: Path, loop: Loop) -> dict[str, Any]:
    """Put a verified checkpoint into a fresh loop; returns the housekeeping values.

    Raises CheckpointError, before anything is changed if the folder is damaged or of another model.
    """
    saved = read(folder, loop)
    try:
        put_in_force(loop, saved.memory)
        put_tensors(loop, saved, folder)
        loop.ledger.load(saved.ledger)
    except torch.OutOfMemoryError:
        raise
    except SENSELESS as error:  # whole by its digests, yet written by something else than a trainer
        raise unreadable(folder, error) from None
    loop.progress = saved.progress
    return saved.housekeeping


def read(folder: Path, loop: Loop) -> Saved:
    """Changes nothing. Raises CheckpointError if the folder is damaged or of another model."""
    sealed_folder.verify(folder)
    try:
        state = with_nan(json.loads((folder / "state.json").read_text(encoding="utf-8")))
        if state["version"] != STATE_VERSION:
            raise CheckpointError(f"{folder}: state version {state['version']} is not {STATE_VERSION}")
        if state.get("packing", "stream") != loop.settings.data.packing:
            raise CheckpointError(
                f"{folder}: was written with another trainer.data.packing; resume with its config.toml"
            )
        tensors = _tensors(folder, loop)
        for table in (state["parameters"], table_of(tensors["model"])):
            check_same_model(folder, table, parameter_table(loop.task.model))
        check_optimizer_state(tensors["optimizer"], loop.optimizers)
        return Saved(
            tensors=tensors,
            progress=_progress(folder, state["progress"], loop),
            optimizer_values=state["optimizer_values"],
            ledger=state["ledger"],
            housekeeping=dict(state["housekeeping"]),
            memory=memory_state_from_json(state.get("memory", {})),
        )
    except (OSError, SafetensorError, *SENSELESS) as error:
        raise unreadable(folder, error) from None


def _progress(folder: Path, values: dict[str, Any], loop: Loop) -> Progress:
    """Its controls under today's switches. Raises CheckpointError where they or the clock do not fit."""
    progress = progress_from_json(values, loop.rules)
    try:
        progress.controls = as_allowed(progress.controls, loop.settings)
        for steps in (progress.clock, progress.data_step):
            check_place(steps, loop.settings, loop.task.split.ranks.size)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: {error}; resume with the [trainer.controls], the batch and the number of ranks"
            " of its run"
        ) from None
    return progress


def _tensors(folder: Path, loop: Loop) -> dict[str, dict[str, Tensor]]:
    """By kind (model, optimizer, basis, random) and name."""
    if sharded_checkpoint.is_sharded(folder):
        random = load_file(folder / "random.safetensors")
        return {**sharded_checkpoint.read_state(folder, loop), "random": random}
    if loop.task.split.is_sharded:
        raise CheckpointError(
            f"{folder}: was written whole, not in shards; resume it with trainer.parallel.kind = ddp"
        )
    return {
        name: load_file(folder / f"{name}.safetensors")
        for name in ("model", "optimizer", "basis", "random")
        if (folder / f"{name}.safetensors").exists()
    }


def load_weights(folder: Path, model: nn.Module) -> int:
    """Weights that count, for sampling; returns the step. Raises CheckpointError."""
    manifest = sealed_folder.verify(folder)
    try:
        if sharded_checkpoint.is_sharded(folder):
            found = sharded_checkpoint.read_weights(folder, model_tensors(model))
        else:
            found = load_file(folder / "model.safetensors")
            if (folder / READ_OUT).exists():
                found.update(load_file(folder / READ_OUT))
    except (OSError, SafetensorError, *SENSELESS) as error:
        raise unreadable(folder, error) from None
    check_same_model(folder, table_of(found), parameter_table(model))
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            tensor.copy_(found[name])
    return int(manifest["step"])


@torch.no_grad()
def put_tensors(loop: Loop, saved: Saved, folder: Path) -> None:
    """Weights, optimizers, basis and random state. Raises CheckpointError for another basis, at once."""
    tensors = saved.tensors
    # Directions that were given up when this was written, and are there now, begin anew. So do those of a run
    # that kept none (too short for a jump) and was given controls since.
    was_given_controls = any_on(loop.settings.controls) and not tensors.get("basis")
    had_none = MemoryAction.PREDICTION_OFF in saved.memory.in_force or was_given_controls
    is_basis_fresh = loop.basis is not None and had_none
    if loop.basis is not None and not is_basis_fresh:
        loop.prediction.form(saved.memory)
        if table_of(loop.basis.tensors()) != table_of(tensors.get("basis", {})):
            loop.prediction.form(loop.memory)
            raise CheckpointError(
                f"{folder}: was written with another [trainer.basis]; resume with its config.toml"
            )
    put_random_state(tensors["random"], loop.task.split.ranks, loop.task.device)
    for name, tensor in model_tensors(loop.task.model).items():
        tensor.copy_(tensors["model"][name])
    load_optimizers(loop.optimizers, tensors["optimizer"], saved.optimizer_values)
    if is_basis_fresh:
        loop.prediction.renew(saved.progress.phase)
    elif loop.basis is not None:
        loop.basis.load(tensors["basis"])
        loop.prediction.form(loop.memory)
