"""A fixed random choice of weights in each group: what is measured on a part of them is measured on these.

Owns where the chosen weights lie, not what is done with their values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer_node.groups import ParameterGroup


class WeightSample:
    """A fixed random choice of m weights in each group (all of them, padded, where there are fewer)."""

    def __init__(self, groups: Sequence[ParameterGroup], sample_size: int, *, seed: int) -> None:
        rng = np.random.default_rng([seed, 0xBA515])
        self._places: list[tuple[int, int, Tensor]] = []  # group, first column, flat positions
        self.sizes_G: list[int] = []  # chosen weights; the columns from here on are padding
        inflation = []
        for group_index, group in enumerate(groups):
            sizes = [p.numel() for p in group.parameters]
            total = sum(sizes)
            if total > sample_size:
                chosen = np.sort(rng.choice(total, sample_size, replace=False))
            else:
                chosen = np.arange(total)
            inflation.append(total / len(chosen))
            self.sizes_G.append(len(chosen))
            starts = np.cumsum([0, *sizes])
            for start, end, parameter in zip(starts[:-1], starts[1:], group.parameters, strict=True):
                low, high = np.searchsorted(chosen, [start, end])
                positions = torch.from_numpy(chosen[low:high] - start).to(parameter.device)
                self._places.append((group_index, int(low), positions))
        self.inflation_G = torch.tensor(inflation, dtype=torch.float32)

    def gather(self, out_GKm: Tensor, index: int, flats: Sequence[Tensor]) -> None:
        """Write the sampled values of parameter `index` into out (G, K, m)."""
        group, first, positions = self._places[index]
        for direction, flat in enumerate(flats):
            out_GKm[group, direction, first : first + len(positions)] = flat.index_select(0, positions)
