"""Back to a checkpoint from before a loss spike, and on behind the batches that have been used.

As in PaLM (Chowdhery et al. 2022, section 5.1): from before the spike, skipping the batches seen before and
during it; there the same batches brought no spike from another state, so it takes both. The first rollback
takes the newest sound checkpoint, each further one in a row an older one: trouble may be under way before
it shows. What is newer is removed, lest a resume begins within the trouble. After so many in a row the run is
asked to stop, set back and with a fault to tell. What a spike is, is decided by spikes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.errors import CheckpointError
from common.messages import Alert, MemoryAction, Message
from common.sealed_folder import age_key
from common.streams import TRAINER
from trainer_node.checkpoint_reading import Saved, put_tensors, read
from trainer_node.ledger import TRAIN_PASSES
from trainer_node.loop import Loop
from trainer_node.memory_orders import carry_out
from trainer_node.memory_report import tell_shortage
from trainer_node.out_of_memory import OutOfMemory, TornUpdate, attempt, release
from trainer_node.ranks import Ranks
from trainer_node.shared_checkpoints import AnyCheckpoints
from trainer_node.spikes import CHECK_STEPS, CLEAR_STEPS, Spike, find_spike, is_in_bounds
from trainer_node.split import local_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollback:
    name: str  # of the checkpoint
    undone_steps: int
    housekeeping: dict[str, Any]  # its values at that checkpoint


class SpikeWatch:
    """Looks every few steps and answers. Without checkpoints it can only tell."""

    def __init__(self, emit: Callable[[Message], None], checkpoints: AnyCheckpoints | None) -> None:
        self._emit, self._checkpoints = emit, checkpoints
        self._told_no_way_back, self._try_again_step = False, 0
        self.next_look_step = 0  # travels in the checkpoint
        self.fault = ""  # why the run was asked to stop; "" = it was not

    def is_due(self, loop: Loop) -> bool:
        return loop.progress.step >= self.next_look_step

    def is_sound(self, loop: Loop) -> bool:
        """Whether the state may push older checkpoints out, by the newest loss that was told."""
        features, settings = loop.progress.features, loop.settings.spikes
        losses = features.losses.values
        if not settings.enabled:
            return math.isfinite(losses[-1])
        return is_in_bounds(losses, first_loss=features.first_loss, settings=settings)

    def look(self, loop: Loop, *, settle: bool) -> dict[str, Any] | None:
        """The housekeeping values of the checkpoint that the loop was set back to, if it was.

        Judges the losses that have arrived: all of them with `settle`, and in lockstep, where what a run does
        must not depend on time, and with several ranks, which must see the same. The loop must be calm.
        """
        self.next_look_step = loop.progress.step + CHECK_STEPS
        if settle or loop.settings.decision_mode == "lockstep" or loop.task.split.ranks.size > 1:
            loop.settle_observations()
        is_asleep = not loop.settings.spikes.enabled or loop.progress.step < self._try_again_step
        if is_asleep or _spike_of(loop) is None:
            return None
        loop.settle_observations()  # now the newest loss is that of the newest step
        spike = _spike_of(loop)
        return None if spike is None else self._go_back(loop, spike)

    def _go_back(self, loop: Loop, spike: Spike) -> dict[str, Any] | None:
        rises = f"{spike.usual_loss:.4g} -> {spike.loss:.4g} nats"
        what = f"the training loss left its bounds at step {spike.first_step} ({rises})"
        spiked_step, in_a_row = loop.progress.step, loop.progress.rollbacks_next
        tell = partial(self._tell, loop, kind="checkpoint_passed_over")
        rollback = roll_back(loop, self._checkpoints, spike, tell) if self._checkpoints is not None else None
        if rollback is None:
            if not self._told_no_way_back:
                self._tell(loop, f"{what}; there is no sound checkpoint from before it: going on")
            self._told_no_way_back = True
            self._try_again_step = loop.progress.step + CLEAR_STEPS  # reading checkpoints in vain is slow
            return None
        self._told_no_way_back = False
        undone = f"{rollback.undone_steps} steps undone, their batches skipped"
        self._tell(loop, f"{what}: back to {rollback.name}, {undone}")
        if in_a_row > loop.settings.spikes.max_rollbacks:
            self._give_up(loop, spiked_step, in_a_row)
        return rollback.housekeeping

    def _give_up(self, loop: Loop, spiked_step: int, in_a_row: int) -> None:
        loop.progress.rollbacks = 0  # a resume, with other settings, may try as often again
        self.fault = (
            f"the training loss spiked {in_a_row} times in a row, last at step {spiked_step}; the run stopped"
            f" at step {loop.progress.step}: lower trainer.optimizer.rate and muon_rate in its config.toml"
            " and resume it, or set trainer.spikes.enabled = false if this is how the loss goes"
        )
        self._tell(loop, self.fault, kind="diverged", severity="error")
        loop.stop_requested = True

    def _tell(self, loop: Loop, text: str, *, kind: str = "spike", severity: str = "warning") -> None:
        self._emit(Alert(node=TRAINER, severity=severity, kind=kind, text=text, step=loop.progress.step))


def _spike_of(loop: Loop) -> Spike | None:
    """By the losses that were told, the newest of which is taken for that of the newest step."""
    features = loop.progress.features
    return find_spike(
        features.losses.values,
        last_step=loop.progress.step,
        first_loss=features.first_loss,
        settings=loop.settings.spikes,
    )


def roll_back(
    loop: Loop,
    checkpoints: AnyCheckpoints,
    spike: Spike,
    passed_over: Callable[[str], None] = lambda _: None,
) -> Rollback | None:
    """None where there is no sound checkpoint from before the spike: then nothing was changed.

    `passed_over` is told why a checkpoint was not taken.

    The loop must be calm and its observations settled.
    """
    for folder in _candidates(checkpoints.saved_until(loop.progress.step), loop, spike):
        try:
            rollback = _set_back_with_room(folder, loop)
        except CheckpointError as error:
            passed_over(f"passed over: {error}")
            continue
        checkpoints.forget_newer(folder)
        return rollback
    return None


def _set_back_with_room(folder: Path, loop: Loop) -> Rollback:
    """A second time without the directions where memory runs out. Raises as `set_back`, and TornUpdate."""
    rollback = attempt(partial(set_back, folder, loop))
    if isinstance(rollback, OutOfMemory):
        carry_out(loop, MemoryAction.PREDICTION_OFF, undo=False)
        release(loop.task.model.parameters())
        tell_shortage(loop, loop.report, rollback, "the directions were given up, prediction is off")
        rollback = attempt(partial(set_back, folder, loop))
    if isinstance(rollback, OutOfMemory):
        raise TornUpdate(f"the way back to {folder.name}", rollback)
    return rollback


def _candidates(newest_first: list[Path], loop: Loop, spike: Spike) -> list[Path]:
    """Those to be tried, in order."""
    # The loss of a step is that of the weights before it: those after `first_step` - 1 steps are in doubt.
    sound = [folder for folder in newest_first if age_key(folder.name)[1] <= spike.first_step - 2]
    again = loop.progress.rollbacks_next - 1
    passed_over = max(0, again - (len(newest_first) - len(sound)))
    if again and not sound:
        return newest_first[-1:]  # the run went on well from there once
    return sound[passed_over:] or sound[-1:]


def set_back(folder: Path, loop: Loop) -> Rollback:
    """A new attempt from this checkpoint. What was spent stays in the ledger.

    Raises CheckpointError before anything is changed: for a folder that is damaged or does not fit, and for
    weights or optimizer state that are not finite.
    """
    saved = read(folder, loop)
    undone_steps = loop.progress.step - saved.progress.step
    _check_finite(saved, folder, loop.task.split.ranks)
    put_tensors(loop, saved, folder)
    loop.ledger.lost_steps += undone_steps
    loop.ledger.virtual_steps = int(saved.ledger["virtual_steps"])
    step_passes = TRAIN_PASSES * loop.settings.batch.accumulation
    loop.progress = loop.progress.after_rollback(saved.progress, step_passes=step_passes)
    return Rollback(name=folder.name, undone_steps=undone_steps, housekeeping=saved.housekeeping)


def _check_finite(saved: Saved, folder: Path, ranks: Ranks) -> None:
    for name in ("model", "optimizer"):
        finite = all(bool(torch.isfinite(local_of(t)).all()) for t in saved.tensors[name].values())
        if ranks.any(not finite):
            raise CheckpointError(f"{folder}: its {name} is not finite; use an older checkpoint")
