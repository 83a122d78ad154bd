"""One pass over memory moves weights as one operation after another: bit for bit, where it says so."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from trainer_node import fused_apply
from trainer_node.averages import ExactAverages
from trainer_node.fused_apply import BLOCK_BYTES, Difference, Direction, Sample, bytes_moved, move_along

COEFFICIENTS = [0.7, -1.3, 0.011, 2.0]
# Below, at and above a block, a length that no vector register divides, and a matrix.
BLOCK_WEIGHTS = BLOCK_BYTES // 4
SHAPES = [(1,), (63,), (BLOCK_WEIGHTS,), (2 * BLOCK_WEIGHTS + 17,), (129, 517)]


@dataclass
class Scene:
    """Weights, an average that moves along, its value at the window's start, and the four directions."""

    weights: Tensor
    average: Tensor
    directions: list[Direction]


def scene(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Scene:
    generator = torch.Generator().manual_seed(5)
    weights, average, start, slow, momentum = (
        torch.randn(shape, generator=generator).to(dtype) for _ in range(5)
    )
    directions = [momentum, Difference(average, start), slow, Difference(average, weights)]
    return Scene(weights, average, directions)


def moved(shape: tuple[int, ...], move, dtype: torch.dtype = torch.float32) -> tuple[Scene, Tensor]:  # type: ignore[no-untyped-def]
    made = scene(shape, dtype)
    square = move(made.weights, made.directions, COEFFICIENTS, along=[made.average])
    return made, square


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Also the sign of a zero."""
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8) if left.ndim else left, right.view(torch.uint8) if right.ndim else right
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_move_weights_and_averages_to_the_very_bits_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    ours, square = moved(shape, move_along, dtype)
    theirs, expected = moved(shape, fused_apply.reference, dtype)
    assert same_bits(ours.weights, theirs.weights)
    assert same_bits(ours.average, theirs.average)
    torch.testing.assert_close(square, expected, rtol=1e-5, atol=0.0)


def test_the_reference_is_what_the_basis_does_with_its_averages() -> None:
    """As delta.linear_deltas and delta.move: directions made as wholes, each added by its own operation."""
    ours, averages = scene((300, 200)), scene((300, 200))
    kept = ExactAverages([averages.weights], average_steps=4, slow_momentum=0.5)
    kept._average[0].copy_(ours.average)
    start = ours.directions[1]
    assert isinstance(start, Difference)
    kept._park.save([start.subtrahend])
    kept._slow[0].copy_(ours.directions[2])  # type: ignore[arg-type]
    whole = [averages.directions[0], kept.drift(0), kept.slow_drift(0), kept.pull_back(0)]
    delta = torch.zeros_like(averages.weights)
    for coefficient, direction in zip(COEFFICIENTS, whole, strict=True):
        delta.add_(direction, alpha=coefficient)  # type: ignore[arg-type]
    averages.weights.add_(delta)
    kept.shift(0, delta)
    move_along(ours.weights, ours.directions, COEFFICIENTS, along=[ours.average])
    assert same_bits(ours.weights, averages.weights)
    assert same_bits(ours.average, kept._average[0])


def test_directions_in_bfloat16_are_added_in_the_type_of_the_weights() -> None:
    weights = torch.randn(70_000, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(70_000, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = weights + 0.3 * direction.float()
    move_along(weights, [direction], [0.3])
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sampled_delta_is_what_the_weights_at_these_places_move_by(shape: tuple[int, ...]) -> None:
    made, expected = scene(shape), scene(shape)
    count = made.weights.numel()
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(3))[: count // 2 + 1]
    sample = Sample(chosen.sort().values, torch.full((len(chosen),), torch.nan))
    delta = torch.zeros_like(expected.weights)
    fused_apply.reference(delta, [d if isinstance(d, Tensor) else d.minuend - d.subtrahend
                                  for d in expected.directions], COEFFICIENTS)  # fmt: skip
    move_along(made.weights, made.directions, COEFFICIENTS, sample=sample)
    assert same_bits(sample.values, delta.view(-1)[sample.positions])
    moved_to = expected.weights.view(-1)[sample.positions] + sample.values
    assert same_bits(made.weights.view(-1)[sample.positions], moved_to)


def test_coefficients_of_zero_touch_no_bit_and_no_direction() -> None:
    weights = torch.tensor([-0.0, 0.0, 1.0])
    unreadable = torch.full((3,), float("nan"))
    square = move_along(weights, [unreadable, unreadable], [0.0, 0.0])
    assert same_bits(weights, torch.tensor([-0.0, 0.0, 1.0]))
    assert square.item() == 0.0
    move_along(weights, [unreadable, torch.ones(3)], [0.0, 1.0])
    assert weights.tolist() == [1.0, 1.0, 2.0]


def test_memory_in_another_order_is_moved_all_the_same() -> None:
    weights = torch.zeros(30, 20).t()
    assert not weights.is_contiguous()
    direction = torch.arange(600.0).view(20, 30)
    square = move_along(weights, [direction], [2.0])
    assert torch.equal(weights, 2.0 * direction)
    assert square.item() == pytest.approx((4.0 * direction.square()).sum().item(), rel=1e-5)


def test_what_must_be_moved_counts_each_tensor_once_and_what_is_written_twice() -> None:
    made = scene((1000,))
    # momentum, average, start, slow, weights: read; weights and average: written.
    assert bytes_moved(made.weights, made.directions, [made.average]) == 7 * 4 * 1000
