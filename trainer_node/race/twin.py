"""Several roads from one moment of a run, each trained on the same batches; then the run goes on untouched.

    with Crossroads(loop) as here:
        twin = here.road(nothing, [0, 20, 50])     # the run without a jump
        road = here.road(jump, [0, 20, 50])        # the same batches, random draws and rates with it

A road is plain training under the controls in force: no decisions, no windows. Everything that a step changes
is put back bit for bit before every road and on leaving: weights, buffers, optimizers, rates, basis, random
state, gradients.
Judges nothing; costs no entry in the ledger of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor

from common.control_rules import any_on
from trainer_node.controls import MicroBatches, halved, pieces_of, steps_left
from trainer_node.loop import Loop
from trainer_node.noise_scale import is_measured
from trainer_node.optim.build import set_rates
from trainer_node.optim.moments import follow_batch
from trainer_node.progress import Progress, plan_of
from trainer_node.snapshot import MemoryStore, Snapshot
from trainer_node.step import autocast, equally, make_gradients, mean_loss, update
from trainer_node.step_taken import StepTaken


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A road after some steps. Losses in nats."""

    steps: int  # real steps since the crossroads
    held_out: float
    guard: float  # on the batches that judge jumps
    weights_Gm: Tensor  # the basis' sample of the weights


def nothing() -> None:
    """The change of the road without a jump."""


class Crossroads:
    """A moment of a loop that holds a basis. Roads may be tried between the steps of the loop only."""

    def __init__(self, loop: Loop) -> None:
        if loop.basis is None:
            raise ValueError("a run without prediction holds no directions to try")
        self._loop, self._basis = loop, loop.basis
        progress = loop.progress
        self.steps_left = max(0, steps_left(progress.controls, loop.settings, progress.clock))
        self._micro_batches = MicroBatches(lambda position: loop.task.train.batch(position))
        self._context = partial(autocast, loop.task.device, loop.settings.precision)
        self._saved = _save(loop)

    def __enter__(self) -> Crossroads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saved.restore()

    def road(self, change: Callable[[], object], read_at: Sequence[int]) -> dict[int, Reading]:
        """Set all back, make the change, train on; readings by step, those beyond the run's end left out."""
        self._saved.restore()
        change()
        stops = sorted({stop for stop in read_at if 0 <= stop <= self.steps_left})
        readings, done, progress = {}, 0, self._loop.progress.copy()
        for stop in stops:
            while done < stop:
                self._step(progress)
                done += 1
            readings[stop] = self._read(stop)
        return readings

    def set_back(self) -> None:
        self._saved.restore()

    def last(self, steps: int) -> int:
        """So many steps, or as many as are left."""
        return min(steps, self.steps_left)

    def _step(self, progress: Progress) -> None:
        """The next step of a road that has come to `progress`: as Loop takes it, but unobserved."""
        task, settings, optimizers = self._loop.task, self._loop.settings, self._loop.optimizers
        plan = plan_of(progress, settings)
        set_rates(optimizers, plan.rate_factor)
        if settings.controls.batch_betas:
            follow_batch(optimizers, plan.betas, steps=plan.moment_steps)
        batches = self._micro_batches.of(plan)
        if plan.is_as_configured:
            pieces = equally(batches)
        else:
            pieces = pieces_of(batches, size=plan.micro_batch_items, context_tokens=plan.context_tokens)
        if any_on(settings.controls) and is_measured(plan.number):
            pieces = halved(pieces)
        loss = make_gradients(task.model, task.loss, pieces, optimizers, context=self._context)
        tensors = update(loss, optimizers, self._loop.groups, clip_norm=settings.optimizer.clip_norm)
        progress.count(
            StepTaken(
                tensors=tensors,
                rate_factor=plan.rate_factor,
                nominal_steps=plan.nominal_steps,
                passes=0.0,
                seconds=0.0,
                wall_seconds=0.0,
                data_seconds=0.0,
            )
        )

    def _read(self, steps: int) -> Reading:
        task = self._loop.task
        return Reading(
            steps=steps,
            held_out=mean_loss(task.model, task.loss, task.validation, context=self._context),
            guard=self._loop.guard_loss(),
            weights_Gm=self._basis.sampled(self._basis.parameters),
        )


@dataclass(frozen=True)
class _Saved:
    loop: Loop
    snapshot: Snapshot
    basis: dict[str, Tensor]
    rates: list[dict[str, Any]]
    gradients: list[Tensor | None]

    def restore(self) -> None:
        self.snapshot.restore()
        assert self.loop.basis is not None
        self.loop.basis.load({name: tensor.clone() for name, tensor in self.basis.items()})
        groups = [group for optimizer in self.loop.optimizers for group in optimizer.param_groups]
        for group, kept in zip(groups, self.rates, strict=True):
            group.update(kept)
        for parameter, gradient in zip(self.loop.basis.parameters, self.gradients, strict=True):
            parameter.grad = gradient


def _save(loop: Loop) -> _Saved:
    assert loop.basis is not None
    parameters = loop.basis.parameters
    buffers = [buffer.detach() for buffer in loop.task.model.buffers()]
    return _Saved(
        loop,
        Snapshot(MemoryStore(), parameters, loop.optimizers, buffers),
        {name: tensor.clone() for name, tensor in loop.basis.tensors().items()},
        [
            {name: value for name, value in group.items() if name != "params"}
            for optimizer in loop.optimizers
            for group in optimizer.param_groups
        ],
        [p.grad for p in parameters],
    )
