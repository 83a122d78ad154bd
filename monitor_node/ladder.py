"""Which memory order comes next, and which is taken back. Pure: state and footing in, state and messages out.

Up, mildest first: clean-up (once per dwell), directions to bf16, to host memory, prediction off, the
micro-batch halved as often as it can be, activations computed again. A level allows the rungs up to its own.
One order is under way at a time: the next one needs the answer, a reading after it, and a level that still
holds. What the trainer cannot do is passed over until memory was normal once.
Emergency: a checkpoint at once, beside the rungs and not behind them, because a process on a CPU is killed
without a word; once per excursion (until memory is normal again) and cooldown.
Down: after enough steps without pressure the newest order is taken back. If pressure comes before as many
steps again, it is ordered again at once and then kept twice as long as before.
An unknown reading orders nothing, counts no step and ends no excursion.
"shorter horizon" (issue 4) is no rung: a delta is linear, so its memory does not depend on the horizon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from common.messages import CheckpointRequest, MemoryAction, MemoryOrder
from monitor_node.order_book import HALVE, OrderBook
from monitor_node.thresholds import Level

# The level from which on a rung is taken. Up to CLEANUP they cost no speed: prediction is vetoed anyway.
RUNGS = {
    MemoryAction.CLEANUP: Level.CLEANUP,
    MemoryAction.BASIS_BF16: Level.CLEANUP,
    MemoryAction.BASIS_HOST: Level.CLEANUP,
    MemoryAction.PREDICTION_OFF: Level.CLEANUP,
    HALVE: Level.HIGH,
    MemoryAction.RECOMPUTE: Level.EMERGENCY,
}
CLEANUP_DWELL_SECONDS = 60.0  # between clean-ups of one pressure; guess, untested
COOLDOWN_SECONDS = 600.0  # between emergency checkpoints; guess, untested
ANSWER_SECONDS = 120.0  # a trainer that has gone on for so long without an answer gives none; guess
MAX_PATIENCE = 64  # times as many clean steps as configured; guess, untested


@dataclass(frozen=True, kw_only=True)
class Footing:
    """What is known at one reading."""

    is_known: bool  # how much is used
    level: Level  # of the device and of the trainer's allocator, the higher
    is_relieved: bool  # use has fallen so far that the level only waits for its dwell
    reason: str  # for people: the level in words
    step: int  # of the trainer; falls when steps are undone
    now_seconds: float
    micro_batch: int | None  # None = the trainer has not said
    out_of_memory: int  # times the trainer caught it
    book: OrderBook
    grow_back_steps: int
    cleanup_every_steps: int  # 0 = never


@dataclass(frozen=True, kw_only=True)
class LadderState:
    has_looked: bool = False  # for an order that a monitor before this one has under way
    in_flight: MemoryOrder | None = None
    given_seconds: float = 0.0  # of the one in flight
    given_step: int = 0
    refused: frozenset[MemoryAction] = frozenset()  # in this excursion
    on_trial: MemoryAction | None = None  # taken back last, not proven yet
    redo: MemoryAction | None = None  # taken back too early
    patience: Mapping[MemoryAction, int] = field(default_factory=dict)  # times grow_back_steps; missing = 1
    clean_steps: int = 0
    seen_step: int = 0
    seen_out_of_memory: int = 0
    cleaned_at_seconds: float | None = None
    cleaned_at_step: int = 0
    checkpoint_asked: bool = False  # in this excursion
    checkpoint_at_seconds: float | None = None  # asked for last, by this monitor


def climb(
    state: LadderState, footing: Footing, *, next_id: Callable[[], str]
) -> tuple[LadderState, tuple[MemoryOrder | CheckpointRequest, ...]]:
    """The next state, and at most one memory order and one request. `next_id` names a message anew."""
    state = _counted(_begun(state, footing), footing)
    out: list[MemoryOrder | CheckpointRequest] = []
    if footing.is_known and _is_checkpoint_due(state, footing):
        state = replace(state, checkpoint_asked=True, checkpoint_at_seconds=footing.now_seconds)
        out.append(CheckpointRequest(request_id=next_id(), emergency=True, reason=footing.reason))
    if state.in_flight is not None:
        return _awaited(state, state.in_flight, footing), tuple(out)
    wanted = _next_order(state, footing) if footing.is_known else None
    if wanted is None:
        return state, tuple(out)
    action, undo, reason = wanted
    order = MemoryOrder(order_id=next_id(), action=action, reason=reason, undo=undo)
    return _given(state, order, footing), (order, *out)


def _begun(state: LadderState, footing: Footing) -> LadderState:
    """At first: an order of the monitor before this one may be under way."""
    if state.has_looked:
        return state
    in_flight = footing.book.waiting[-1] if footing.book.waiting else None
    return replace(
        state,
        has_looked=True,
        in_flight=in_flight,
        given_seconds=footing.now_seconds,
        given_step=footing.step,
        seen_step=footing.step,
        seen_out_of_memory=footing.out_of_memory,
        cleaned_at_step=footing.step,
    )


def _counted(state: LadderState, footing: Footing) -> LadderState:
    """Steps without pressure, and whether what was taken back last stays so."""
    new_steps = max(0, footing.step - state.seen_step)
    ran_out = footing.out_of_memory > state.seen_out_of_memory
    state = replace(state, seen_step=footing.step, seen_out_of_memory=footing.out_of_memory)
    if ran_out:  # the trainer has helped itself; its own halving is in the next report
        return replace(_blamed(state), clean_steps=0)
    if not footing.is_known:
        return state
    if footing.level >= Level.CLEANUP:
        redo = state.on_trial or state.redo
        return replace(_blamed(state), redo=redo, clean_steps=0)
    state = replace(state, clean_steps=state.clean_steps + new_steps, redo=None)
    if state.on_trial is not None and state.clean_steps >= footing.grow_back_steps:
        patience = {action: n for action, n in state.patience.items() if action is not state.on_trial}
        state = replace(state, on_trial=None, patience=patience)
    if footing.level is Level.NORMAL:
        state = replace(state, refused=frozenset(), checkpoint_asked=False)
    return state


def _blamed(state: LadderState) -> LadderState:
    """Whatever is on trial has failed."""
    if state.on_trial is None:
        return state
    return replace(state, on_trial=None, patience=_doubled(state, state.on_trial))


def _doubled(state: LadderState, action: MemoryAction) -> Mapping[MemoryAction, int]:
    return {**state.patience, action: min(MAX_PATIENCE, 2 * state.patience.get(action, 1))}


def _is_checkpoint_due(state: LadderState, footing: Footing) -> bool:
    if footing.level is not Level.EMERGENCY or state.checkpoint_asked:
        return False
    asked = (state.checkpoint_at_seconds, footing.book.checkpoint_at_seconds)
    return all(at is None or footing.now_seconds - at >= COOLDOWN_SECONDS for at in asked)


def _awaited(state: LadderState, order: MemoryOrder, footing: Footing) -> LadderState:
    """The answer, if it is there. The reading of this moment may be older: the next one counts."""
    is_done = footing.book.answers.get(order.order_id)
    if is_done is None:
        waited_seconds = footing.now_seconds - state.given_seconds
        if waited_seconds < ANSWER_SECONDS or footing.step <= state.given_step:
            return state
    state = replace(state, in_flight=None)
    if is_done and order.undo:
        return replace(state, on_trial=order.action, clean_steps=0)
    if order.undo:
        return replace(state, patience=_doubled(state, order.action), clean_steps=0)
    return state if is_done else replace(state, refused=state.refused | {order.action})


def _next_order(state: LadderState, footing: Footing) -> tuple[MemoryAction, bool, str] | None:
    if footing.level >= Level.CLEANUP:
        action = None if footing.is_relieved else _next_rung(state, footing)
        return None if action is None else (action, False, footing.reason)
    every_steps = footing.cleanup_every_steps
    if every_steps and footing.step - state.cleaned_at_step >= every_steps:
        return MemoryAction.CLEANUP, False, f"every {every_steps} steps"
    if footing.book.in_force:
        newest = footing.book.in_force[-1]
        if state.clean_steps >= footing.grow_back_steps * state.patience.get(newest, 1):
            return newest, True, f"{state.clean_steps} steps without pressure"
    return None


def _next_rung(state: LadderState, footing: Footing) -> MemoryAction | None:
    if state.redo is not None and _can(state.redo, state, footing):
        return state.redo
    allowed = (action for action, level in RUNGS.items() if level <= footing.level)
    return next((action for action in allowed if _can(action, state, footing)), None)


def _can(action: MemoryAction, state: LadderState, footing: Footing) -> bool:
    if action in state.refused:
        return False
    if action is MemoryAction.CLEANUP:
        cleaned_at_seconds = state.cleaned_at_seconds
        return cleaned_at_seconds is None or footing.now_seconds - cleaned_at_seconds >= CLEANUP_DWELL_SECONDS
    if action is HALVE:
        return footing.micro_batch is None or footing.micro_batch > 1
    return action not in footing.book.in_force


def _given(state: LadderState, order: MemoryOrder, footing: Footing) -> LadderState:
    state = replace(
        state, in_flight=order, given_seconds=footing.now_seconds, given_step=footing.step, redo=None
    )
    if order.action is MemoryAction.CLEANUP:
        return replace(state, cleaned_at_seconds=footing.now_seconds, cleaned_at_step=footing.step)
    return state
