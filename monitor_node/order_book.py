"""What the trainer has given up by order of monitors: folded from orders and their acknowledgements.

This is what a restarted monitor knows of its predecessor's orders; it holds nothing that is not on the
streams. Orders and acknowledgements come on two streams without a common order, so either may be folded
first. The trainer answers in the order in which it was asked: what an order was about that a later answer
passes over is counted as in force, whether it was to be done or undone, because taking back what is not in
force changes nothing. Micro-batches are told by the trainer itself (MemoryReport), so they are right even
where it halved one unasked. Pure; decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from common.messages import CheckpointRequest, MemoryAction, MemoryOrder, MemoryReport, OrderDone

HALVE = MemoryAction.HALVE_MICRO_BATCH
LAST_RESORTS = (MemoryAction.PREDICTION_OFF, MemoryAction.RECOMPUTE)  # of trainer_node/memory_orders.py
MAX_FAILED_UNDOS = 3  # in a row; then the trainer is taken to have nothing to undo
_MAX_ANSWERS, _MAX_WAITING = 256, 256


@dataclass(frozen=True, kw_only=True)
class OrderBook:
    in_force: tuple[MemoryAction, ...] = ()  # oldest first; HALVE_MICRO_BATCH once for each halving
    doubtful: frozenset[MemoryAction] = frozenset()  # of those: perhaps not; may be ordered again
    waiting: tuple[MemoryOrder, ...] = ()  # not answered, oldest first
    answers: Mapping[str, bool] = field(default_factory=dict)  # order id -> done, the newest ones
    failed_undos: int = 0  # in a row
    checkpoint_at_seconds: float | None = None  # when an emergency checkpoint was asked for last


def ordered(book: OrderBook, order: MemoryOrder | CheckpointRequest, *, at_seconds: float = 0.0) -> OrderBook:
    if isinstance(order, CheckpointRequest):
        return replace(book, checkpoint_at_seconds=at_seconds) if order.emergency else book
    return _settled(replace(book, waiting=(*book.waiting, order)[-_MAX_WAITING:]))


def answered(book: OrderBook, done: OrderDone) -> OrderBook:
    answers = dict(book.answers)
    answers[done.order_id] = done.done
    while len(answers) > _MAX_ANSWERS:
        del answers[next(iter(answers))]
    return _settled(replace(book, answers=answers))


def reported(book: OrderBook, report: MemoryReport, *, batch_sequences: int) -> OrderBook:
    """`batch_sequences`: the micro-batch of the settings, before any halving."""
    if book.waiting:
        return book  # the report may be from before what is under way
    halvings, in_force = halvings_of(report.micro_batch, batch_sequences), book.in_force
    known = in_force.count(HALVE)
    if halvings == known:
        return book
    for _ in range(known - halvings):
        in_force = _without_newest(in_force, HALVE)
    return replace(book, in_force=in_force + (HALVE,) * (halvings - known))


def trainer_started(book: OrderBook) -> OrderBook:
    """It may go on from a checkpoint from before an order."""
    return replace(book, doubtful=frozenset(book.in_force) - {HALVE})


def ran_out(book: OrderBook, *, micro_batch: int) -> OrderBook:
    """Memory ran out. An undo that failed for that is not the last try; and where the micro-batch was 1
    already, the trainer has given up one of its last resorts by itself.
    """
    book = replace(book, failed_undos=0)
    if micro_batch > 1:
        return book
    taken = tuple(action for action in LAST_RESORTS if action not in book.in_force)
    return replace(book, in_force=(*book.in_force, *taken), doubtful=book.doubtful | set(taken))


def halvings_of(micro_batch: int, batch_sequences: int) -> int:
    """The fewest after which a micro-batch is that small; each halving rounds up. Both positive."""
    halvings = 0
    while math.ceil(batch_sequences / 2**halvings) > max(1, micro_batch):
        halvings += 1
    return halvings


def _settled(book: OrderBook) -> OrderBook:
    while book.waiting:
        order, *later = book.waiting
        answer = book.answers.get(order.order_id)
        if answer is None and not any(other.order_id in book.answers for other in later):
            break
        book = _after(replace(book, waiting=tuple(later)), order, answer)
    return book


def _after(book: OrderBook, order: MemoryOrder, answer: bool | None) -> OrderBook:
    """`answer`: None = it was passed over."""
    action = order.action
    if action is MemoryAction.CLEANUP:
        return book
    if not order.undo:
        if answer is not False and (action is HALVE or action not in book.in_force):
            book = replace(book, in_force=(*book.in_force, action))
        return replace(book, doubtful=book.doubtful - {action})
    if answer is None:
        return book
    failed_undos = 0 if answer else book.failed_undos + 1
    if answer or action in book.doubtful or failed_undos == MAX_FAILED_UNDOS:
        in_force = _without_newest(book.in_force, action)
        return replace(book, in_force=in_force, doubtful=book.doubtful - {action}, failed_undos=0)
    return replace(book, failed_undos=failed_undos)


def _without_newest(in_force: tuple[MemoryAction, ...], action: MemoryAction) -> tuple[MemoryAction, ...]:
    for place in reversed(range(len(in_force))):
        if in_force[place] is action:
            return in_force[:place] + in_force[place + 1 :]
    return in_force
