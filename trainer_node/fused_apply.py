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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Weights of a block. Of 4 Ki to 128 Ki the fastest for 10 M float32 weights, 2 MiB of second-level cache
# (Intel Xeon, 2026-11-21); 32 Ki took 1.1 times as long.
BLOCK_WEIGHTS = 64 * 1024
# Below it a launch costs more than the bytes, and sizes 0 and 1 would each be compiled by themselves.
SMALLEST_COMPILED = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """The direction `minuend - subtrahend`, which is never made as a whole. Either may be the weights."""

    minuend: Tensor
    subtrahend: Tensor


Direction = Tensor | Difference


@torch.no_grad()
def move_along(
    weights: Tensor,
    directions: Sequence[Direction],
    coefficients: Sequence[float],
    *,
    along: Sequence[Tensor] = (),
    is_compiled: bool | None = None,
) -> Tensor:
    """In place: `weights` and each tensor of `along` += sum of coefficient x direction. |delta|^2, ().

    All tensors have the shape and the device of `weights`; directions may be of another floating type.
    A coefficient of 0 leaves its direction out; with none left nothing is touched: even a zero that is
    added would make +0.0 of a weight that is -0.0. Returns float32; does not wait for a GPU.
    `is_compiled` None: where `compiles_by_itself`. On a CPU it takes a C++ compiler and, once, half a minute.
    """
    terms = [(c, d) for c, d in zip(coefficients, directions, strict=True) if c != 0.0]
    if not terms:
        return torch.zeros((), device=weights.device)
    tensors = _flat([weights, *along, *(t for _, d in terms for t in _parts(d))])
    if tensors is None:  # memory in another order: as a whole
        return _move_block(weights, terms, along)
    flats = [(c, _replaced(d, tensors)) for c, d in terms]
    flat, flat_along = tensors[id(weights)], [tensors[id(t)] for t in along]
    wants_compiled = compiles_by_itself(weights.device) if is_compiled is None else is_compiled
    if wants_compiled and weights.numel() >= SMALLEST_COMPILED:
        return _move_compiled(_compiled("inductor"), flat, flats, flat_along)
    return _move_in_blocks(flat, flats, flat_along)


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


@torch.no_grad()
def delta_at(
    directions: Sequence[Direction], coefficients: Sequence[float], positions: Tensor, dtype: torch.dtype
) -> Tensor:
    """delta at flat positions (n,) int64, as `move_along` adds it if it is called next: (n,) of `dtype`.

    Before the weights move: a direction may be measured from them.
    """
    terms = [(c, d) for c, d in zip(coefficients, directions, strict=True) if c != 0.0]
    picked = [(c, _picked(d, positions)) for c, d in terms]
    return _delta_of((torch.zeros(positions.shape, dtype=dtype, device=positions.device), None, None), picked)


def compiles_by_itself(device: torch.device) -> bool:
    """On a CPU the blocks need no compiler and keep every bit."""
    return device.type == "cuda" and find_spec("triton") is not None


def bytes_moved(weights: Tensor, directions: Sequence[Direction], along: Sequence[Tensor] = ()) -> int:
    """What one pass must read and write at least: each tensor once, what is written once more."""
    read = {id(t): t for t in (weights, *along, *(t for d in directions for t in _parts(d)))}
    return sum(t.numel() * t.element_size() for t in (*read.values(), weights, *along))


# ---- blocks ----------------------------------------------------------------------------------


Terms = Sequence[tuple[float, Direction]]


def _move_in_blocks(flat: Tensor, terms: Terms, along: Sequence[Tensor]) -> Tensor:
    squares = []
    size = min(BLOCK_WEIGHTS, flat.numel())
    zeros, delta, scratch = flat.new_zeros(size), flat.new_empty(size), flat.new_empty(size)
    coefficients = [c for c, _ in terms]
    blocks = zip(_split(flat), *(_split(d) for _, d in terms), *(_split(t) for t in along), strict=True)
    for weights, *others in blocks:
        count = weights.numel()
        space = zeros[:count], delta[:count], scratch[:count]
        pieces = list(zip(coefficients, others, strict=False))
        squares.append(_move_block(weights, pieces, others[len(terms) :], space))
    return torch.stack(squares).sum()


