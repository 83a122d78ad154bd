"""What the controls in force make of the next step: its rate, its items, the windows they are cut into.

What a control means and how far it may go is common/control_rules.py's; how far the run is, progress.py's.
Amounts are nominal steps, of the configured batch. They are floats and exact: a batch factor is a power of
two, at least 1/64, and a run has at most 2^40 steps, so all of them are multiples of 1/64 below 2^47, and a
float has 53 bits. Data are counted in items (windows, images): a step may begin and end within a micro-batch,
and every item is used once, in order, whatever the factors were. Moves no weight and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from common.control_rules import any_on, breach, rate_factor_of, schedule_of, still_allowed
from common.errors import SettingsError
from common.messages import Controls
from common.schedule import rate_factor
from common.settings import TrainerSettings
from trainer_node.data import Batch, in_pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    number: int  # of the step, from 1
    rate_factor: float  # times the peak rate
    betas: tuple[float, float]  # of Adam
    moment_steps: float  # of this batch, that are in Adam's moments
    nominal_steps: float  # by which clock and data go on
    first_item: int  # from 0, over the whole run
    items: int
    micro_batch_items: int  # as configured
    context_tokens: int  # of the windows that they are cut into; 0 = they stay whole

    @property
    def is_aligned(self) -> bool:
        """Whether it consists of whole micro-batches of the data's own."""
        size = self.micro_batch_items
        return self.first_item % size == 0 and self.items % size == 0

    @property
    def is_as_configured(self) -> bool:
        """Whole micro-batches with their whole windows: batches of any kind will do."""
        return self.is_aligned and not self.context_tokens


def plan_step(
    controls: Controls, settings: TrainerSettings, *, step: int, clock: float, data_step: float
) -> StepPlan:
    """The step after `step` real ones, at nominal step `clock`, with the data from `data_step` on.

    The last one is as large as what is left, so that a run uses the same number of items whatever its steps
    were; its rate stays that of the batch factor.
    """
    end, schedule = schedule_of(controls, settings)
    left = end - clock
    nominal_steps = min(controls.batch_factor, left) if left > 0 else controls.batch_factor
    items_per_step = settings.batch.sequences * settings.batch.accumulation
    return StepPlan(
        number=step + 1,
        rate_factor=rate_factor(clock, end, schedule)
        * rate_factor_of(controls, settings.controls.batch_rule),
        betas=betas_of(controls, settings),
        moment_steps=clock / controls.batch_factor,
        nominal_steps=nominal_steps,
        first_item=round(data_step * items_per_step),
        items=round(nominal_steps * items_per_step),
        micro_batch_items=settings.batch.sequences,
        context_tokens=controls.context_tokens,
    )


def betas_of(controls: Controls, settings: TrainerSettings) -> tuple[float, float]:
    """Of Adam, in steps of the batch in force: optim/moments.py says why."""
    optimizer, batch_factor = settings.optimizer, controls.batch_factor
    power = batch_factor if settings.controls.batch_betas else 1.0
    return optimizer.beta1**power, optimizer.beta2**power


def steps_left(controls: Controls, settings: TrainerSettings, clock: float) -> int:
    """Real steps from nominal step `clock` to the end of the run, if these controls stay in force."""
    return math.ceil((schedule_of(controls, settings)[0] - clock) / controls.batch_factor)


def most_steps(settings: TrainerSettings) -> int:
    """Real steps that a run can have at most, however small its batches become."""
    controls = settings.controls
    return math.ceil(settings.steps / controls.batch_low) if controls.batch else settings.steps


