"""Turns a decision into moved weights: besides correct.py the only code but the optimizer that moves them.

delta_theta = sum_k c[g, k] d[g, k], or the displacement of the per-weight forecaster where a decision
brings one; added in place, one parameter at a time: a sum of directions in one pass over memory where that
is faster (fused_apply.py), any other delta made as a whole. On CPU a jump has the same bits either way; not
where the user wants it compiled (compiled_pass.py).
Undoing is not this file's business: adding and subtracting a delta is not exact, so snapshot.py restores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.messages import DIRECTIONS, PhaseDecision
from trainer_node import compiled_pass, fused_apply
from trainer_node.averages import Averages
from trainer_node.basis import Basis
from trainer_node.fused_apply import Direction, Sample
from trainer_node.weight_forecast import WeightForecaster, read_forecaster

_ABLATION_STREAM = 0xAB1A7E
_MOMENTUM = DIRECTIONS.index("momentum")
_log = logging.getLogger(__name__)
# Weights of a parameter from which one pass pays. Below, whole tensors fit into the cache, and the sample,
# taken term by term, costs more than is saved: parity at 128 Ki, 0.4 times the speed at 12 Ki (one thread
# of an Intel Xeon, 2026-11-21).
SMALLEST_ONE_PASS = 256 * 1024


@dataclass(frozen=True, slots=True)
class AppliedDelta:
    norm: float  # L2 over all weights
    sample_Gm: Tensor  # sampled delta
    weights_Gm: Tensor  # sampled weights right after it


def coefficients_of(decision: PhaseDecision) -> Tensor:
    """(G, K) float32; zeros where a forecaster comes without coefficients."""
    shape = decision.num_groups, decision.num_directions
    if not decision.coefficients:
        return torch.zeros(shape)
    return torch.tensor(decision.coefficients, dtype=torch.float32).view(shape)


def forecaster_of(basis: Basis, decision: PhaseDecision) -> WeightForecaster | None:
    """The forecaster that the decision brings; None if it brings none.

    Raises ValueError when it cannot be used: other bytes than expected, or too short a history.
    """
    if not decision.forecaster:
        return None
    if basis.history is None or not basis.history.is_full:
        raise ValueError("too few snapshots of the weights for a forecaster")
    return read_forecaster(
        decision.forecaster, num_groups=basis.num_groups, num_differences=basis.history.num_differences
    )


@torch.no_grad()
def apply_delta(basis: Basis, coefficients_GK: Tensor) -> AppliedDelta:
    """Move the weights; the averages move along, so that a jump is not taken for drift.

    It is `move` by `linear_deltas`, on CPU with the same weights, averages and samples to the bit, and after
    `compile_pass` within the bounds of compiled_pass.py. Of a large parameter no delta and no difference is
    made as a whole, and the norm has another order of summation.
    """
    square, sample_Gm = _nothing_moved(basis)
    rows = coefficients_GK.tolist()
    for index, momentum in basis.momenta(with_momentum=_asks_momentum(coefficients_GK)):
        row = rows[basis.group_of[index]]
        if not any(row):
            continue  # as in linear_deltas
        weights, averages = basis.parameters[index], basis.averages
        if basis.has_compiled_pass and _is_large(weights, averages):
            square += _move_in_one_pass(basis, sample_Gm, index, momentum, row, compiled_pass.move_along)
        elif _fits_one_pass(weights, averages):
            square += _move_in_one_pass(basis, sample_Gm, index, momentum, row, fused_apply.move_along)
        else:
            delta = _linear_delta(weights, [momentum, *basis.window_directions(index)], row)
            square += _move_one(basis, sample_Gm, index, delta)
    return _applied(basis, square, sample_Gm)


@torch.no_grad()
def compile_pass(basis: Basis) -> None:
    """Jumps of this basis take a compiled pass from here on, on CPU and GPU; all ranks together.

    Compiles now, so that no jump waits for it: for the types of the large parameters, with momentum and
    without. Where that is not possible one line is logged, and jumps stay as they are.
    """
    failure = ""
    try:
        for weights, directions, along in _kinds(basis):
            compiled_pass.prepare(weights, directions, along=along)
    except RuntimeError as error:  # whatever is missing, torch tells it by one of these
        failure = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.warning("jumps are not compiled: %s", failure)
    # Other ranks would have other bits.
    basis.has_compiled_pass = not basis.split.ranks.any(failure != "")


def _kinds(basis: Basis) -> Iterator[tuple[Tensor, list[Direction], list[Tensor]]]:
    """Weights, directions and what moves along: one parameter of each type, with momentum and without."""
    averages, seen = basis.averages, set()
    for index, weights in enumerate(basis.parameters):
        if _is_large(weights, averages) and weights.dtype not in seen:
            seen.add(weights.dtype)
            terms, along = averages.terms(index, weights), averages.moved_along(index)
            yield weights, terms, along
            yield weights, [weights.new_zeros(()), *terms], along


@torch.no_grad()
def linear_deltas(basis: Basis, coefficients_GK: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(parameter index, its delta), one at a time; parameters that do not move are left out."""
    rows = coefficients_GK.tolist()
    for index, directions in basis.directions(with_momentum=_asks_momentum(coefficients_GK)):
        row = rows[basis.group_of[index]]
        if not any(row):
            continue  # not even a zero is added: it would make +0.0 of a weight that is -0.0
        yield index, _linear_delta(basis.parameters[index], directions, row)


