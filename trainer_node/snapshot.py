"""The state before a jump, restored bit for bit.

Holds weights, every tensor of the optimizers, the moving averages and the RNG. Lives in pinned
host memory on a GPU; on CPU in an unlinked file (page cache, not process memory), because six
copies of a model in RAM is what the memory bar forbids. Restoring is proved by sums (proof.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import EnvironmentFault
from trainer_node.optim.state import group_state, optimizer_tensors, put_group_state, with_own_containers
from trainer_node.proof import Proof, bytes_of


class TensorStore(Protocol):
    def save(self, tensors: Sequence[Tensor], proof: Proof | None = None) -> None:
        """The bits that are saved go into `proof`."""

    def load_into(self, tensors: Sequence[Tensor], proof: Proof | None = None) -> None:
        """The bits that `tensors` hold afterwards go into `proof`."""

    def read(self, index: int) -> Tensor:
        """One saved tensor, on the host."""

    @property
    def resident_bytes(self) -> int:
        """Process memory that the saved tensors take."""

    @property
    def stored_bytes(self) -> int:
        """Of the saved tensors, wherever they are."""

    @property
    def place(self) -> str:
        """Where they are: "host" or "disk"."""

    def another(self) -> TensorStore:
        """An empty one of the same kind."""

    def close(self) -> None: ...


class MemoryStore:
    """Clones on CPU, pinned host copies on a GPU; buffers are kept for the next snapshot."""

    def __init__(self) -> None:
        self._copies: list[Tensor] = []

    def save(self, tensors: Sequence[Tensor], proof: Proof | None = None) -> None:
        if [(c.shape, c.dtype) for c in self._copies] != [(t.shape, t.dtype) for t in tensors]:
            try:
                self._copies = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
            except RuntimeError as error:  # what torch raises when host memory is short
                self._copies = []
                raise EnvironmentFault(
                    f"no snapshot: {error}; set trainer.checkpoint.snapshot = disk"
                ) from None
        for copy, tensor in zip(self._copies, tensors, strict=True):
            _copy(copy, tensor, proof, proved=tensor)
        _synchronize(tensors)

    def load_into(self, tensors: Sequence[Tensor], proof: Proof | None = None) -> None:
        for copy, tensor in zip(self._copies, tensors, strict=True):
            _copy(tensor, copy, proof, proved=tensor)
        _synchronize(tensors)

    def read(self, index: int) -> Tensor:
        return self._copies[index]

    @property
    def resident_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._copies)

    @property
    def stored_bytes(self) -> int:
        return self.resident_bytes

    @property
    def place(self) -> str:
        return "host"

    def another(self) -> MemoryStore:
        return MemoryStore()

    def close(self) -> None:
        self._copies = []


class DiskStore:
    """One unlinked temporary file; raises EnvironmentFault when the disk is full."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: BinaryIO | None = None
        self._saved: list[tuple[int, torch.Size, torch.dtype]] = []  # offset in the file, shape, dtype

    @property
    def _file(self) -> BinaryIO:
        if self._opened is None:
            self._opened = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        return self._opened

    def save(self, tensors: Sequence[Tensor], proof: Proof | None = None) -> None:
        self._saved = []
        try:
            self._file.seek(0)
            for tensor in tensors:
                self._saved.append((self._file.tell(), tensor.shape, tensor.dtype))
                host = tensor.detach().cpu().contiguous()
                view = memoryview(bytes_of(host).numpy())
                if proof is None:
                    self._write(view)
                else:
                    proof.add_while(lambda start, end, view=view: self._write(view[start:end]), host)
        except OSError as error:
            raise EnvironmentFault(
                f"no snapshot: {error.strerror}; free space or set snapshot = memory"
            ) from None

    def load_into(self, tensors: Sequence[Tensor], proof: Proof | None = None) -> None:
        for index, tensor in enumerate(tensors):
            if _is_plain(tensor):
                self._read_into(index, tensor, proof)
            else:
                tensor.copy_(self.read(index))
                if proof is not None:
                    proof.add(tensor)

    def read(self, index: int) -> Tensor:
        _, shape, dtype = self._saved[index]
        tensor = torch.empty(shape, dtype=dtype)
        self._read_into(index, tensor)
        return tensor

    def _read_into(self, index: int, target: Tensor, proof: Proof | None = None) -> None:
        view = memoryview(bytes_of(target).numpy())
        try:
            self._file.seek(self._saved[index][0])
            if proof is None:
                self._fill(view)
            else:
                proof.add_while(lambda start, end: self._fill(view[start:end]), target)
        except OSError as error:
            raise EnvironmentFault(f"snapshot not readable: {error}; resume the run") from None

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EnvironmentFault("the snapshot file was cut short; resume from the last checkpoint")
            view = view[count:]

    @property
    def resident_bytes(self) -> int:
        return 0

    @property
    def stored_bytes(self) -> int:
        return sum(shape.numel() * dtype.itemsize for _, shape, dtype in self._saved)

    @property
    def place(self) -> str:
        return "disk"

    def another(self) -> DiskStore:
        return DiskStore(self._folder)

    def close(self) -> None:
        self._saved = []
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __del__(self) -> None:
        self.close()


