"""What surrounds the base optimizer in the arms that are not ours: averages, slow weights, pushes.

A Method owns the optimizers of a run and is told before and after every step; `read_out` lends the
weights that the arm would hand out. Schedule-Free and Lookahead come from their libraries, averaged
weights from torch; SNOO and EMA-Nesterov are here. No method takes extra passes through the model.
Knows no tasks, takes no steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.errors import EnvironmentFault
from common.schedule import decay_start_step, rate_factor
from common.settings import TrainerSettings
from trainer_node.optim.build import build_optimizers

TAIL_FACTOR = 0.2  # linear and cosine have no kink: their tail begins where the rate is this low


@dataclass(frozen=True, kw_only=True)
class MethodInput:
    """All that a method is made of."""

    model: nn.Module
    device: torch.device
    settings: TrainerSettings
    knobs: Mapping[str, Any]

    def base_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.model, self.settings.optimizer, self.device)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


class Method:
    """The base optimizer alone; the others extend it."""

    has_read_out = False  # whether read_out lends other weights than the raw ones

    def __init__(self, given: MethodInput) -> None:
        self.optimizers = given.base_optimizers()

    def before_step(self, step: int) -> None:
        """`step` counts from 0; the rates are set."""

    def after_step(self, step: int) -> None:
        """The optimizers have moved the weights."""

    @contextmanager
    def read_out(self) -> Iterator[None]:
        """Inside it the model holds what the arm would hand out; after it, the raw weights again."""
        yield


class EmaReadOut(Method):
    """Exponential average of the weights; its time constant is `average_share` of the planned steps."""

    has_read_out = True

    def __init__(self, given: MethodInput) -> None:
        super().__init__(given)
        self._model, self._parameters = given.model, given.parameters()
        constant_steps = max(1.0, given.knobs["average_share"] * given.settings.steps)
        average = get_ema_multi_avg_fn(1.0 - 1.0 / constant_steps)
        self._averaged = AveragedModel(given.model, multi_avg_fn=average)

    def after_step(self, step: int) -> None:
        self._averaged.update_parameters(self._model)

    @contextmanager
    def read_out(self) -> Iterator[None]:
        averaged = [p.detach() for p in self._averaged.module.parameters() if p.requires_grad]
        with lent_weights(self._parameters, averaged):
            yield


class ScheduleFree(Method):
    """`schedulefree.AdamWScheduleFree` (arXiv 2405.15682). Raw weights are its y, the read-out its x."""

    has_read_out = True

    def __init__(self, given: MethodInput) -> None:
        options = given.settings.optimizer
        # The groups of the base AdamW: what decays there decays here.
        groups = [
            {key: group[key] for key in ("params", "weight_decay", "peak_rate")}
            for optimizer in given.base_optimizers()
            for group in optimizer.param_groups
        ]
        self._optimizer = library("schedulefree").AdamWScheduleFree(
            groups, lr=options.rate, betas=(options.beta1, options.beta2)
        )
        self.optimizers = [self._optimizer]
        self._parameters = given.parameters()

    def before_step(self, step: int) -> None:
        self._optimizer.train()

    @contextmanager
    def read_out(self) -> Iterator[None]:
        # Its way there and back is an interpolation that costs the last bits: put them back.
        with lent_weights(self._parameters, self._parameters):
            self._optimizer.eval()
            yield
        for group in self._optimizer.param_groups:
            group["train_mode"] = True


class Lookahead(Method):
    """`pytorch_optimizer.Lookahead` (arXiv 1907.08610) around each base optimizer."""

    def __init__(self, given: MethodInput) -> None:
        wrap = library("pytorch_optimizer").Lookahead
        knobs = given.knobs
        self.optimizers = [
            wrap(optimizer, k=int(knobs["inner_steps"]), alpha=knobs["slow_share"])
            for optimizer in given.base_optimizers()
        ]


class Snoo(Method):
    """Step-K Nesterov on the displacement (SNOO, arXiv 2510.15830).

    Every K steps, with w the slow weights and theta the fast ones: g = w - theta, m <- mu m + g,
    w <- w - rate (g + mu m), theta <- w. Rate 1 and momentum 0 are the base optimizer.
    """

    def __init__(self, given: MethodInput) -> None:
        super().__init__(given)
        self._inner_steps = int(given.knobs["inner_steps"])
        self._parameters = given.parameters()
        self._slow = [p.detach().clone() for p in self._parameters]
        self._outer = torch.optim.SGD(
            self._slow,
            lr=given.knobs["outer_rate"],
            momentum=given.knobs["outer_momentum"],
            nesterov=given.knobs["outer_momentum"] > 0,
        )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if (step + 1) % self._inner_steps:
            return
        for slow, parameter in zip(self._slow, self._parameters, strict=True):
            slow.grad = slow - parameter
        self._outer.step()
        torch._foreach_copy_(self._parameters, self._slow)


class EmaNesterov(Method):
    """The gradient is taken at weights pushed along an average of past updates (arXiv 2605.25395).

    With u the update of a step and e <- e + (u - e) / n its average, the gradient of the next step is that
    at theta + push * factor * e, factor being the schedule's; the update starts from theta. No push in
    warm-up and in the decay tail, where the paper's winning entry had none either.
    """

    def __init__(self, given: MethodInput) -> None:
        super().__init__(given)
        self._settings = given.settings
        self._push_steps = float(given.knobs["push_steps"])
        self._weight = 1.0 / max(1.0, given.knobs["push_average_steps"])
        self._parameters = given.parameters()
        self._average = [torch.zeros_like(p) for p in self._parameters]
        self._before = [p.detach().clone() for p in self._parameters]
        # The first optimizer to step finds the weights where they were before the push.
        self.optimizers[0].register_step_pre_hook(lambda *_: self._take_back())

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        torch._foreach_copy_(self._before, self._parameters)
        if push := self.push_at(step):
            torch._foreach_add_(self._parameters, self._average, alpha=push)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        updates = torch._foreach_sub(self._parameters, self._before)
        torch._foreach_lerp_(self._average, updates, self._weight)

    def push_at(self, step: int) -> float:
        """Steps' worth of the average update, for the gradient of `step`."""
        schedule, total = self._settings.schedule, self._settings.steps
        factor = rate_factor(step, total, schedule)
        if schedule.name in ("wsd", "constant"):
            is_tail = step >= decay_start_step(total, schedule)
        else:
            is_tail = factor <= TAIL_FACTOR
        return 0.0 if step < schedule.warmup_steps or is_tail else self._push_steps * factor

    @torch.no_grad()
    def _take_back(self) -> None:
        torch._foreach_copy_(self._parameters, self._before)


METHODS: Mapping[str, Callable[[MethodInput], Method]] = {
    "plain": Method,
    "ema": EmaReadOut,
    "schedule-free": ScheduleFree,
    "lookahead": Lookahead,
    "snoo": Snoo,
    "ema-nesterov": EmaNesterov,
}


@contextmanager
def lent_weights(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Put `values` into the parameters; afterwards the former bits are back."""
    with torch.no_grad():
        former = [p.detach().clone() for p in parameters]
        torch._foreach_copy_(list(parameters), list(values))
        try:
            yield
        finally:
            torch._foreach_copy_(list(parameters), former)


def library(name: str) -> ModuleType:
    """Raises EnvironmentFault naming the cure where the library is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise EnvironmentFault(
            f"this arm needs the library {name}: pip install 'hybrid-predict-trainer[race]'"
        ) from None
