"""A return to the first weights, for a run that its rate has killed before it learned anything.

A lower rate does not revive such a network: digits at 30 times its best rate stays at the loss of chance at
every lower rate tried from there, and learns at once from its first weights (measured 2026-11-22). So the
state before step 1 is kept until the run has learned something or has a checkpoint, and a trial that only
lowers the rate begins there:

    begin    back to the first weights, data, clock and step 0, with the wanted controls, as a new attempt
    finish   controls.trial_steps later -> ACCEPTED: all steps before it are lost; REFUSED: none of it was

No twin is run: the run without it is where we stand. Holds weights, averages and random state in a store of
its own. Decides nothing about rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from common.messages import Controls, Outcome, Verdict
from common.settings import TrainerSettings
from trainer_node import ledger as purposes
from trainer_node.averages import Averages
from trainer_node.control_twin import mean_loss
from trainer_node.jump import fail_jump, restore_jump, take_snapshot
from trainer_node.out_of_memory import OutOfMemory, attempt
from trainer_node.progress import Progress
from trainer_node.snapshot import Snapshot, TensorStore
from trainer_node.trial import Jump, JumpTools

LEARNED_SHARE = 0.1  # of the first loss: as predictor_node/evidence.STUCK_GAIN
LEVEL_STEPS = 8
WAIT_WINDOWS = 4  # behind the warm-up: a sign of ruin, a return, a sign again
# Of basis.tensors(): copies of what is parked. A window begins behind a return, and no history counts then.
_PARKED = ("window_start.", "history.")


def has_learned(losses: Sequence[float], first_loss: float) -> bool:
    """Whether the newest of these losses lie a tenth below the first one. Nats; one alone may be luck.

    Fewer than LEVEL_STEPS say nothing, and a loss that is no number is nothing learned.
    """
    newest = list(losses)[-LEVEL_STEPS:]
    return len(newest) == LEVEL_STEPS and is_below_first(math.fsum(newest) / LEVEL_STEPS, first_loss)


def is_below_first(loss: float, first_loss: float) -> bool:
    """By LEARNED_SHARE of it. False for what is no number."""
    return math.isfinite(loss) and loss < first_loss - LEARNED_SHARE * abs(first_loss)


def is_no_worse(loss: float, *, loss_before: float, first_loss: float, spread: float) -> bool:
    """Whether a trial that ended at `loss` goes on, beside where it began and where the run stood. Nats."""
    stood = loss_before if math.isfinite(loss_before) else math.inf
    return math.isfinite(loss) and loss <= max(first_loss, stood) + spread


def only_lowers_rate(wanted: Controls | None, now: Controls) -> bool:
    if wanted is None or wanted.rate_factor >= now.rate_factor:
        return False
    return replace(wanted, rate_factor=now.rate_factor) == now


@dataclass(frozen=True, kw_only=True)
class _Held:
    snapshot: Snapshot
    store: TensorStore
    progress: Progress
    averages: Averages  # whose tensors the snapshot restores


class FirstWeights:
    """Of one run, from before its first step."""

    def __init__(self, settings: TrainerSettings, untouched: Progress) -> None:
        """`untouched`: where the run begins, unless a checkpoint brings another."""
        self._settings = settings
        is_wanted = settings.controls.rate and settings.verify.enabled
        self._untouched = untouched if is_wanted else None
        self._held: _Held | None = None

    @property
    def are_held(self) -> bool:
        return self._held is not None

    def take(self, tools: JumpTools | None, progress: Progress) -> None:
        """Before a step: of the first one they are kept. Without room for them the run has none."""
        untouched, self._untouched = self._untouched, None
        if untouched is None or progress is not untouched or progress.step or tools is None:
            return
        store = tools.store.another()
        quiet = replace(tools, on_out_of_memory=lambda _: None)
        with tools.ledger.span(purposes.SNAPSHOTS):
            snapshot = take_snapshot(quiet, store, also=partial(_state_of_directions, tools))
        if snapshot is None:
            store.close()
            return
        self._held = _Held(
            snapshot=snapshot, store=store, progress=progress.copy(), averages=tools.basis.averages
        )

    def look(self, tools: JumpTools | None, progress: Progress | None) -> None:
        """Give them up where they are of no use any more. None as progress: not all its losses were told."""
        held = self._held
        if held is None:
            return
        is_other = tools is None or tools.basis.averages is not held.averages
        if is_other or (progress is not None and has_learned(progress.recent_losses, _first_loss(progress))):
            self.drop()

    def may_help(self, progress: Progress) -> bool:
        """Whether a checkpoint may wait: nothing would be lost with it, and behind it there is no return.

        All losses of `progress` were told. Not for ever: what does not learn at any rate is saved too.
        """
        waits_steps = self._settings.statistics_steps + WAIT_WINDOWS * self._settings.window_steps
        is_dead = not has_learned(progress.recent_losses, _first_loss(progress))
        return self._held is not None and progress.step < waits_steps and is_dead

    def drop(self) -> None:
        if self._held is not None:
            self._held.store.close()
        self._held = self._untouched = None

    def are_wanted_by(self, jump: Jump) -> bool:
        """Whether this trial, which has not begun yet, is to begin there."""
        before = jump.before_it
        return (
            self._held is not None
            and jump.mean is not None  # it would have a twin (control_twin.has_twin)
            and only_lowers_rate(jump.decision.controls, jump.controls_before)
            and not is_below_first(jump.outcome.loss_before, _first_loss(before))
        )

    def begin(self, tools: JumpTools, jump: Jump, progress: Progress) -> tuple[Progress, Outcome | None]:
        """How far the run is now. With an Outcome memory ran out: its state is as it was."""
        result = attempt(partial(self._begin, tools, jump))
        if isinstance(result, OutOfMemory):
            return progress, fail_jump(tools, jump, result)
        return progress.returned_to(result, attempt=jump.outcome.attempt), None

    def _begin(self, tools: JumpTools, jump: Jump) -> Progress:
        held = self._held
        assert held is not None, "a return to weights that are not held"
        with tools.ledger.span(purposes.SNAPSHOTS) as moving:
            held.snapshot.restore()
            tools.basis.averages.begin_window()
        jump.is_return, jump.ruin_loss = True, math.inf  # no bound of the run that was left
        jump.outcome = replace(
            jump.outcome,
            attempt=jump.outcome.attempt + 1,
            loss_forecast=jump.outcome.loss_before,
            loss_spread=jump.guard_spread,
            restore_seconds=moving.seconds,
        )
        return held.progress

    def finish(self, tools: JumpTools, jump: Jump) -> Outcome:
        """The trial's steps are taken: go on from there, or back to where the run stood."""
        outcome = attempt(partial(self._finish, tools, jump))
        return fail_jump(tools, jump, outcome) if isinstance(outcome, OutOfMemory) else outcome

    def _finish(self, tools: JumpTools, jump: Jump) -> Outcome:
        former, loss = jump.before_it, mean_loss(tools, jump)
        jump.outcome = replace(jump.outcome, loss_end=loss)
        keeps = is_no_worse(
            loss,
            loss_before=jump.outcome.loss_before,
            first_loss=_first_loss(former),
            spread=jump.guard_spread,
        )
        if not keeps:
            return restore_jump(tools, jump, Verdict.REFUSED)
        jump.guard.changes = []  # how the loss shook in the run that was left says nothing of this one
        jump.guard.forget_level()
        tools.ledger.virtual_steps = 0
        jump.lost_passes = former.clock * purposes.TRAIN_PASSES * self._settings.batch.accumulation
        return replace(
            jump.outcome,
            verdict=Verdict.ACCEPTED,
            probation_steps=len(jump.step_seconds),
            lost_steps=former.step,
            lost_seconds=former.step * jump.outcome.full_step_seconds,
            passes=jump.outcome.passes + jump.lost_passes,
        )


def _first_loss(progress: Progress) -> float:
    return progress.features.first_loss


def _state_of_directions(tools: JumpTools) -> list[Tensor]:
    """Of the basis, where it lives: with it a jump behind a return knows nothing of the run that was left."""
    moving = {id(tensor) for tensor in tools.basis.averages.moving_tensors()}  # every snapshot has those
    named = tools.basis.tensors().items()
    return [tensor for name, tensor in named if id(tensor) not in moving and not name.startswith(_PARKED)]