@torch.no_grad()
def random_deltas(
    deltas: Iterable[tuple[int, Tensor]], *, key: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Each delta replaced by a random one of the same norm, so every group keeps its norm too.

    `key` is (seed, step, attempt): the same on any device, at any time, and apart from torch's own
    random state.
    """
    for index, delta in deltas:
        yield index, _random_like(delta, (*key, index))


@torch.no_grad()
def move(basis: Basis, deltas: Iterable[tuple[int, Tensor]]) -> AppliedDelta:
    square, sample_Gm = _nothing_moved(basis)
    for index, delta in deltas:
        square += _move_one(basis, sample_Gm, index, delta)
    return _applied(basis, square, sample_Gm)


@torch.no_grad()
def equal_parts(basis: Basis, deltas: Iterable[tuple[int, Tensor]], count: int) -> list[tuple[int, Tensor]]:
    """One of `count` equal parts of the whole delta, held on the device: 1 x weights.

    It takes the place of the gradients of the last step, which nothing needs any more: directions that
    are made anew after the first part would be others, since the averages have moved.
    """
    basis.drop_gradients()
    return [(index, delta.div_(count)) for index, delta in deltas]


def _move_in_one_pass(
    basis: Basis,
    sample_Gm: Tensor,
    index: int,
    momentum: Tensor,
    row: Sequence[float],
    move_along: Callable[..., Tensor],
) -> Tensor:
    """|delta|^2, ()."""
    weights, averages = basis.parameters[index], basis.averages
    terms, used = averages.terms(index, weights), [c for k, c in enumerate(row) if k != _MOMENTUM]
    if row[_MOMENTUM] != 0.0:  # else it was not made
        terms, used = [momentum, *terms], [row[_MOMENTUM], *used]
    sample = Sample(*basis.sample_place(sample_Gm, index))
    return move_along(weights, terms, used, along=averages.moved_along(index), sample=sample)


def _fits_one_pass(weights: Tensor, averages: Averages) -> bool:
    """Uncompiled: a large parameter of full precision, on a CPU.

    In half precision torch (2.13) rounds a + c * b otherwise in the last few elements of a tensor than in the
    others (scalar and vector code), so where blocks end would show in the bits. On a GPU a block is a launch.
    """
    keeps_bits = weights.device.type == "cpu" and torch.finfo(weights.dtype).bits >= 32
    return keeps_bits and _is_large(weights, averages)


def _is_large(weights: Tensor, averages: Averages) -> bool:
    """And its averages are not on another device."""
    return averages.are_with_weights and weights.numel() >= SMALLEST_ONE_PASS


def _linear_delta(weights: Tensor, directions: Sequence[Tensor], row: Sequence[float]) -> Tensor:
    delta = torch.zeros_like(weights)
    for coefficient, direction in zip(row, directions, strict=True):
        if coefficient != 0.0:
            delta.add_(direction, alpha=coefficient)
    return delta


def _move_one(basis: Basis, sample_Gm: Tensor, index: int, delta: Tensor) -> Tensor:
    """|delta|^2, ()."""
    basis.parameters[index].add_(delta)
    basis.averages.shift(index, delta)
    basis.sample_into(sample_Gm, index, delta)
    return delta.float().square().sum()


def _asks_momentum(coefficients_GK: Tensor) -> bool:
    return bool(coefficients_GK[:, _MOMENTUM].any())


def _nothing_moved(basis: Basis) -> tuple[Tensor, Tensor]:
    """Sum of squares (), float32, and sampled delta (G, m) before the first parameter."""
    return torch.zeros((), dtype=torch.float32, device=basis.parameters[0].device), basis.empty_sample()


def _applied(basis: Basis, square: Tensor, sample_Gm: Tensor) -> AppliedDelta:
    """After the last parameter, from this rank's parts."""
    for part in (square, sample_Gm):
        basis.split.shards.sum_(part)
    return AppliedDelta(
        norm=float(square.sqrt()), sample_Gm=sample_Gm, weights_Gm=basis.sampled(basis.parameters)
    )


def _random_like(delta: Tensor, key: tuple[int, ...]) -> Tensor:
    """A random direction of the norm of `delta`: a function of the key, on any device."""
    seed = int(np.random.SeedSequence([_ABLATION_STREAM, *key]).generate_state(1, np.uint64)[0] >> 1)
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed)).to(delta)
    norm = torch.linalg.vector_norm
    return noise.mul_(norm(delta) / norm(noise))