class MicroBatches:
    """Items of the training data as micro-batches. Keeps the newest one while only a part of it was used."""

    def __init__(self, batch_at: Callable[[int], Batch]) -> None:
        """`batch_at` must be a pure function of the position; with several ranks it gives a part."""
        self._batch_at = batch_at
        self._newest: tuple[int, Batch] | None = None

    def of(self, plan: StepPlan) -> list[Batch]:
        """In order, of the configured size; the last one is what is left. Raises what `batch_at` raises."""
        size, stop = plan.micro_batch_items, plan.first_item + plan.items
        if plan.is_aligned:
            self._newest = None
            return [self._batch_at(position) for position in range(plan.first_item // size, stop // size)]
        starts = range(plan.first_item, stop, size)
        return [self._joined(start, min(start + size, stop), size) for start in starts]

    def _joined(self, start: int, stop: int, size: int) -> Batch:
        """Items [start, stop), from at most two neighbours."""
        parts = []
        for position in range(start // size, -(-stop // size)):
            batch, first = self._at(position), position * size
            mine = slice(max(0, start - first), min(size, stop - first))
            parts.append(Batch(batch.inputs[mine], batch.targets[mine]))
        if len(parts) == 1:
            return parts[0]
        return Batch(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]))

    def _at(self, position: int) -> Batch:
        if self._newest is None or self._newest[0] != position:
            self._newest = position, self._batch_at(position)
        return self._newest[1]


def pieces_of(batches: Sequence[Batch], *, size: int, context_tokens: int = 0) -> list[tuple[Batch, float]]:
    """Forward passes of at most `size` items, each with the divisor of its mean loss, in order.

    The memory's cut comes first: shorter windows never make a forward pass of more tokens.
    """
    pieces = in_pieces(batches, size)
    if not context_tokens:
        return pieces
    return [(cut_context(piece, context_tokens), divisor) for piece, divisor in pieces]


def halved(pieces: Sequence[tuple[Batch, float]]) -> list[tuple[Batch, float]]:
    """The same items in two pieces where they are one of two items or more, for the noise scale."""
    if len(pieces) != 1:
        return list(pieces)
    batch = pieces[0][0]
    return in_pieces([batch], -(-len(batch.inputs) // 2))


def cut_context(batch: Batch, context_tokens: int) -> Batch:
    """(B, T) -> (B T/t, t): the same tokens with the same targets, in the same order."""
    return Batch(batch.inputs.reshape(-1, context_tokens), batch.targets.reshape(-1, context_tokens))


def objection_to(
    wanted: Controls, now: Controls, settings: TrainerSettings, *, clock: float, num_ranks: int
) -> str:
    """Why the trainer does not put `wanted` in force at nominal step `clock`, in words; "" = it may."""
    found = breach(wanted, now=now, settings=settings, clock=clock)
    if found or num_ranks == 1:
        return found
    accumulation = settings.batch.accumulation
    if not float(wanted.batch_factor * accumulation).is_integer():
        return f"batch_factor = {wanted.batch_factor:g} cuts a micro-batch, which {num_ranks} ranks share"
    return ""


def as_allowed(saved: Controls, settings: TrainerSettings) -> Controls:
    """Controls of a checkpoint, under the switches, schedule and steps of today. Raises ValueError for those
    beyond today's bounds.
    """
    controls = still_allowed(saved, settings)
    wrong = breach(controls, now=controls, settings=settings, clock=0.0)
    if wrong:
        raise ValueError(wrong)
    return controls


def check_place(steps: float, settings: TrainerSettings, num_ranks: int) -> None:
    """Raises ValueError for a clock or data of a checkpoint that stand within what this run cannot cut."""
    parts = settings.batch.accumulation * (settings.batch.sequences if num_ranks == 1 else 1)
    if not (steps * parts).is_integer():
        raise ValueError(f"it stands at {steps:g} steps, within what {num_ranks} ranks share")


def check_own_loop(settings: TrainerSettings) -> None:
    """Raises SettingsError where other people's loops would have to follow."""
    if any_on(settings.controls):
        raise SettingsError(
            "a loop of your own keeps its rate and batch: leave all of [trainer.controls] off, or train with"
            " trainer-node"
        )
    if settings.data.packing != "stream":
        raise SettingsError(
            "a loop of your own keeps its data: leave trainer.data.packing at stream, or train with"
            " trainer-node"
        )
