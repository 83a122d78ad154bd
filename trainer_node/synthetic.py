"""Batches of a synthetic regression: a fixed random teacher, inputs drawn by position.

The teacher has TEACHER_LAYERS tanh layers of TEACHER_WIDTH and is the same for ever (its weights come from
TEACHER_SEED); its outputs are scaled to about unit variance, so a loss of 1 is the mean and 0 the
teacher. Inputs are standard normal and never repeat: batch `position` is drawn from (seed, position),
so there is nothing to save. Guard and held-out batches are drawn from streams of their own.

B examples, I inputs, O outputs.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from trainer_node.data import Batch, place
from trainer_node.model.mlp import INPUTS, OUTPUTS

TEACHER_LAYERS, TEACHER_WIDTH = 2, 64
TEACHER_GAIN = 2.5  # tanh saturates: the best linear student is left with a loss of 0.33
TEACHER_SEED = 20261121
TARGET_NOISE = 0.05  # standard deviation, on training and guard targets only
_TRAIN, _GUARD, _HELD_OUT = range(3)


class Teacher:
    """The fixed function that the student is to find; numpy, so that a batch costs no torch state."""

    def __init__(self) -> None:
        random = np.random.default_rng(TEACHER_SEED)
        sizes = [INPUTS, *[TEACHER_WIDTH] * TEACHER_LAYERS]
        self._layers = [
            (random.normal(size=(rows, columns)) * TEACHER_GAIN / math.sqrt(rows)).astype(np.float32)
            for rows, columns in pairwise(sizes)
        ]
        read_out = random.normal(size=(TEACHER_WIDTH, OUTPUTS)) / math.sqrt(TEACHER_WIDTH)
        hidden = self._hidden(random.normal(size=(4096, INPUTS)).astype(np.float32))
        self._read_out = (read_out / (hidden @ read_out).std(axis=0)).astype(np.float32)

    def __call__(self, inputs_BI: np.ndarray) -> np.ndarray:
        """(B, O) float32 from (B, I) float32."""
        return np.asarray(self._hidden(inputs_BI) @ self._read_out)

    def _hidden(self, inputs_BI: np.ndarray) -> np.ndarray:
        stream = inputs_BI
        for weights in self._layers:
            stream = np.tanh(stream @ weights)
        return stream


@cache
def teacher() -> Teacher:
    return Teacher()


class RegressionBatches:
    """Training batches: (B, I) float32 inputs, (B, O) float32 targets with a little noise."""

    def __init__(self, *, sequences: int, seed: int, guard_batches: int, device: torch.device) -> None:
        self._sequences, self._seed, self._device = sequences, seed, device
        self._guard_batches = guard_batches

    def batch(self, position: int) -> Batch:
        return self._drawn(_TRAIN, position)

    def epoch(self, position: int) -> float:
        """Always 0: nothing is ever seen twice."""
        return 0.0

    def guard(self, index: int) -> Batch:
        if not 0 <= index < self._guard_batches:
            raise IndexError(f"guard batch {index} of {self._guard_batches}")
        return self._drawn(_GUARD, index)

    def _drawn(self, kind: int, number: int) -> Batch:
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, kind, number])))
        return drawn_batch(random, self._sequences, noise=TARGET_NOISE, device=self._device)


def held_out_regression(*, sequences: int, batches: int, device: torch.device) -> tuple[Batch, ...]:
    """The same examples in every run, without noise: the loss is the distance to the teacher."""
    random = np.random.default_rng([TEACHER_SEED, _HELD_OUT])
    return tuple(drawn_batch(random, sequences, noise=0.0, device=device) for _ in range(batches))


def drawn_batch(random: np.random.Generator, count: int, *, noise: float, device: torch.device) -> Batch:
    inputs_BI = random.standard_normal((count, INPUTS), dtype=np.float32)
    noise_BO = random.standard_normal((count, OUTPUTS), dtype=np.float32)
    targets_BO = teacher()(inputs_BI) + np.float32(noise) * noise_BO
    return Batch(place(inputs_BI, device), place(targets_BO, device))
