"""Proves that tensors hold the bits that they once held, by sums that are taken while they are copied.

A tensor's bytes are read as rows of 512 words of 64 bits. The sum of each row and of each column, modulo
2^64, and the bytes after the last row go into a BLAKE2b digest of 64 bits. A change of one word or of two
changes a row's sum or a column's for certain; more hide only where they cancel in every row and in every
column that they touch, as in the four corners of a rectangle. Additions only, of a chunk that the cache still
holds from the copy (fingerprint.py, whose text travels in messages and checkpoints and so keeps its law,
takes longer than the copy). Never leaves the process; compares nothing and knows neither stores nor
optimizers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

ROW_WORDS = 512
ROW_BYTES = 8 * ROW_WORDS
# Rows of a chunk per thread: with its copy 512 KiB, within a core's own cache.
CHUNK_ROWS = 64

Copy = Callable[[int, int], object]  # of the bytes from the first, up to and without the second


class Proof:
    """Of tensors in the order in which they are added; equal bits give an equal digest."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []  # where their tensors are, until the digest

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        """Wherever it is, in any order of memory; does not wait for a GPU."""
        self._add_bytes(bytes_of(tensor.contiguous()))

    @torch.no_grad()
    def add_while(self, copy: Copy, tensor: Tensor) -> None:
        """`tensor`, contiguous and on the host, each part of it right after `copy` has copied it."""
        self._add_bytes(bytes_of(tensor), copy)

    def digest(self) -> str:
        """16 hex digits. Waits for the devices."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self._parts:
            digest.update(part.cpu().numpy())
        return digest.hexdigest()

    def _add_bytes(self, flat: Tensor, copy: Copy = lambda start, end: None) -> None:
        if flat.storage_offset() % 8 != 0:  # torch sees words only from an 8th byte of a storage
            copy(0, flat.numel())
            flat, copy = flat.clone(), lambda start, end: None
        start, num_rows = 0, flat.numel() // ROW_BYTES
        if num_rows > 0:
            start = self._add_rows(flat[: num_rows * ROW_BYTES].view(torch.int64).view(-1, ROW_WORDS), copy)
        copy(start, flat.numel())
        self._parts.append(flat[start:].clone())

    def _add_rows(self, words: Tensor, copy: Copy) -> int:
        """How many bytes they were."""
        row_sums = words.new_empty(len(words))
        column_sums, sums = words.new_zeros(ROW_WORDS), words.new_empty(ROW_WORDS)
        # On a GPU all at once: its memory is read twice, which is little beside the copy over the bus.
        count = CHUNK_ROWS * torch.get_num_threads() if words.device.type == "cpu" else len(words)
        start = 0
        for rows, room in zip(words.split(count), row_sums.split(count), strict=True):
            end = start + len(rows) * ROW_BYTES
            copy(start, end)
            torch.sum(rows, 1, out=room)
            column_sums += torch.sum(rows, 0, out=sums)
            start = end
        self._parts += [row_sums, column_sums]
        return start


def bytes_of(tensor: Tensor) -> Tensor:
    """(n,) uint8, in the same storage; `tensor` is contiguous."""
    return tensor.detach().view(-1).view(torch.uint8)