def make_store(kind: str, device: torch.device, folder: Path | None) -> TensorStore:
    """`auto`: memory on a GPU or without a run folder, else disk."""
    if kind == "memory" or folder is None or (kind == "auto" and device.type == "cuda"):
        return MemoryStore()
    return DiskStore(folder)


class Snapshot:
    """Weights, optimizer tensors, moving averages and RNG of one moment."""

    def __init__(
        self,
        store: TensorStore,
        parameters: Sequence[Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        extra: Sequence[Tensor],
        *,
        with_random: bool = True,
    ) -> None:
        self._store = store
        # Entries as they are: one that an optimizer makes later must be gone after a restore.
        self._states = [(o, with_own_containers(o.state), group_state(o)) for o in optimizers]
        self._tensors = [p.detach() for p in parameters] + optimizer_tensors(optimizers) + list(extra)
        self._random = random_state(self._tensors[0].device) if with_random else None
        proof = Proof()
        store.save(self._tensors, proof)
        self._digest = proof.digest()

    @torch.no_grad()
    def restore(self) -> None:
        """Raises EnvironmentFault if a single bit differs afterwards: training must not go on then."""
        for optimizer, states, groups in self._states:
            optimizer.state.clear()
            optimizer.state.update(with_own_containers(states))
            put_group_state(optimizer, groups)
        proof = Proof()
        self._store.load_into(self._tensors, proof)
        if self._random is not None:
            set_random_state(self._random, self._tensors[0].device)
        found = proof.digest()
        if found != self._digest:
            raise EnvironmentFault(
                f"a restored snapshot differs ({found}, was {self._digest}): faulty memory or disk;"
                " resume from the last checkpoint"
            )


def random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _copy(target: Tensor, source: Tensor, proof: Proof | None, *, proved: Tensor) -> None:
    """`proved`, one of both, goes into the proof: as it is copied, where both are on the host."""
    if proof is not None and _is_plain(target) and _is_plain(source):
        proof.add_while(_copier(bytes_of(target), bytes_of(source)), proved)
        return
    target.copy_(source, non_blocking=True)
    if proof is not None:
        proof.add(proved)


def _copier(to: Tensor, of: Tensor) -> Callable[[int, int], object]:
    """Copies bytes from the first to the last but one."""
    if torch.get_num_threads() > 1:
        return lambda start, end: to[start:end].copy_(of[start:end])
    to_, of_ = to.numpy(), of.numpy()  # memcpy: by 7 % faster than torch's loop (Intel Xeon, 2026-11-22)
    return lambda start, end: np.copyto(to_[start:end], of_[start:end])


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _synchronize(tensors: Sequence[Tensor]) -> None:
    if any(t.is_cuda for t in tensors):
        torch.cuda.synchronize()
