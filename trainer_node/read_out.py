"""Which weights count: those of the last step, or their average where the guard batches prefer it.

Asked for by trainer.read_out = average, or by the control of that name, which goes first (Polyak & Juditsky
1992; the decay that a tuned schedule brings, without one). The average takes the place of the weights only
while it is evaluated and is then gone to the last bit; training never sees it. At the very end the finished
model keeps what counts, and the last checkpoint holds it in a file of its own beside the weights that a
resume needs. Buffers (BatchNorm statistics) stay those of the weights: the guard batches decide with them as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.errors import SettingsError
from common.settings import RunSettings
from trainer_node import ledger as purposes
from trainer_node.basis import Basis
from trainer_node.ledger import CHECK_PASSES
from trainer_node.loop import Loop


def check_read_out(settings: RunSettings) -> None:
    """Raises SettingsError when an average is asked for and nobody keeps one."""
    if settings.trainer.read_out == "average" and not settings.predictor.enabled:
        raise SettingsError(
            "trainer.read_out = average needs the averaged weights of the predictor's basis;"
            " set predictor.enabled = true, or trainer.read_out = weights"
        )


@contextmanager
def weights_that_count(loop: Loop) -> Iterator[bool]:
    """Puts them in place while the context lasts; True if they are the averaged ones.

    Costs two checks, counted in the ledger, where an average is asked for, and nothing otherwise.
    Holds one more copy of the weights meanwhile. Not to be entered while a jump is on probation.
    """
    if (loop.progress.controls.read_out or loop.settings.read_out) != "average" or loop.basis is None:
        yield False
        return
    passes = CHECK_PASSES * loop.settings.verify.guard_batches
    with loop.ledger.span(purposes.CHECKS, passes=passes):
        loss_of_weights = loop.guard_loss()
    with _averaged(loop.basis) as put_back:
        with loop.ledger.span(purposes.CHECKS, passes=passes):
            is_average = loop.guard_loss() < loss_of_weights
        if not is_average:
            put_back()
        yield is_average


@contextmanager
def _averaged(basis: Basis) -> Iterator[Callable[[], None]]:
    """The averaged weights in place of the weights; yields what puts the weights back."""
    kept = [p.detach().clone() for p in basis.parameters]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, weights in zip(basis.parameters, kept, strict=True):
            parameter.copy_(weights)

    try:
        with torch.no_grad():
            for index, parameter in enumerate(basis.parameters):
                parameter.add_(basis.averages.pull_back(index))
        yield put_back
    finally:
        put_back()


def copy_of_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def put_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
