"""Adam's moments where the batch changes: they average over the same number of tokens, and make no leap.

With k times the batch the square-root rule (Malladi et al. 2022, arXiv 2205.10287) multiplies the rate by
sqrt(k), 1 - beta1 and 1 - beta2 by k, and epsilon by 1 / sqrt(k). The rate is control_rules.py's. Here a beta
becomes beta ** k: the same to first order, within (0, 1) for every k, and its half-life in tokens is kept
exactly, as Marek et al. 2025 (arXiv 2507.07101) do with beta2. Adam divides its moments by 1 - beta ** steps:
where the steps are counted in the new batch, so steps / k of them, that number stays what it was, and the
change alone turns no step. Chooses no batch.

Left as they are: epsilon, small beside the root of the second moment; the momentum of Muon and SGD and Lion's
betas, for which we know of no such rule; 8-bit Adam, which counts whole steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def follow_batch(
    optimizers: Sequence[torch.optim.Optimizer], betas: tuple[float, float], *, steps: float
) -> None:
    """Put `betas` in force; `steps` of the batch that they are for are in the moments.

    As it shall stand, and no increment: may be done before every step, and again after a restore or a resume.
    Writes nothing where the betas stand so already.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Adam):
            for group in optimizer.param_groups:
                if tuple(group["betas"]) != betas:
                    group["betas"] = betas
                    _count(optimizer, group["params"], steps)


def _count(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], steps: float) -> None:
    for parameter in parameters:
        counted = optimizer.state.get(parameter, {}).get("step")
        if counted is not None:
            counted.fill_(steps)
