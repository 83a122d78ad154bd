"""fused_apply.move_along as one compiled kernel: directions are read once, weights are read and written.

delta is summed in float32 (float64 for such weights), whatever the type of the weights and directions, then
rounded to that of the weights; a product may or may not be rounded before it is added. float32 weights are
those of `fused_apply.reference` within 1e-6 of the largest term, bfloat16 ones nearer to the exact sum than
those; the sum of squares within 1e-5. A direction of coefficient 0 is read like any other, so that no set of
coefficients needs a kernel of its own. A kernel is compiled by `prepare`, at the start of a run, and never by
a jump: for tensors of a kind that was not prepared the same expression runs uncompiled. Chooses nothing:
delta.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from trainer_node import fused_apply
from trainer_node.fused_apply import Difference, Direction, Sample, flat_of, flats, parts

# Of the tensors that `prepare` compiles with: no size that torch takes for constant (0, 1) or short (4096),
# nor a multiple of a vector's length: a kernel would be held to it.
PREPARED_WEIGHTS = 256 * 1024 + 1
WHERE_NOT_PREPARED = "eager_on_recompile"


@torch.no_grad()
def prepare(weights: Tensor, directions: Sequence[Direction], *, along: Sequence[Tensor] = ()) -> None:
    """Compile for tensors of these types, and of any length; what they hold is not touched.

    Raises RuntimeError where nothing can be compiled: no C++ compiler, on a GPU no Triton. Takes 5 to 10
    seconds the first time (one core, Intel Xeon, 2026-11-22) and 190 MB of process memory, both mostly
    torch's compiler coming up.
    """
    tensors = [weights, *along, *(t for d in directions for t in parts(d))]
    # Which tensors are one and the same is part of a kernel.
    small = {id(t): torch.zeros(PREPARED_WEIGHTS, dtype=t.dtype, device=t.device) for t in tensors}
    _move(
        small[id(weights)],
        [flat_of(d, small) for d in directions],
        [0.0] * len(directions),
        [small[id(t)] for t in along],
    )


@torch.no_grad()
def move_along(
    weights: Tensor,
    directions: Sequence[Direction],
    coefficients: Sequence[float],
    *,
    along: Sequence[Tensor] = (),
    sample: Sample | None = None,
) -> Tensor:
    """As fused_apply.move_along, but for the above."""
    tensors = flats([weights, *along, *(t for d in directions for t in parts(d))])
    if tensors is None:  # memory in another order
        return fused_apply.move_along(weights, directions, coefficients, along=along, sample=sample)
    flat, terms = tensors[id(weights)], [flat_of(d, tensors) for d in directions]
    if sample is not None:  # before the weights move: a direction may be measured from them
        sample.values.copy_(_delta_at(sample.positions, terms, coefficients, weights.dtype))
    with torch.compiler.set_stance(WHERE_NOT_PREPARED):
        return _move(flat, terms, coefficients, [tensors[id(t)] for t in along])


def _move(
    flat: Tensor, terms: Sequence[Direction], coefficients: Sequence[float], along: Sequence[Tensor]
) -> Tensor:
    # From pinned memory: a plain copy to the device would wait for it.
    wide = torch.promote_types(flat.dtype, torch.float32)
    values = torch.tensor(coefficients, dtype=wide, pin_memory=flat.is_cuda)
    minuends = [parts(term)[0] for term in terms]
    subtrahends = [term.subtrahend if isinstance(term, Difference) else None for term in terms]
    values = values.to(flat.device, non_blocking=True)
    return _compiled("inductor")(flat, minuends, subtrahends, values, list(along))


def _delta_at(
    positions: Tensor, terms: Sequence[Direction], coefficients: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """(n,) of `dtype`."""
    at = partial(torch.index_select, dim=0, index=positions)
    minuends = [at(parts(term)[0]) for term in terms]
    subtrahends = [at(term.subtrahend) if isinstance(term, Difference) else None for term in terms]
    delta = torch.zeros(
        positions.shape, dtype=torch.promote_types(dtype, torch.float32), device=positions.device
    )
    return _sum(delta, minuends, subtrahends, list(coefficients)).to(dtype)


def _sum(
    delta: Tensor,
    minuends: list[Tensor],
    subtrahends: list[Tensor | None],
    coefficients_K: Tensor | list[float],
) -> Tensor:
    for k, (minuend, subtrahend) in enumerate(zip(minuends, subtrahends, strict=True)):
        direction = minuend.to(delta.dtype)
        if subtrahend is not None:
            direction = direction - subtrahend.to(delta.dtype)
        delta = delta + coefficients_K[k] * direction
    return delta


def _expression(
    weights: Tensor,
    minuends: list[Tensor],
    subtrahends: list[Tensor | None],
    coefficients_K: Tensor,
    along: list[Tensor],
) -> Tensor:
    delta = torch.zeros_like(weights, dtype=coefficients_K.dtype)
    delta = _sum(delta, minuends, subtrahends, coefficients_K).to(weights.dtype)
    for tensor in along:
        tensor.add_(delta)
    weights.add_(delta)
    return delta.float().square().sum()


@cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    """One kernel for any length: the numbers of terms and the types are what it is compiled for."""
    return torch.compile(_expression, backend=backend, dynamic=True, fullgraph=True)
