"""Held batches: the loss of some training batches of other people's loops, before and after a jump.

A guard must compare the same batches at different weights, so what computes a loss is kept with the values it
saw: `bound_now` copies a closure with its free variables and globals as they are at the call. Looking
disturbs nothing: modules keep their modes, torch its random state, statistics of layers their values, and
no gradient is made. Trains nothing and judges nothing.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from trainer_node.snapshot import random_state, set_random_state

LossOf = Callable[[], Any]
# What a loader may overwrite for the next batch is copied; a whole data set that a closure indexes is not.
MAX_COPIED_BYTES = 64 << 20


class Held:
    """One batch under the autocast of the moment: who owns the backward pass may have opened it around."""

    def __init__(self, loss_of: LossOf) -> None:
        self.loss_of = loss_of
        enabled = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in enabled]

    def loss(self) -> Any:
        with ExitStack() as open_things:
            for kind, dtype in self._autocast:
                open_things.enter_context(torch.autocast(kind, dtype=dtype))
            return self.loss_of()


class HeldBatches:
    def __init__(self, model: nn.Module, device: torch.device, *, count: int, given: LossOf | None) -> None:
        """`given` computes the mean loss of batches that its owner holds back, and replaces holding."""
        self._model, self._device, self._count, self._given = model, device, count, given
        self._held: list[Held] = []
        self._saved: list[tuple[Any, ...]] = []  # of a former process: they wait for a loss function

    @property
    def is_ready(self) -> bool:
        return self._given is not None or len(self._held) == self._count

    def offer(self, loss_of: LossOf) -> None:
        """A batch of this step: kept if there are too few."""
        if self._saved and isinstance(loss_of, functools.partial):
            self._held = [Held(functools.partial(loss_of.func, *batch)) for batch in self._saved]
            self._saved = []
        if not self.is_ready:
            self._held.append(Held(bound_now(loss_of)))

    def saved(self) -> list[tuple[Any, ...]]:
        """The batches that were given to `step(loss_of, batch)`; a closure, or a model among them, cannot be
        saved: [], and others are held after a resume.
        """
        batches = [held.loss_of.args for held in self._held if isinstance(held.loss_of, functools.partial)]
        leaves = tree_leaves(batches)
        is_plain = all(isinstance(leaf, (Tensor, int, float, str)) or leaf is None for leaf in leaves)
        return batches if is_plain and len(batches) == self._count else []

    def load(self, saved: list[tuple[Any, ...]]) -> None:
        """The reverse, before the first step."""
        self._saved = [tuple(batch) for batch in saved]

    def loss(self) -> float:
        """Mean over the held batches, in evaluation mode. Synchronises.

        Raises what the closures raise, and TypeError where they give no single number.
        """
        loss_of = [self._given] if self._given is not None else [held.loss for held in self._held]
        assert loss_of, "no batch was held"
        random = random_state(self._device)
        try:
            with torch.no_grad(), evaluating(self._model):
                losses = [_number(compute()) for compute in loss_of]
        finally:
            set_random_state(random, self._device)
        return sum(losses) / len(losses)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then for every module the mode it had: a frozen BatchNorm stays frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def bound_now(closure: LossOf) -> LossOf:
    """`closure` with what it reads itself bound to what that is now.

    Free variables and the globals that its code names; tensors of at most MAX_COPIED_BYTES are copied, except
    parameters and what is part of a graph. What the functions that it calls read is as it will be then: give
    `step(loss_of, batch)` the batch where that matters.
    """
    if isinstance(closure, functools.partial):
        return functools.partial(bound_now(closure.func), *_own(closure.args), **_own(closure.keywords))
    if not isinstance(closure, types.FunctionType):
        return closure  # a bound method or an object that can be called knows its own batch
    names = _named_in(closure.__code__)
    globals_now = {
        name: _own(value) if name in names else value for name, value in closure.__globals__.items()
    }
    cells = tuple(types.CellType(_own(cell.cell_contents)) for cell in closure.__closure__ or ())
    bound = types.FunctionType(closure.__code__, globals_now, closure.__name__, closure.__defaults__, cells)
    bound.__kwdefaults__ = closure.__kwdefaults__
    return bound


def _named_in(code: types.CodeType) -> set[str]:
    """Names that the code reads, and the functions written inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_named_in, inner))


def _own(value: Any) -> Any:
    """The value itself, or a copy of it where it holds a tensor that a loader may overwrite."""
    if not any(map(_may_be_overwritten, tree_leaves(value))):
        return value
    return tree_map(lambda leaf: leaf.clone() if _may_be_overwritten(leaf) else leaf, value)


def _may_be_overwritten(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter) or leaf.requires_grad:
        return False
    return leaf.numel() * leaf.element_size() <= MAX_COPIED_BYTES


def _number(loss: Any) -> float:
    """Of a loss, or of what a model with labels gives (`.loss`, or a mapping with one)."""
    found = loss_in(loss)
    if found is None:
        raise TypeError(f"the loss function gave {type(loss).__name__}: it must give a tensor of one number")
    return float(found.mean())


def loss_in(output: Any) -> Tensor | None:
    """The loss: a tensor itself, `output.loss`, `output["loss"]`; None if there is none."""
    if isinstance(output, Tensor):
        return output
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None
