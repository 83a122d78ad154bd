"""What phi learns from: sampled weights of one run, one sample a window, and pairs (base, later end) of them.

Jumps need no care here: the trainer sends the path of real steps (trainer_node/weight_history.py), as if no
jump had ever moved a weight, and a refused jump undoes no decision point. A window that comes again
(the trainer went back to a checkpoint) drops all from there on; a gap starts the run anew. Learns nothing.

G groups, S sampled weights, J displacements, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.messages import DecisionPoint
from predictor_node.phi_net import Ahead, Past

HORIZON_WINDOWS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSample:
    window: int
    window_steps: int  # real steps of this window, >= 1
    steps_done: int  # real steps of the run so far
    rate: float  # learning-rate factor of this window, 1 = peak
    weights_GS: np.ndarray  # float32; NaN is padding


def window_sample(
    point: DecisionPoint, *, num_groups: int, window_steps: int, steps_done: int, rate: float
) -> WindowSample | None:
    """From a decision point; None where it carries no weights, or not of whole groups."""
    row_bytes = num_groups * np.dtype("<f4").itemsize
    if not point.weights or len(point.weights) % row_bytes:
        return None
    weights_GS = np.frombuffer(point.weights, dtype="<f4").reshape(num_groups, -1).astype(np.float32)
    return WindowSample(
        window=point.window,
        window_steps=point.window_steps or window_steps,
        steps_done=steps_done,
        rate=rate,
        weights_GS=weights_GS,
    )


@dataclass
class SampledRun:
    """Contiguous windows of one run, oldest first, at most `limit` of them."""

    total_steps: int
    limit: int
    samples: list[WindowSample] = field(default_factory=list)

    def add(self, sample: WindowSample) -> bool:
        """Whether it follows the newest one; False when samples were dropped for it, or it is the first."""
        kept = [s for s in self.samples if s.window < sample.window]
        fits = bool(kept) and kept[-1].window + 1 == sample.window
        fits = fits and kept[-1].weights_GS.shape == sample.weights_GS.shape
        goes_on = fits and len(kept) == len(self.samples)
        self.samples = [*(kept if fits else []), sample][-self.limit :]
        return goes_on

    def past(self, bases: Sequence[int], num_differences: int, columns: slice = slice(None)) -> Past:
        """Of the samples at these positions, each at least `num_differences`."""
        weights_WGN = self._weights(columns)
        valid_GN = torch.isfinite(weights_WGN).all(dim=0)
        weights_WGN = torch.where(valid_GN, weights_WGN, 0.0)
        steps = torch.tensor([float(s.window_steps) for s in self.samples])
        ages = torch.arange(num_differences)
        at_PJ = torch.tensor(list(bases))[:, None] - ages[None]
        steps_PJ = steps[at_PJ]
        spacing_PJ = steps_PJ.mean(dim=1, keepdim=True) / steps_PJ
        difference_PJGN = weights_WGN[at_PJ] - weights_WGN[at_PJ - 1]
        newest = [self.samples[base] for base in bases]
        return Past(
            velocity_PJGN=difference_PJGN * spacing_PJ[:, :, None, None],
            weights_PGN=weights_WGN[list(bases)],
            valid_GN=valid_GN,
            spacing_PJ=spacing_PJ,
            rate_P=torch.tensor([float(s.rate) for s in newest]),
            progress_P=torch.tensor([s.steps_done / max(1, self.total_steps) for s in newest]),
        )

    def ahead(self, bases: Sequence[int], ends: Sequence[int], num_differences: int) -> Ahead:
        """What lay between bases and later ends: length in the base's mean windows, mean rate."""
        windows, rates = [], []
        for base, end in zip(bases, ends, strict=True):
            steps = np.array([s.window_steps for s in self.samples[base + 1 : end + 1]], dtype=np.float64)
            rate = np.array([s.rate for s in self.samples[base + 1 : end + 1]], dtype=np.float64)
            windows.append(float(steps.sum()) / self.mean_window_steps(base, num_differences))
            rates.append(float(steps @ rate / steps.sum()))
        return Ahead(windows_P=torch.tensor(windows), rate_P=torch.tensor(rates))

    def moved(self, bases: Sequence[int], ends: Sequence[int], columns: slice = slice(None)) -> Tensor:
        """(P, G, N) displacements that happened; zero where there is padding."""
        weights_WGN = self._weights(columns)
        return torch.nan_to_num(weights_WGN[list(ends)] - weights_WGN[list(bases)], posinf=0.0, neginf=0.0)

    def mean_window_steps(self, base: int, num_differences: int) -> float:
        newest = self.samples[base - num_differences + 1 : base + 1]
        return float(np.mean([s.window_steps for s in newest]))

    def ends_of(self, base: int) -> list[int]:
        """The later samples that a base is paired with: 1, 2, 4, 8 windows ahead and the last one."""
        last = len(self.samples) - 1
        near = [base + ahead for ahead in HORIZON_WINDOWS if base + ahead <= last]
        return near if base + HORIZON_WINDOWS[-1] >= last else [*near, last]

    def _weights(self, columns: slice) -> Tensor:
        return torch.from_numpy(np.stack([s.weights_GS[:, columns] for s in self.samples]))
