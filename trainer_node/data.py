"""Batches as a function of their position: nothing to save, nothing to lose on resume.

Training order: each epoch is a permutation of all items drawn from (seed, epoch) by Philox; batch
`position` takes items [position B, position B + B) of the endless chain of epochs, so every item is
used exactly once per epoch and a batch may straddle two. For text an item is a window of T tokens;
windows do not overlap, and their grid starts at a random offset in [0, T) that is new each epoch.
Guard batches come from the end of the training split, are never trained on and never score a result.
Reads arrays, decides nothing about their contents: where documents begin is for the model to see, in the
tokens (trainer.data.packing). For a GPU the next batches of text are made in a thread
(prefetch.py), on the host and pinned.

B items per batch, T tokens per window, N tokens in a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, overload

import numpy as np
import torch
from torch import Tensor

from common.errors import DataError
from trainer_node.prefetch import DEPTH, Ahead


@dataclass(frozen=True, slots=True)
class Batch:
    """Text: inputs (B, T) int64, targets (B, T) int64. Images: (B, 1, 8, 8) float32 and (B,) int64."""

    inputs: Tensor
    targets: Tensor


def in_pieces(batches: Sequence[Batch], size: int) -> list[tuple[Batch, float]]:
    """Each batch cut along B, in order, into pieces of at most `size` items, without a copy.

    With each piece the divisor of its mean loss: sum of loss / divisor is the mean of all items.
    """
    pieces, items = [], sum(len(batch.inputs) for batch in batches)
    for batch in batches:
        for inputs, targets in zip(batch.inputs.split(size), batch.targets.split(size), strict=True):
            pieces.append((Batch(inputs, targets), items / len(inputs)))
    return pieces


class TrainBatches(Protocol):
    def batch(self, position: int) -> Batch:
        """Micro-batch number `position`, counted from 0 over the whole run."""
        ...

    def epoch(self, position: int) -> float:
        """Epochs done before that micro-batch."""
        ...

    def guard(self, index: int) -> Batch:
        """Held-back training batch `index` in [0, guard_batches)."""
        ...


class EpochOrder:
    """The endless chain of permutations of `items` items."""

    def __init__(self, items: int, *, seed: int) -> None:
        self._items = items
        # A batch touches at most a few neighbouring epochs; the permutation is a function of its
        # number, so forgetting one costs time only.
        self._permutation = lru_cache(maxsize=2)(lambda epoch: epoch_rng(seed, epoch).permutation(items))

    def take(self, start: int, count: int) -> list[tuple[int, np.ndarray]]:
        """(epoch, item numbers) runs that together are items [start, start + count) of the chain."""
        runs = []
        while count > 0:
            epoch, place = divmod(start, self._items)
            chosen = self._permutation(epoch)[place : place + count]
            runs.append((epoch, chosen))
            start, count = start + len(chosen), count - len(chosen)
        return runs


class TextBatches:
    """Training windows of one token array; see the module docstring.

    `tokens` is (N,) of any unsigned integer type, usually a memmap. Raises DataError if N does not
    hold the guard batches and one training batch.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        sequences: int,
        context_tokens: int,
        seed: int,
        guard_batches: int,
        device: torch.device,
        ahead: int | None = None,
    ) -> None:
        """`ahead`: batches made in advance by a thread; None = some for a GPU, none else."""
        guard_tokens = guard_batches * sequences * context_tokens + 1
        # The grid's offset eats up to T - 1 tokens, the last target one more.
        usable_tokens = len(tokens) - guard_tokens - context_tokens
        self._windows = max(0, usable_tokens) // context_tokens
        if self._windows < sequences:
            needed = guard_tokens + context_tokens * (sequences + 1)
            raise DataError(
                f"the training text has {len(tokens)} tokens, one batch and the guard need {needed};"
                " give more text, or lower trainer.batch.sequences or trainer.model.context_tokens"
            )
        self._tokens, self._device, self._seed = tokens, device, seed
        self._sequences, self._context = sequences, context_tokens
        self._guard_start, self._guard_batches = len(tokens) - guard_tokens, guard_batches
        self._order = EpochOrder(self._windows, seed=seed)
        on_gpu = device.type == "cuda"
        depth = ahead if ahead is not None else (DEPTH if on_gpu else 0)
        self._ahead = Ahead(self._on_host, depth=depth, device=device if on_gpu else None) if depth else None

    def batch(self, position: int) -> Batch:
        windows = self._ahead.at(position) if self._ahead is not None else self._on_host(position)
        return batch_of(windows, self._device)

    def _on_host(self, position: int) -> Tensor:
        starts = [
            epoch_offset(self._seed, epoch, self._context) + chosen * self._context
            for epoch, chosen in self._order.take(position * self._sequences, self._sequences)
        ]
        return windows_on_host(self._tokens, np.concatenate(starts), self._context, self._device)

    def epoch(self, position: int) -> float:
        return position * self._sequences / self._windows

    def guard(self, index: int) -> Batch:
        if not 0 <= index < self._guard_batches:
            raise IndexError(f"guard batch {index} of {self._guard_batches}")
        numbers = np.arange(index * self._sequences, (index + 1) * self._sequences)
        return windows_at(
            self._tokens, self._guard_start + numbers * self._context, self._context, self._device
        )


