"""Numbers of any size made small, and a distribution over numbers as weights on fixed bins.

symlog, symexp and the two-hot code follow DreamerV3 (Hafner et al., arXiv 2301.04104, sections 2 and B);
distributions over fixed bins go back to Bellemare et al. (arXiv 1707.06887). Owns no learned weight.
The bins are symexp of an even grid and means are taken over the bins themselves, so a mean is in the
target's own unit and not biased by the compression.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def symlog(x: np.ndarray) -> np.ndarray:
    """sign(x) * ln(1 + |x|), elementwise; the dtype stays."""
    return np.copysign(np.log1p(np.abs(x)), x)


def symexp(x: np.ndarray) -> np.ndarray:
    """The inverse of symlog."""
    return np.copysign(np.expm1(np.abs(x)), x)


class TwoHot:
    """Code of a number as weights on its two neighbouring bins, so that their mean is the number."""

    def __init__(self, num_bins: int, limit: float) -> None:
        """`num_bins` (odd, so that zero is one of them) from symexp(-limit) to symexp(limit)."""
        if num_bins < 3 or num_bins % 2 == 0 or not limit > 0.0:
            raise ValueError(f"{num_bins} bins to {limit}: needs an odd number from 3 and a limit above 0")
        grid = np.linspace(-limit, limit, num_bins)
        self.grid = torch.tensor(grid, dtype=torch.float32)  # (bins) symlog of the bins
        self.bins = torch.tensor(symexp(grid), dtype=torch.float32)  # (bins) rising, symmetric about 0

    def encode(self, x: Tensor) -> Tensor:
        """(...) -> (..., bins): at least 0, sum 1, at most two not zero. Beyond the last bin: that bin."""
        inside = x.clamp(self.bins[0], self.bins[-1]).contiguous()
        low = (torch.searchsorted(self.bins, inside, right=True) - 1).clamp(0, len(self.bins) - 2)
        start, end = self.bins[low], self.bins[low + 1]
        share = ((inside - start) / (end - start)).unsqueeze(-1)
        code = torch.zeros(*x.shape, len(self.bins))
        code.scatter_(-1, low.unsqueeze(-1), 1.0 - share)
        return code.scatter_(-1, low.unsqueeze(-1) + 1, share)

    def mean(self, probabilities: Tensor) -> Tensor:
        """(..., bins) -> (...)."""
        return (probabilities * self.bins).sum(-1)

    def variance(self, probabilities: Tensor) -> Tensor:
        """(..., bins) -> (...), about the mean; the width of the bins included."""
        offset = self.bins - self.mean(probabilities).unsqueeze(-1)
        return (probabilities * offset * offset).sum(-1)

    def bell(self, width: float) -> Tensor:
        """(bins) logits of a bell about zero, `width` in symlog units: what is believed before any data."""
        return -0.5 * (self.grid / width) ** 2
