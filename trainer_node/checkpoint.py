"""Saves and restores a run: weights, optimizer state, basis, RNG, progress, ledger.

A checkpoint is a sealed folder (common/sealed_folder.py) of safetensors and JSON; nothing in it is
ever executed. A step is captured whole before the next one begins, in a buffer (checkpoint_buffer.py) or
straight in files; a process writes, hashes, fsyncs and renames (common/folder_process.py), one folder at a
time, and if it is killed this one does. Data order needs no state: it is a function of seed and step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import sealed_folder
from common.errors import SENSELESS, CheckpointError, EnvironmentFault
from common.folder_job import FilePart, FolderDone, FolderJob, carry_out
from common.folder_process import FolderProcess, WriterGone
from common.messages import CheckpointWritten, MemoryAction
from trainer_node.checkpoint_buffer import CheckpointBuffer, NoHostMemory
from trainer_node.checkpoint_content import (
    READ_OUT,
    STATE_VERSION,
    Content,
    check_optimizer_state,
    check_same_model,
    contiguous,
    facts_of,
    files_of,
    load_optimizers,
    model_tensors,
    parameter_table,
    table_of,
    unreadable,
)
from trainer_node.loop import Loop
from trainer_node.memory_orders import put_in_force
from trainer_node.memory_state import MemoryState, memory_state_from_json
from trainer_node.progress import Progress, progress_from_json
from trainer_node.snapshot import set_random_state
from trainer_node.strict_json import with_nan


class Checkpoints:
    """Writes the checkpoints of one run and keeps the newest, the best and the last emergency one."""

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        on_failure: Callable[[str], None],
        buffer: CheckpointBuffer | None = None,
        has_process: bool = False,
    ) -> None:
        """Without `buffer` the training thread writes the files; without a process a thread does the rest."""
        self._root, self._keep, self._on_failure = root, keep, on_failure
        self._buffer = buffer
        self._process = FolderProcess(None if buffer is None else buffer.descriptor) if has_process else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self.best_name = ""
        self._best_on_disk = ""
        self.last_failed = False  # the newest attempt left nothing behind
        # As they were found after the last checkpoint; None = not known yet.
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
            parts = self._capture(name, partial(files_of, loop, housekeeping, read_out))
        except (EnvironmentFault, OSError, SafetensorError) as error:
            self._fail(
                name, f"checkpoint {name} was not saved: {error}; free some space, older ones are intact"
            )
            return None
        facts = facts_of(loop)
        self.last_failed = False
        self._in_flight = self._thread.submit(
            self._make_durable,
            FolderJob(
                root=str(self._root.absolute()),
                name=name,
                facts=facts,
                keep=self._keep,
                best_name=self.best_name,
                parts=parts,
            ),
        )
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
        """Until the newest is durable, or is known not to be."""
        if self._in_flight is not None:
            self._in_flight.result()
            self._in_flight = None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        if self._process is not None:
            self._process.close()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _capture(self, name: str, files: Callable[[], Iterator[tuple[str, Content]]]) -> tuple[FilePart, ...]:
        """Into the buffer, or where it is too large for that, now and for good, into the temporary folder."""
        if self._buffer is not None:
            try:
                return self._buffer.hold(files())
            except NoHostMemory:
                self._buffer.close()
                self._buffer = None
                if self._process is not None:
                    self._process.close()
                    self._process = FolderProcess(None)
        temporary = sealed_folder.begin(self._root, name)
        for file_name, content in files():
            if isinstance(content, bytes):
                (temporary / file_name).write_bytes(content)
            else:
                save_file(contiguous(content), temporary / file_name)
        return ()

    def _make_durable(self, job: FolderJob) -> None:
        """In the thread: a disk that hangs must not stop a step."""
        try:
            done = self._carry_out(job)
        except EnvironmentFault as error:
            self._fail(job.name, str(error))
            return
        self._best_on_disk = job.best_name
        self.newest_bytes, self.free_bytes = done.num_bytes, done.free_bytes
        if done.damaged:
            self._on_failure(done.damaged)

    def _carry_out(self, job: FolderJob) -> FolderDone:
        if self._process is not None:
            try:
                return self._process.carry_out(job)
            except WriterGone as error:
                self._on_failure(f"{error}; the trainer writes {job.name} itself, the next has a new writer")
        return carry_out(job, None if self._buffer is None else self._buffer.descriptor)

    def _fail(self, name: str, text: str) -> None:
        self.last_failed = True
        if self.best_name == name:
            self.best_name = self._best_on_disk  # which retention must go on keeping
        self._on_failure(text)


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
        tensors = {
            name: load_file(folder / f"{name}.safetensors")
            for name in ("model", "optimizer", "basis", "random")
            if (folder / f"{name}.safetensors").exists()
        }
        if state["version"] != STATE_VERSION:
            raise CheckpointError(f"{folder}: state version {state['version']} is not {STATE_VERSION}")
        for table in (state["parameters"], table_of(tensors["model"])):
            check_same_model(folder, table, parameter_table(loop.task.model))
        check_optimizer_state(tensors["optimizer"], loop.optimizers)
        return Saved(
            tensors=tensors,
            progress=progress_from_json(state["progress"], loop.rules),
            optimizer_values=state["optimizer_values"],
            ledger=state["ledger"],
            housekeeping=dict(state["housekeeping"]),
            memory=memory_state_from_json(state.get("memory", {})),
        )
    except (OSError, SafetensorError, *SENSELESS) as error:
        raise unreadable(folder, error) from None


def load_weights(folder: Path, model: nn.Module) -> int:
    """Weights that count, for sampling; returns the step. Raises CheckpointError."""
    manifest = sealed_folder.verify(folder)
    try:
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
    # Directions that were given up when this was written, and are there now, begin anew.
    is_basis_fresh = loop.basis is not None and MemoryAction.PREDICTION_OFF in saved.memory.in_force
    if loop.basis is not None and not is_basis_fresh:
        loop.prediction.form(saved.memory)
        if table_of(loop.basis.tensors()) != table_of(tensors.get("basis", {})):
            loop.prediction.form(loop.memory)
            raise CheckpointError(
                f"{folder}: was written with another [trainer.basis]; resume with its config.toml"
            )
    set_random_state(dict(tensors["random"]), loop.task.device)
    for name, tensor in model_tensors(loop.task.model).items():
        tensor.copy_(tensors["model"][name])
    load_optimizers(loop.optimizers, tensors["optimizer"], saved.optimizer_values)
    if is_basis_fresh:
        loop.prediction.renew(saved.progress.phase)
    elif loop.basis is not None:
        loop.basis.load(tensors["basis"])
        loop.prediction.form(loop.memory)