class HeldOutText(Sequence[Batch]):
    """Fixed windows, spread evenly over the held-out tokens; made when asked for.

    Fewer batches, or one smaller batch, where the split is short. Raises DataError below one window.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        sequences: int,
        context_tokens: int,
        batches: int,
        device: torch.device,
    ) -> None:
        available = (len(tokens) - 1) // context_tokens
        if available < 1:
            raise DataError(
                f"the held-out text has {len(tokens)} tokens, one window needs {context_tokens + 1};"
                " give more text, raise trainer.data.validation_share or lower trainer.model.context_tokens"
            )
        self._tokens, self._context, self._device = tokens, context_tokens, device
        self._sequences = min(sequences, available)
        self._batches = min(batches, available // self._sequences)
        count = self._batches * self._sequences
        self._starts = (np.arange(count) * available // count) * context_tokens

    def __len__(self) -> int:
        return self._batches

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = range(len(self))[index] * self._sequences
        starts = self._starts[first : first + self._sequences]
        return windows_at(self._tokens, starts, self._context, self._device)


class ImageBatches:
    """Training images in the same order of epochs; the last `guard_batches` batches are held back.

    `images` (N, 1, 8, 8) float32, `labels` (N,) int64. Raises DataError if N is too small.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        sequences: int,
        seed: int,
        guard_batches: int,
        device: torch.device,
    ) -> None:
        self._trained = len(images) - guard_batches * sequences
        if self._trained < sequences:
            raise DataError(
                f"there are {len(images)} training images, one batch and the guard need"
                f" {(guard_batches + 1) * sequences}; lower trainer.batch.sequences or"
                " trainer.verify.guard_batches"
            )
        self._images, self._labels, self._device = images, labels, device
        self._sequences, self._guard_batches = sequences, guard_batches
        self._order = EpochOrder(self._trained, seed=seed)

    def batch(self, position: int) -> Batch:
        runs = self._order.take(position * self._sequences, self._sequences)
        return self._at(np.concatenate([chosen for _, chosen in runs]))

    def epoch(self, position: int) -> float:
        return position * self._sequences / self._trained

    def guard(self, index: int) -> Batch:
        if not 0 <= index < self._guard_batches:
            raise IndexError(f"guard batch {index} of {self._guard_batches}")
        first = self._trained + index * self._sequences
        return self._at(np.arange(first, first + self._sequences))

    def _at(self, chosen: np.ndarray) -> Batch:
        return Batch(place(self._images[chosen], self._device), place(self._labels[chosen], self._device))


def windows_at(tokens: np.ndarray, starts_B: np.ndarray, context: int, device: torch.device) -> Batch:
    return batch_of(windows_on_host(tokens, starts_B, context, device), device)


def windows_on_host(tokens: np.ndarray, starts_B: np.ndarray, context: int, device: torch.device) -> Tensor:
    """(B, T + 1) int64, in pinned memory if `device` is a GPU."""
    windows_BS = torch.from_numpy(tokens[starts_B[:, None] + np.arange(context + 1)].astype(np.int64))
    return windows_BS.pin_memory() if device.type == "cuda" else windows_BS


def batch_of(windows_BS: Tensor, device: torch.device) -> Batch:
    """Without waiting for a GPU, from pinned memory."""
    on_device = windows_BS.to(device, non_blocking=True)
    return Batch(on_device[:, :-1], on_device[:, 1:])


def place(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device; to a GPU by way of pinned memory, without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))


@lru_cache(maxsize=8)  # seeding a generator took nearly half of the 35 us that a batch of 16 x 128 took
def epoch_offset(seed: int, epoch: int, context: int) -> int:
    """Start of the window grid in [0, context)."""
    return int(np.random.default_rng([seed, epoch, 0x0FF5E7]).integers(context))
