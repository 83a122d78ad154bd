"""Moves weights along a linear combination of directions in one pass over memory.

    delta = sum_k c[k] d[k];  weights += delta;  each tensor of `along` += delta;  returns |delta|^2

Every step of its own reads and writes whole tensors: K + 3 passes, more where a direction is a difference
that is made first. Here a block that fits into the cache goes through all steps before the next one is
fetched (CPU), or a compiled kernel does (GPU, where torch.compile has a backend): what is read and written is
each direction once, the weights twice. On CPU weights of 32 bits or more are those of `reference`, bit for
bit, since each element sees the same operations in the same order; half-precision ones only with one thread
(torch rounds a + c * b otherwise in the scalar code for the last elements of a thread's range). Compiled,
delta is summed in float32 whatever the type of the weights, and a product may or may not be rounded before it
is added: float32 weights are within 1e-6 relative to the largest term. The sum of squares has another order
of summation: 1e-5 relative. Decides nothing, checks no coefficient and holds no state but the compiled
kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Bytes of a block of weights; six blocks are in use at a time. Of 64 to 512 KiB among the fastest for 10 M
# float32 weights with 2 MiB of second-level cache (Intel Xeon, 2026-11-22); 64 KiB took 1.3 times as long.
BLOCK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """The direction `minuend - subtrahend`, which is never made as a whole. Either may be the weights."""

    minuend: Tensor
    subtrahend: Tensor


Direction = Tensor | Difference


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Flat positions (n,) int64, ascending, and where the values go (n,) that delta has there."""

    positions: Tensor
    values: Tensor


@torch.no_grad()
def move_along(
    weights: Tensor,
    directions: Sequence[Direction],
    coefficients: Sequence[float],
    *,
    along: Sequence[Tensor] = (),
    sample: Sample | None = None,
) -> Tensor:
    """In place: `weights` and each tensor of `along` += sum of coefficient x direction. |delta|^2, ().

    All tensors have the shape and the device of `weights`; directions may be of another floating type.
    A coefficient of 0 leaves its direction out; with none left nothing is touched: even a zero that is
    added would make +0.0 of a weight that is -0.0. Returns float32; does not wait for a GPU.
    """
    terms = [(c, d) for c, d in zip(coefficients, directions, strict=True) if c != 0.0]
    if not terms:
        return torch.zeros((), device=weights.device)
    tensors = flats([weights, *along, *(t for _, d in terms for t in parts(d))])
    if tensors is None:  # memory in another order: as a whole
        return _move_block(weights, terms, along, sample=sample)
    flat_terms = [(c, flat_of(d, tensors)) for c, d in terms]
    return _move_in_blocks(tensors[id(weights)], flat_terms, [tensors[id(t)] for t in along], sample)


@torch.no_grad()
def reference(
    weights: Tensor,
    directions: Sequence[Direction],
    coefficients: Sequence[float],
    *,
    along: Sequence[Tensor] = (),
) -> Tensor:
    """The same, one whole tensor after another: what `move_along` is measured against."""
    terms = [(c, d) for c, d in zip(coefficients, directions, strict=True) if c != 0.0]
    return _move_block(weights, terms, along) if terms else torch.zeros((), device=weights.device)


def bytes_moved(weights: Tensor, directions: Sequence[Direction], along: Sequence[Tensor] = ()) -> int:
    """What one pass must read and write at least: each tensor once, what is written once more."""
    read = {id(t): t for t in (weights, *along, *(t for d in directions for t in parts(d)))}
    return sum(t.numel() * t.element_size() for t in (*read.values(), weights, *along))


# ---- blocks ----------------------------------------------------------------------------------


Terms = Sequence[tuple[float, Direction]]


