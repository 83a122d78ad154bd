"""Saves and restores a run: weights, optimizer state, basis, RNG, progress, ledger.

A checkpoint is a sealed folder (common/sealed_folder.py) of safetensors and JSON; nothing in it is
ever executed. Tensors are written straight from where they are, without a copy in process memory;
hashing, fsync and renaming go on in a thread, one folder at a time. Data order needs no state: it
is a function of seed and step.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import sealed_folder
from common.errors import CheckpointError, EnvironmentFault
from common.messages import CheckpointWritten, MemoryAction
from trainer_node.fingerprint import fingerprint
from trainer_node.groups import dtype_name
from trainer_node.loop import Loop
from trainer_node.memory_orders import put_in_force
from trainer_node.memory_state import MemoryState, memory_state_from_json
from trainer_node.progress import Progress, progress_from_json
from trainer_node.snapshot import random_state, set_random_state
from trainer_node.strict_json import with_nan, without_nan

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
        # As the thread found them after the last checkpoint; None = not known yet.
        self.newest_bytes: int | None = None
        self.free_bytes: int | None = None

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

    def saved_until(self, step: int) -> list[Path]:
        """Whole folders of this run that hold at most `step` steps, newest first."""
        self.wait()
        return [f for f in sealed_folder.folders(self._root) if sealed_folder.age_key(f.name)[1] <= step]

    def forget_newer(self, than: Path) -> None:
        """A run that was set back must not be resumed from what it left behind."""
        self.wait()
        found = sealed_folder.folders(self._root)
        for folder in found[: found.index(than)]:
            sealed_folder.remove(folder)

    def wait(self) -> None:
        if self._in_flight is not None:
            self._in_flight.result()
            self._in_flight = None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _seal(self, temporary: Path, facts: dict[str, Any]) -> None:
        try:
            sealed = sealed_folder.seal(temporary, facts)
        except EnvironmentFault as error:
            self._fail(str(error))
            return
        for folder in _superfluous(sealed_folder.folders(self._root), self._keep, self.best_name):
            sealed_folder.remove(folder)
        self._measure_disk(sealed)

    def _measure_disk(self, sealed: Path) -> None:
        """Here, in the thread: a disk that hangs must not stop a step."""
        with contextlib.suppress(OSError):
            self.newest_bytes = sum(path.stat().st_size for path in sealed.iterdir())
            self.free_bytes = shutil.disk_usage(self._root).free

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
        "memory": loop.memory.to_json(),
    }
    (folder / "state.json").write_text(json.dumps(without_nan(state), sort_keys=True), encoding="utf-8")
    # On the host: its sums would take a few MiB of a device that may have none left.
    weights = fingerprint(p.detach().cpu() for p in model.parameters() if p.requires_grad)
    return {"step": progress.step, "generation": loop.generation, "fingerprint": weights}


@dataclass(frozen=True, slots=True)
class Saved:
    """What a verified folder holds, on the host."""

    tensors: dict[str, dict[str, Tensor]]
    progress: Progress
    optimizer_values: dict[str, Any]
    ledger: dict[str, Any]
    housekeeping: dict[str, Any]
    memory: MemoryState


def load(folder: Path, loop: Loop) -> dict[str, Any]:
    """Put a verified checkpoint into a fresh loop; returns the housekeeping values.

    Raises CheckpointError before anything is changed if the folder is damaged or of another model.
    """
    saved = read(folder, loop)
    put_in_force(loop, saved.memory)
    put_tensors(loop, saved, folder)
    loop.ledger.load(saved.ledger)
    loop.progress = saved.progress
    return saved.housekeeping


def read(folder: Path, loop: Loop) -> Saved:
    """Changes nothing. Raises CheckpointError if the folder is damaged or of another model."""
    sealed_folder.verify(folder)
    try:
        state = with_nan(json.loads((folder / "state.json").read_text(encoding="utf-8")))
        tensors = {
            name: load_file(folder / f"{name}.safetensors")
            for name in ("model", "optimizer", "basis", "random")
            if (folder / f"{name}.safetensors").exists()
        }
        if state["version"] != STATE_VERSION:
            raise CheckpointError(f"{folder}: state version {state['version']} is not {STATE_VERSION}")
        _check_same_model(folder, state["parameters"], parameter_table(loop.task.model))
        return Saved(
            tensors=tensors,
            progress=progress_from_json(state["progress"], loop.rules),
            optimizer_values=state["optimizer_values"],
            ledger=state["ledger"],
            housekeeping=dict(state["housekeeping"]),
            memory=memory_state_from_json(state.get("memory", {})),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); use an older checkpoint") from None


def load_weights(folder: Path, model: nn.Module) -> int:
    """Weights that count, for sampling; returns the step. Raises CheckpointError."""
    manifest = sealed_folder.verify(folder)
    try:
        found = load_file(folder / "model.safetensors")
        if (folder / READ_OUT).exists():
            found.update(load_file(folder / READ_OUT))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); use an older checkpoint") from None
    _check_same_model(folder, _table(found), parameter_table(model))
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            tensor.copy_(found[name])
    return int(manifest["step"])


@torch.no_grad()
def put_tensors(loop: Loop, saved: Saved, folder: Path) -> None:
    """Weights, optimizers, basis and random state. Raises CheckpointError for another basis, at once."""
    tensors = saved.tensors
    # Directions that were given up when this was written, and are there now, begin anew.
    is_basis_fresh = loop.basis is not None and MemoryAction.PREDICTION_OFF in saved.memory.in_force
    if loop.basis is not None and not is_basis_fresh:
        loop.prediction.form(saved.memory)
        if _table(loop.basis.tensors()) != _table(tensors.get("basis", {})):
            loop.prediction.form(loop.memory)
            raise CheckpointError(
                f"{folder}: was written with another [trainer.basis]; resume with its config.toml"
            )
    for name, tensor in _model_tensors(loop.task.model).items():
        tensor.copy_(tensors["model"][name])
    _load_optimizers(loop.optimizers, tensors["optimizer"], saved.optimizer_values)
    if is_basis_fresh:
        loop.prediction.renew(saved.progress.phase)
    elif loop.basis is not None:
        loop.basis.load(tensors["basis"])
        loop.prediction.form(loop.memory)
    set_random_state(dict(tensors["random"]), loop.task.device)


def parameter_table(model: nn.Module) -> dict[str, list[Any]]:
    """Name -> [shape, dtype] of everything that a checkpoint of this model holds."""
    return _table(_model_tensors(model))


def _table(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [list(t.shape), dtype_name(t.dtype)] for name, t in tensors.items()}


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
        optimizer.state.clear()  # before the new one is allocated: a device may not hold both
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without a copy, or with one on the host: an emergency checkpoint allocates nothing on the device."""
    return {n: t.detach() if t.is_contiguous() else t.detach().cpu().contiguous() for n, t in tensors.items()}
