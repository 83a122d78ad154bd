"""Saves a run: weights, optimizer state, basis, RNG, progress, ledger. checkpoint_reading.py restores it.

A checkpoint is a sealed folder (common/sealed_folder.py) of safetensors and JSON; nothing in it is
ever executed. A step is captured whole before the next one begins, in a buffer (checkpoint_buffer.py) or
straight in files; a process writes, hashes, fsyncs and renames (common/folder_process.py), one folder at a
time, and if it is killed this one does. Data order needs no state: it is a function of seed and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common import sealed_folder
from common.errors import EnvironmentFault
from common.folder_job import FilePart, FolderDone, FolderJob, carry_out
from common.folder_process import FolderProcess, WriterGone
from common.messages import CheckpointWritten
from trainer_node.checkpoint_buffer import CheckpointBuffer, NoHostMemory
from trainer_node.checkpoint_content import (
    Content,
    contiguous,
    facts_of,
    files_beside_tensors,
    files_of,
)
from trainer_node.checkpoint_reading import load as load
from trainer_node.checkpoint_reading import load_weights as load_weights
from trainer_node.loop import Loop


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
        random: Mapping[str, Tensor] | None = None,
    ) -> CheckpointWritten | None:
        """Capture the state now, make it durable in the background. None (and a report) if it failed.

        `read_out` are the parameters that count where they are not the loop's own: for use, not for resuming.
        `random` is the random state of all ranks; default: that of this process.
        """
        self.wait()
        name = sealed_folder.folder_name(loop.progress.step, loop.generation, emergency=emergency)
        try:
            parts = self._capture(name, partial(files_of, loop, housekeeping, read_out, random))
        except (EnvironmentFault, OSError, SafetensorError) as error:
            return self.failed(name, str(error))
        return self._hand_over(loop, name, facts_of(loop), parts, emergency=emergency)

    def seal(
        self,
        loop: Loop,
        housekeeping: Mapping[str, Any],
        *,
        name: str,
        facts: dict[str, Any],
        emergency: bool,
        random: Mapping[str, Tensor],
    ) -> CheckpointWritten | None:
        """The same where all tensors lie in the temporary folder already, written by the ranks."""
        try:
            self._write(name, files_beside_tensors(loop, housekeeping, random))
        except (OSError, SafetensorError) as error:
            return self.failed(name, str(error))
        return self._hand_over(loop, name, facts, (), emergency=emergency)

    def failed(self, name: str, why: str) -> None:
        self._fail(name, f"checkpoint {name} was not saved: {why}; free some space, older ones are intact")

    def _hand_over(
        self, loop: Loop, name: str, facts: dict[str, Any], parts: tuple[FilePart, ...], *, emergency: bool
    ) -> CheckpointWritten:
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
        sealed_folder.begin(self._root, name)
        self._write(name, files())
        return ()

    def _write(self, name: str, files: Iterator[tuple[str, Content]]) -> None:
        temporary = sealed_folder.temporary_of(self._root, name)
        for file_name, content in files:
            if isinstance(content, bytes):
                (temporary / file_name).write_bytes(content)
            else:
                save_file(contiguous(content), temporary / file_name)

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
