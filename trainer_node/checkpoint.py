"""Saves and restores a run: weights, optimizer state, basis, RNG, progress, ledger.

A checkpoint is a sealed folder (common/sealed_folder.py) of safetensors and JSON; nothing in it is
ever executed. Tensors are written straight from where they are, without a copy in process memory;
hashing, fsync and renaming go on in a thread, one folder at a time. Data order needs no state: it
is a function of seed and step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import sealed_folder
from common.errors import CheckpointError, EnvironmentFault
from common.messages import CheckpointWritten
from trainer_node.fingerprint import fingerprint
from trainer_node.groups import dtype_name
from trainer_node.loop import Loop
from trainer_node.progress import progress_from_json
from trainer_node.snapshot import random_state, set_random_state

STATE_VERSION = 3
READ_OUT = "read_out.safetensors"  # parameters; buffers are those of model.safetensors


class Checkpoints:
    """Writes the checkpoints of one run and keeps the newest, the best and the last emergency one."""

    def __init__(self, root: Path, *, keep: int, on_failure: Callable[[str], None]) -> None:
        self._root, self._keep, self._on_failure = root, keep, on_failure
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self.best_name = ""
        self.last_failed = False  # the newest attempt left nothing behind

    def save(
        self,
        loop: Loop,
        housekeeping: Mapping[str, Any],
        *,
        emergency: bool,
        read_out: Mapping[str, Tensor] | None = None,
    ) -> CheckpointWritten | None:
        """Capture the state now, make it durable in the background. None (and a report) if it failed.

        `read_out` are the parameters that count where they are not the loop's own: for use, not for resuming.
        """
        self.wait()
        name = sealed_folder.folder_name(loop.progress.step, loop.generation, emergency=emergency)
        try:
            temporary = sealed_folder.begin(self._root, name)
            facts = _write(temporary, loop, housekeeping)
            if read_out is not None:
                save_file(_contiguous(read_out), temporary / READ_OUT)
        except (EnvironmentFault, OSError, SafetensorError) as error:
            self._fail(f"checkpoint {name} was not saved: {error}; free some space, older ones are intact")
            return None
        self.last_failed = False
        self._in_flight = self._thread.submit(self._seal, temporary, facts)
        return CheckpointWritten(
            name=name,
            step=loop.progress.step,
            attempt=loop.progress.attempt,
            emergency=emergency,
            fingerprint=facts["fingerprint"],
        )

    def wait(self) -> None:
        if self._in_flight is not None:
            self._in_flight.result()
            self._in_flight = None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _seal(self, temporary: Path, facts: dict[str, Any]) -> None:
        try:
            sealed_folder.seal(temporary, facts)
        except EnvironmentFault as error:
            self._fail(str(error))
            return
        for folder in _superfluous(sealed_folder.folders(self._root), self._keep, self.best_name):
            sealed_folder.remove(folder)

    def _fail(self, text: str) -> None:
        self.last_failed = True
        self._on_failure(text)


def _superfluous(newest_first: Sequence[Path], keep: int, best_name: str) -> list[Path]:
    ordinary = [f for f in newest_first if not sealed_folder.is_emergency(f.name)]
    emergencies = [f for f in newest_first if sealed_folder.is_emergency(f.name)]
    return [f for f in ordinary[keep:] + emergencies[1:] if f.name != best_name]


def _write(folder: Path, loop: Loop, housekeeping: Mapping[str, Any]) -> dict[str, Any]:
    model, progress = loop.task.model, loop.progress
    save_file(_model_tensors(model), folder / "model.safetensors")
    optimizer_tensors, optimizer_values = _optimizer_state(loop.optimizers)
    save_file(optimizer_tensors, folder / "optimizer.safetensors")
    if loop.basis is not None:
        save_file(_contiguous(loop.basis.tensors()), folder / "basis.safetensors")
    save_file(random_state(loop.task.device), folder / "random.safetensors")
    state = {
        "version": STATE_VERSION,
        "generation": loop.generation,
        "parameters": parameter_table(model),
        "optimizer_values": optimizer_values,
        "progress": progress.to_json(),
        "ledger": loop.ledger.to_json(),
        "housekeeping": dict(housekeeping),
    }
    (folder / "state.json").write_text(json.dumps(_nan_safe(state), sort_keys=True), encoding="utf-8")
    weights = fingerprint(p for p in model.parameters() if p.requires_grad)
    return {"step": progress.step, "generation": loop.generation, "fingerprint": weights}


def load(folder: Path, loop: Loop) -> dict[str, Any]:
    """Put a verified checkpoint into the loop; returns the housekeeping values.

    Raises CheckpointError before anything is changed if the folder is damaged or of another model.
    """
    sealed_folder.verify(folder)
    try:
        state = _from_nan_safe(json.loads((folder / "state.json").read_text(encoding="utf-8")))
        tensors = {
            name: load_file(folder / f"{name}.safetensors")
            for name in ("model", "optimizer", "basis", "random")
            if (folder / f"{name}.safetensors").exists()
        }
        if state["version"] != STATE_VERSION:
            raise CheckpointError(f"{folder}: state version {state['version']} is not {STATE_VERSION}")
        _check_same_model(folder, state["parameters"], parameter_table(loop.task.model))
        progress = progress_from_json(state["progress"], loop.rules)
        optimizer_values, housekeeping = state["optimizer_values"], state["housekeeping"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); use an older checkpoint") from None
    _load_tensors(loop, tensors, optimizer_values, folder)
    loop.ledger.load(state["ledger"])
    loop.progress = progress
    return dict(housekeeping)


def load_weights(folder: Path, model: nn.Module) -> int:
    """Weights that count, for sampling; returns the step. Raises CheckpointError."""
    manifest = sealed_folder.verify(folder)
    try:
        found = load_file(folder / "model.safetensors")
        if (folder / READ_OUT).exists():
            found.update(load_file(folder / READ_OUT))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); use an older checkpoint") from None
    table = {name: [list(t.shape), dtype_name(t.dtype)] for name, t in found.items()}
    _check_same_model(folder, table, parameter_table(model))
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            tensor.copy_(found[name])
    return int(manifest["step"])


@torch.no_grad()
def _load_tensors(
    loop: Loop, tensors: Mapping[str, Mapping[str, Tensor]], values: dict[str, Any], folder: Path
) -> None:
    if loop.basis is not None:
        mine, saved = loop.basis.tensors(), tensors.get("basis", {})
        if {n: (t.shape, t.dtype) for n, t in mine.items()} != {
            n: (t.shape, t.dtype) for n, t in saved.items()
        }:
            raise CheckpointError(
                f"{folder}: was written with another [trainer.basis]; resume with its config.toml"
            )
    for name, tensor in _model_tensors(loop.task.model).items():
        tensor.copy_(tensors["model"][name])
    _load_optimizers(loop.optimizers, tensors["optimizer"], values)
    if loop.basis is not None:
        loop.basis.load(tensors["basis"])
    set_random_state(dict(tensors["random"]), loop.task.device)


def parameter_table(model: nn.Module) -> dict[str, list[Any]]:
    """Name -> [shape, dtype] of everything that a checkpoint of this model holds."""
    return {name: [list(t.shape), dtype_name(t.dtype)] for name, t in _model_tensors(model).items()}


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers, contiguous as they are."""
    persistent = model.state_dict(keep_vars=True)
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {name: t.detach() for name, t in {**dict(model.named_parameters()), **buffers}.items()}


def _check_same_model(folder: Path, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    if saved == mine:
        return
    different = sorted(n for n in {*saved, *mine} if saved.get(n) != mine.get(n))
    name = different[0]
    raise CheckpointError(
        f"{folder}: is of another model: {name} is {saved.get(name, 'missing')} there and"
        f" {mine.get(name, 'missing')} here; use the config.toml of its run"
    )


def _optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                place = tensors if isinstance(value, Tensor) else values
                place[f"{number}.{index}.{key}"] = value
    return _contiguous(tensors), values


def _load_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in {**tensors, **values}.items():
        number, index, key = name.split(".", 2)
        states[int(number)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().contiguous() for name, t in tensors.items()}


def _nan_safe(value: Any) -> Any:
    """JSON has no NaN or infinity; they are written as {"float": "nan"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, dict):
        return {key: _nan_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_safe(item) for item in value]
    return value


def _from_nan_safe(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {key: _from_nan_safe(item) for key, item in value.items()}
    return [_from_nan_safe(item) for item in value] if isinstance(value, list) else value
