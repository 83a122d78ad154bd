"""How sure a model is of its output, against how right: signs of a collapse. On held-out data only.

    entropy        H = mean over places of -sum_v p_v ln p_v
    cross entropy  of the same places: equal to H for a model that is as sure as it may be (calibrated;
                   Guo et al. 2017). H far below it: overconfident.
    information    entropy of the mean output minus H: zero if the output is the same whatever goes in

One batch, at most MAX_PLACES places, because an evaluation reads the mean loss from all batches already and a
mean over this many places is known to a few percent. The logits are asked for by a forward pass without
targets, so that a model that fuses or chunks its loss never has to form them elsewhere; softmax runs over
CHUNK_PLACES at a time. Judges nothing: monitor_node/health.py.

P places (tokens or images), V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer_node.data import Batch
from trainer_node.out_of_memory import OutOfMemory, attempt
from trainer_node.tasks import Task

MAX_PLACES = 2048  # with 50 k classes 400 MB of logits, a fraction of what a training step forms
CHUNK_PLACES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputEntropy:
    """In nats."""

    entropy: float
    cross_entropy: float
    information: float


def measure_output(
    task: Task,
    batch: Batch,
    context: Callable[[], AbstractContextManager[object]],
    *,
    max_items: int | None,
    is_compiled: bool,
) -> OutputEntropy | None:
    """None for a task without classes, and where memory runs out; at most `max_items` of the batch are taken.

    Synchronises; draws no random numbers, changes no weight.
    """
    if task.logits is None:
        return None
    result = attempt(partial(_measured, task, task.logits, batch, context, max_items, is_compiled))
    return None if isinstance(result, OutOfMemory) else result


@torch.no_grad()
def _measured(
    task: Task,
    logits_of: Callable[[Tensor], Tensor],
    batch: Batch,
    context: Callable[[], AbstractContextManager[object]],
    max_items: int | None,
    is_compiled: bool,
) -> OutputEntropy:
    places_each = max(1, batch.targets[0].numel())
    items = max(1, min(max_items or MAX_PLACES, MAX_PLACES // places_each))
    # Another shape of input would cost a compilation of its own, for one pass an evaluation.
    stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    was_training = task.model.training
    task.model.eval()
    try:
        with stance, context():
            logits = logits_of(batch.inputs[:items])
    finally:
        task.model.train(was_training)
    return output_entropy(logits.flatten(0, -2), batch.targets[:items].flatten())


@torch.no_grad()
def output_entropy(logits_PV: Tensor, targets_P: Tensor) -> OutputEntropy:
    """Targets are class numbers, int64; negative ones do not count."""
    counted_P = targets_P >= 0
    logits_PV, targets_P = logits_PV[counted_P], targets_P[counted_P]
    places = max(1, len(targets_P))
    mean_V = torch.zeros(logits_PV.shape[-1], device=logits_PV.device)
    entropy, cross_entropy = mean_V.new_zeros(()), mean_V.new_zeros(())
    for start in range(0, len(targets_P), CHUNK_PLACES):
        targets_C = targets_P[start : start + CHUNK_PLACES]
        logs_CV = logits_PV[start : start + CHUNK_PLACES].float().log_softmax(-1)
        shares_CV = logs_CV.exp()
        entropy -= (shares_CV * logs_CV.clamp(min=-1e4)).sum() / places  # 0 x -inf is not a number
        cross_entropy -= logs_CV.gather(-1, targets_C[:, None]).sum() / places
        mean_V += shares_CV.sum(0) / places
    entropy_of_mean = -torch.special.xlogy(mean_V, mean_V).sum()
    return OutputEntropy(
        entropy=float(entropy),
        cross_entropy=float(cross_entropy),
        information=float(entropy_of_mean - entropy),
    )
