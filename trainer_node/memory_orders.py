"""Carries out what the monitor orders for memory's sake, and takes it back.

    order              given up for it                         afterwards
    CLEANUP            nothing                                 nothing to take back
    BASIS_BF16         digits of directions and history        weights are the same bits until the next jump
    BASIS_HOST         time, in steps that average             the same
    PREDICTION_OFF     jumps; undone: a window to warm up      plain training, bit for bit
    HALVE_MICRO_BATCH  throughput                              equal up to rounding (dropout: other masks)
    RECOMPUTE          one forward pass in four                the same bits where kernels are deterministic

An order that cannot help is not done and says why: the monitor then takes the next one. One that is in force
already, or taken back already, is done: a monitor that restarts may ask again. Carried out between two steps,
when no jump is on probation; what is in force travels in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import EnvironmentFault
from common.messages import MemoryAction
from trainer_node import recompute
from trainer_node.memory_report import tell_shortage
from trainer_node.memory_state import MemoryState
from trainer_node.out_of_memory import OutOfMemory, attempt, clean_up, release
from trainer_node.ranks import are_several

if TYPE_CHECKING:
    from trainer_node.cycle import Cycle

LAST_RESORTS = (MemoryAction.RECOMPUTE, MemoryAction.PREDICTION_OFF)


@dataclass(frozen=True, slots=True)
class Done:
    done: bool
    detail: str  # what is so now, or why it cannot be


def carry_out(loop: Cycle, action: MemoryAction, *, undo: bool) -> Done:
    """The loop must be calm.

    Where the device, the host or the disk runs full on the way, nothing is done; directions may be lost.
    """
    in_force = set(loop.memory.in_force)
    try:
        result = attempt(lambda: _ACTIONS[action](loop, undo))
    except EnvironmentFault as error:  # a store of directions or snapshots
        if are_several():
            raise  # this rank alone would be in another form
        result = OutOfMemory(str(error))
    if isinstance(result, OutOfMemory):
        release(loop.task.model.parameters())
        loop.memory.out_of_memory += 1
        loop.memory.in_force = in_force
        what = ""
        if action in (MemoryAction.BASIS_BF16, MemoryAction.BASIS_HOST):
            loop.prediction.drop()  # it may be half in one form and half in another
            loop.memory.in_force.add(MemoryAction.PREDICTION_OFF)
            what = "; the directions were lost with it, prediction is off"
        return Done(False, f"memory ran out: {result.text}{what}")
    if result.done:
        clean_up()
    return result


def begin_prediction(loop: Cycle) -> None:
    """The first directions of a run. Without room for them it begins as plain training and says so; the
    monitor has them made later, as after its own order.
    """
    shortage = attempt(lambda: loop.prediction.renew(loop.progress.phase))
    if isinstance(shortage, OutOfMemory):
        loop.prediction.drop()
        release(loop.task.model.parameters())
        loop.memory.in_force.add(MemoryAction.PREDICTION_OFF)
        tell_shortage(loop, loop.report, shortage, "no room for directions, the run begins as plain training")


def make_room(loop: Cycle) -> bool:
    """The micro-batch cannot be halved any more: give up what is left, mildest first. False = nothing is."""
    left = [action for action in LAST_RESORTS if action not in loop.memory.in_force]
    return loop.is_calm and any(carry_out(loop, action, undo=False).done for action in left)


def put_in_force(loop: Cycle, memory: MemoryState) -> None:
    """What was in force when a checkpoint was written, in a fresh loop that is about to load it."""
    loop.memory.halvings = memory.halvings
    loop.memory.in_force = set(memory.in_force)
    loop.memory.proposals_from_window = memory.proposals_from_window
    if recompute.why_not(loop.task.model) != "":  # compiled here, and it was not there: nobody could undo it
        loop.memory.in_force.discard(MemoryAction.RECOMPUTE)
    recompute.set_recompute(loop.task.model, loop.memory.is_recomputing)
    if MemoryAction.PREDICTION_OFF in memory.in_force:
        loop.prediction.drop()
    elif loop.prediction.is_possible and loop.prediction.basis is None:
        loop.memory.in_force.add(MemoryAction.PREDICTION_OFF)  # there was room where it was written, not here
    loop.prediction.form(loop.memory)


def _clean_up(loop: Cycle, undo: bool) -> Done:
    return Done(False, "a clean-up cannot be undone") if undo else Done(True, "garbage and cache are gone")


def _halve(loop: Cycle, undo: bool) -> Done:
    memory, batch = loop.memory, loop.settings.batch
    if undo and memory.halvings == 0:
        return Done(False, f"the micro-batch is that of the settings, {batch.sequences}")
    if not undo and memory.micro_batch(batch) == 1:
        return Done(False, "the micro-batch is 1 already")
    memory.halvings += -1 if undo else 1
    return Done(True, f"{memory.accumulation(batch)} micro-batches of {memory.micro_batch(batch)} a step")


def _recompute(loop: Cycle, undo: bool) -> Done:
    if (why := recompute.why_not(loop.task.model)) != "":
        return Done(False, why)
    if (already := _note(loop.memory, MemoryAction.RECOMPUTE, undo)) is not None:
        return already
    recompute.set_recompute(loop.task.model, not undo)
    blocks = len(recompute.blocks_of(loop.task.model))
    return Done(True, f"{blocks} blocks {'keep their activations' if undo else 'compute them again'}")


def _prediction_off(loop: Cycle, undo: bool) -> Done:
    if not loop.prediction.is_possible:
        return Done(False, "there is no prediction in this run")
    if undo and MemoryAction.PREDICTION_OFF in loop.memory.in_force:
        loop.prediction.renew(loop.progress.phase)  # first: it may not find room
    if (already := _note(loop.memory, MemoryAction.PREDICTION_OFF, undo)) is not None:
        return already
    if undo:
        return Done(True, f"proposals from the end of window {loop.memory.proposals_from_window} on")
    loop.prediction.drop()
    return Done(True, "no directions, no snapshots, no proposals")


def _basis_bf16(loop: Cycle, undo: bool) -> Done:
    if loop.prediction.basis is not None and loop.settings.basis.dtype == "bf16":
        return Done(False, "the directions are in bf16 by trainer.basis.dtype")
    return _form(loop, MemoryAction.BASIS_BF16, undo)


def _basis_host(loop: Cycle, undo: bool) -> Done:
    if loop.task.device.type == "cpu" and not undo:  # it may be in force by a checkpoint from a GPU
        return Done(False, "the device is a CPU: its memory is the host's")
    return _form(loop, MemoryAction.BASIS_HOST, undo)


def _form(loop: Cycle, action: MemoryAction, undo: bool) -> Done:
    if loop.prediction.basis is None and not undo:
        return Done(False, "there are no directions")
    if (already := _note(loop.memory, action, undo)) is not None:
        return already
    loop.prediction.form(loop.memory)
    dtype, on_host = loop.memory.basis_form(loop.settings.basis)
    return Done(True, f"directions are {dtype}{', averages are fp32 on the host' if on_host else ''}")


def _note(memory: MemoryState, action: MemoryAction, undo: bool) -> Done | None:
    """Put into force or out of it. Not None: it is so already, and nothing is left to do."""
    if (action in memory.in_force) is not undo:
        return Done(True, f"{action} is {'not ' if undo else ''}in force already")
    if undo:
        memory.in_force.discard(action)
    else:
        memory.in_force.add(action)
    return None


_ACTIONS: dict[MemoryAction, Callable[[Cycle, bool], Done]] = {
    MemoryAction.CLEANUP: _clean_up,
    MemoryAction.BASIS_BF16: _basis_bf16,
    MemoryAction.BASIS_HOST: _basis_host,
    MemoryAction.PREDICTION_OFF: _prediction_off,
    MemoryAction.HALVE_MICRO_BATCH: _halve,
    MemoryAction.RECOMPUTE: _recompute,
}