def _split(direction: Direction) -> Sequence[Direction]:
    if isinstance(direction, Difference):
        pairs = zip(_split(direction.minuend), _split(direction.subtrahend), strict=True)
        return [Difference(minuend, subtrahend) for minuend, subtrahend in pairs]  # type: ignore[arg-type]
    return direction.split(BLOCK_WEIGHTS)


Space = tuple[Tensor, Tensor, Tensor]  # zeros, and room for a delta and for a direction


def _move_block(weights: Tensor, terms: Terms, along: Sequence[Tensor], space: Space | None = None) -> Tensor:
    delta = _delta_of(space or (torch.zeros_like(weights), None, None), terms)
    weights.add_(delta)  # only now: a direction may be measured from the weights
    for tensor in along:
        tensor.add_(delta)
    if delta.dtype == torch.float32 and delta.ndim == 1:
        return torch.dot(delta, delta)
    return delta.float().square().sum()


def _delta_of(space: tuple[Tensor, Tensor | None, Tensor | None], terms: Terms) -> Tensor:
    zeros, room, scratch = space
    delta = zeros
    for coefficient, direction in terms:
        if isinstance(direction, Difference):
            # As it is made where nothing is fused: in the type of its parts.
            fits = scratch if scratch is not None and scratch.dtype == direction.minuend.dtype else None
            direction = torch.sub(direction.minuend, direction.subtrahend, out=fits)
        delta = torch.add(delta, direction, alpha=coefficient, out=zeros if room is None else room)
    return delta


# ---- compiled --------------------------------------------------------------------------------


def _expression(
    weights: Tensor,
    minuends: list[Tensor],
    subtrahends: list[Tensor | None],
    coefficients_K: Tensor,
    along: list[Tensor],
) -> Tensor:
    delta = torch.zeros_like(weights, dtype=torch.float32)
    for k, (minuend, subtrahend) in enumerate(zip(minuends, subtrahends, strict=True)):
        direction = minuend if subtrahend is None else minuend - subtrahend
        delta = delta + coefficients_K[k] * direction
    delta = delta.to(weights.dtype)
    for tensor in along:
        tensor.add_(delta)
    weights.add_(delta)
    return delta.float().square().sum()


@cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    """One kernel for any length: the numbers of terms and the types are what it is compiled for."""
    return torch.compile(_expression, backend=backend, dynamic=True, fullgraph=True)


def _move_compiled(
    kernel: Callable[..., Tensor], flat: Tensor, terms: Terms, along: Sequence[Tensor]
) -> Tensor:
    # From pinned memory: a plain copy to the device would wait for it.
    values = torch.tensor([c for c, _ in terms], dtype=torch.float32, pin_memory=flat.is_cuda)
    parts = [_parts(direction) for _, direction in terms]
    minuends = [pair[0] for pair in parts]
    subtrahends = [pair[1] if len(pair) == 2 else None for pair in parts]
    return kernel(flat, minuends, subtrahends, values.to(flat.device, non_blocking=True), list(along))


# ---- directions ------------------------------------------------------------------------------


def _parts(direction: Direction) -> tuple[Tensor, ...]:
    if isinstance(direction, Difference):
        return direction.minuend, direction.subtrahend
    return (direction,)


def _flat(tensors: Sequence[Tensor]) -> dict[int, Tensor] | None:
    """Each tensor as one dimension, by its id, so that one that comes twice stays one. None: it cannot be."""
    if not all(t.is_contiguous() for t in tensors):
        return None
    return {id(t): t.detach().view(-1) for t in _once(tensors)}


def _once(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    yield from {id(t): t for t in tensors}.values()


def _replaced(direction: Direction, tensors: dict[int, Tensor]) -> Direction:
    if isinstance(direction, Difference):
        return Difference(tensors[id(direction.minuend)], tensors[id(direction.subtrahend)])
    return tensors[id(direction)]


def _picked(direction: Direction, positions: Tensor) -> Direction:
    if isinstance(direction, Difference):
        return Difference(*(t.reshape(-1).index_select(0, positions) for t in _parts(direction)))
    return direction.reshape(-1).index_select(0, positions)
