"""Shared host memory that holds the files of one checkpoint as they will lie on disk.

The training thread copies tensors here, and a process of its own writes them out (common/folder_process.py):
a step is captured at the speed of memory, and a slow disk never holds it. One block, which grows and is used
again; page-locked where the tensors are on a GPU. It costs as much host memory as a checkpoint has bytes,
which `limit_bytes` bounds. The bytes are those that safetensors' own `save_file` writes
(tests/trainer/test_checkpoint_buffer.py compares them): it knows no way to write into memory that is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from common.folder_job import FilePart
from trainer_node.checkpoint_content import Content

AUTO_SHARE = 8  # auto: at most this part of the host memory that is free when the buffer grows
_ALIGNMENT = 64
_PORTABLE = 1  # cudaHostRegisterPortable
# In the order of safetensors' enum, which sorts a file: the widest types first.
_CODES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_ORDER = {dtype: position for position, dtype in enumerate(_CODES)}

_GROUPS = Path("/sys/fs/cgroup")  # as a container sees its own
_GROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


class NoHostMemory(Exception):
    """The buffer cannot be as large as it would have to be. It is empty now."""


class CheckpointBuffer:
    """See the module's docstring. Linux only: `is_possible`."""

    def __init__(self, *, is_bounded: bool, is_pinned: bool) -> None:
        """`is_bounded`: take at most an eighth of the free host memory. Raises OSError."""
        self.descriptor = os.memfd_create("checkpoint")
        self._is_bounded, self._is_pinned = is_bounded, is_pinned
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._registered = 0  # address

    @property
    def num_bytes(self) -> int:
        return self._bytes.numel()

    def hold(self, files: Iterable[tuple[str, Content]]) -> tuple[FilePart, ...]:
        """Copy them here, and say where each is. Allocates nothing on a GPU. Raises NoHostMemory."""
        parts: list[FilePart] = []
        end, is_on_gpu = 0, False
        for name, content in files:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            layout = layout_of(content)
            end = start + layout.num_bytes
            self._grow(end)
            self._bytes[start : start + len(layout.head)].numpy()[:] = np.frombuffer(layout.head, np.uint8)
            tensors = {} if isinstance(content, bytes) else content
            for tensor_name, offset, num_bytes in layout.places:
                self._put(start + offset, tensors[tensor_name].detach(), num_bytes)
            is_on_gpu = is_on_gpu or any(t.is_cuda for t in tensors.values())
            parts.append(FilePart(name=name, offset=start, num_bytes=layout.num_bytes))
        if is_on_gpu:
            torch.cuda.synchronize()
        return tuple(parts)

    def close(self) -> None:
        """Give the memory back, also what another process still has open."""
        self._unmap()
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)
            self.descriptor = -1

    def _put(self, at: int, source: Tensor, num_bytes: int) -> None:
        if not source.is_contiguous():
            source = source.cpu().contiguous()  # packed on the host: copy_ would do it on the device
        if (
            source.device.type == "cpu" and type(source) is Tensor
        ):  # another kind may have no bytes of its own
            # copy_ costs a fifth more, and waits for its threads where other work has their cores.
            ctypes.memmove(self._bytes.data_ptr() + at, source.data_ptr(), num_bytes)
        else:
            place = self._bytes[at : at + num_bytes].view(source.dtype).view(source.shape)
            place.copy_(source, non_blocking=bool(self._registered))

    def _grow(self, num_bytes: int) -> None:
        if num_bytes <= self.num_bytes:
            return
        more_bytes = num_bytes - self.num_bytes
        if self._is_bounded and num_bytes > (free_host_bytes() + self.num_bytes) // AUTO_SHARE:
            self._give_up()
        self._unmap()
        try:
            # Reserved now: a page that cannot be had later would be a SIGBUS.
            os.posix_fallocate(self.descriptor, num_bytes - more_bytes, more_bytes)
            self._map = mmap.mmap(self.descriptor, num_bytes)
        except OSError:
            self._give_up()
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if self._is_pinned:
            self._register()

    def _give_up(self) -> None:
        self._unmap()
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, 0)
        raise NoHostMemory

    def _register(self) -> None:
        """As torch.distributed's own staging buffers do; where it fails, copies are slower and right."""
        address = self._bytes.data_ptr()
        code = torch.cuda.cudart().cudaHostRegister(address, self.num_bytes, _PORTABLE)  # type: ignore[no-untyped-call]
        self._registered = address if int(code) == 0 else 0

    def _unmap(self) -> None:
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered)  # type: ignore[no-untyped-call]
            self._registered = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if self._map is not None:
            self._map.close()
            self._map = None


def make_buffer(where: str, device: torch.device) -> CheckpointBuffer | None:
    """For trainer.checkpoint.staging; None: files are written by the training thread."""
    if where == "disk" or not hasattr(os, "memfd_create"):
        return None
    try:
        return CheckpointBuffer(is_bounded=where == "auto", is_pinned=device.type == "cuda")
    except OSError:
        return None


class Layout(NamedTuple):
    """Of one file."""

    head: bytes  # what stands before the tensors: all of it, where there are none
    places: tuple[tuple[str, int, int], ...]  # name, offset, number of bytes; none that is empty
    num_bytes: int


def layout_of(content: Content) -> Layout:
    if isinstance(content, bytes):
        return Layout(content, (), len(content))
    return _tensors_layout(tuple((name, t.dtype, t.shape) for name, t in content.items()))


@lru_cache(maxsize=8)  # the same at every checkpoint of a run, and a millisecond of work
def _tensors_layout(kinds: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> Layout:
    """The head of a safetensors file is its length (u64), JSON, and blanks up to 8 bytes."""
    table, spans, at = {}, [], 0
    for name, dtype, shape in sorted(kinds, key=lambda kind: (-_ORDER[kind[1]], kind[0])):
        end = at + shape.numel() * dtype.itemsize
        table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        spans.append((name, at, end - at))
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    places = tuple((name, len(head) + start, size) for name, start, size in spans if size)
    return Layout(head, places, len(head) + at)


def free_host_bytes() -> int:
    """What this process may still take: of the machine, and of its control group if that has a bound."""
    free = [int(psutil.virtual_memory().available)]
    for bound, used in _GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max"
            free.append(int((_GROUPS / bound).read_text()) - int((_GROUPS / used).read_text()))
    return max(0, min(free))