def _move_in_blocks(flat: Tensor, terms: Terms, along: Sequence[Tensor], sample: Sample | None) -> Tensor:
    squares = []
    block = BLOCK_BYTES // flat.element_size()
    delta, scratch = (flat.new_empty(min(block, flat.numel())) for _ in range(2))
    coefficients = [c for c, _ in terms]
    blocks = zip(
        flat.split(block),
        *(_split(d, block) for _, d in terms),
        *(t.split(block) for t in along),
        strict=True,
    )
    for (weights, *others), seen in zip(blocks, _samples(sample, flat.numel(), block), strict=True):
        count = weights.numel()
        pieces = list(zip(coefficients, others, strict=False))
        space = delta[:count], scratch[:count]
        squares.append(_move_block(weights, pieces, others[len(terms) :], space, seen))
    return torch.stack(squares).sum()


def _split(direction: Direction, block: int) -> Sequence[Direction]:
    if isinstance(direction, Difference):
        pairs = zip(direction.minuend.split(block), direction.subtrahend.split(block), strict=True)
        return [Difference(minuend, subtrahend) for minuend, subtrahend in pairs]
    return direction.split(block)


def _samples(sample: Sample | None, count: int, block: int) -> Sequence[Sample | None]:
    """What falls into each block of `count` weights."""
    starts = torch.arange(0, max(count, 1), block)
    if sample is None:
        return [None] * len(starts)
    firsts = torch.searchsorted(sample.positions, starts).tolist()
    sizes = [end - first for first, end in pairwise([*firsts, len(sample.positions)])]
    positions = (sample.positions % block).split(sizes)
    return [Sample(p, v) for p, v in zip(positions, sample.values.split(sizes), strict=True)]


Space = tuple[Tensor, Tensor]  # room for a delta and for a direction


def _move_block(
    weights: Tensor,
    terms: Terms,
    along: Sequence[Tensor],
    space: Space | None = None,
    sample: Sample | None = None,
) -> Tensor:
    delta = _delta_of(weights, terms, space or (torch.empty_like(weights), torch.empty_like(weights)))
    if sample is not None:
        torch.index_select(delta.reshape(-1).to(sample.values.dtype), 0, sample.positions, out=sample.values)
    weights.add_(delta)  # only now: a direction may be measured from the weights
    for tensor in along:
        tensor.add_(delta)
    if delta.dtype == torch.float32 and delta.ndim == 1:
        return torch.dot(delta, delta)
    return delta.float().square().sum()


def _delta_of(weights: Tensor, terms: Terms, space: Space) -> Tensor:
    """0 + c[0] d[0] + c[1] d[1] + ...: as it is where whole tensors are added, and in that order."""
    delta, scratch = space
    for number, (coefficient, direction) in enumerate(terms):
        if isinstance(direction, Difference):
            # As it is made where nothing is fused: in the type of its parts. The first in place of delta.
            room = delta if number == 0 else scratch
            fits = room.dtype == direction.minuend.dtype
            direction = torch.sub(direction.minuend, direction.subtrahend, out=room if fits else None)
        if number > 0:
            delta.add_(direction, alpha=coefficient)
        elif direction.dtype == delta.dtype:
            torch.add(weights.new_zeros(()), direction, alpha=coefficient, out=delta)
        else:  # with a zero that has no dimension it would be added in the type of the direction
            delta.zero_().add_(direction, alpha=coefficient)
    return delta


# ---- directions ------------------------------------------------------------------------------


def parts(direction: Direction) -> tuple[Tensor, ...]:
    if isinstance(direction, Difference):
        return direction.minuend, direction.subtrahend
    return (direction,)


def flats(tensors: Sequence[Tensor]) -> dict[int, Tensor] | None:
    """Each tensor as one dimension, by its id, so that one that comes twice stays one. None: it cannot be."""
    if not all(t.is_contiguous() for t in tensors):
        return None
    return {id(t): t.detach().view(-1) for t in _once(tensors)}


def _once(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    yield from {id(t): t for t in tensors}.values()


def flat_of(direction: Direction, tensors: dict[int, Tensor]) -> Direction:
    if isinstance(direction, Difference):
        return Difference(tensors[id(direction.minuend)], tensors[id(direction.subtrahend)])
    return tensors[id(direction)]
