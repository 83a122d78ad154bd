"""A fixed random choice of weights in each group: what is measured on a part of them is measured on these.

Owns where the chosen weights lie, not what is done with their values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer_node.groups import ParameterGroup
from trainer_node.split import local_of


class WeightSample:
    """A fixed random choice of m weights in each group (all of them, padded, where there are fewer).

    Where parameters are cut among ranks the choice is the same; a rank gathers those that it holds.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        sample_size: int,
        *,
        seed: int,
        starts: Sequence[int] | None = None,
    ) -> None:
        """`starts`: per parameter, which of its weights (read flat) is this rank's first; default: 0."""
        firsts = iter(starts if starts is not None else [0] * sum(len(group.parameters) for group in groups))
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
            begins = np.cumsum([0, *sizes])
            for begin, parameter in zip(begins[:-1], group.parameters, strict=True):
                held = local_of(parameter)
                start = begin + next(firsts)
                low, high = np.searchsorted(chosen, [start, start + held.numel()])
                positions = torch.from_numpy(chosen[low:high] - start).to(held.device)
                self._places.append((group_index, int(low), positions))
        self.inflation_G = torch.tensor(inflation, dtype=torch.float32)

    def place_of(self, index: int) -> tuple[int, int, Tensor]:
        """Of parameter `index`: group, first column there, flat positions (n,) of its chosen weights."""
        return self._places[index]

    def gather(self, out_GKm: Tensor, index: int, flats: Sequence[Tensor]) -> None:
        """Write the sampled values of parameter `index` into out (G, K, m)."""
        group, first, positions = self.place_of(index)
        for direction, flat in enumerate(flats):
            out_GKm[group, direction, first : first + len(positions)] = flat.index_select(0, positions)
