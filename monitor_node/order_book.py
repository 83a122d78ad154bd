"""What the trainer has given up for memory: folded from orders, their acknowledgements and its reports.

This is what a restarted monitor knows of its predecessor's orders; it holds nothing that is not on the
streams. The trainer's word counts (MemoryReport.in_force): it is right even where the trainer helped itself
unasked, lost an order, or went on from an older checkpoint. From orders and answers come what is under way,
and which was given up last, because that is taken back first. Orders and answers come on two streams without
a common order, so either may be folded first; what a later answer passes over was lost. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from common.messages import (
    CheckpointRequest,
    MemoryAction,
    MemoryOrder,
    MemoryReport,
    Order,
    OrderDone,
    StopRequest,
)

HALVE = MemoryAction.HALVE_MICRO_BATCH
_MAX_ANSWERS, _MAX_WAITING = 256, 256


@dataclass(frozen=True, kw_only=True)
class OrderBook:
    in_force: tuple[MemoryAction, ...] = ()  # oldest first; HALVE_MICRO_BATCH once for each halving
    waiting: tuple[MemoryOrder, ...] = ()  # not answered, oldest first
    answers: Mapping[str, bool] = field(default_factory=dict)  # order id -> done, the newest ones
    checkpoint_at_seconds: float | None = None  # when an emergency checkpoint was asked for last


def ordered(book: OrderBook, order: Order, *, at_seconds: float = 0.0) -> OrderBook:
    if isinstance(order, CheckpointRequest):
        return replace(book, checkpoint_at_seconds=at_seconds) if order.emergency else book
    if isinstance(order, StopRequest):
        return book
    return _settled(replace(book, waiting=(*book.waiting, order)[-_MAX_WAITING:]))


def answered(book: OrderBook, done: OrderDone) -> OrderBook:
    answers = dict(book.answers)
    answers[done.order_id] = done.done
    while len(answers) > _MAX_ANSWERS:
        del answers[next(iter(answers))]
    return _settled(replace(book, answers=answers))


def reported(book: OrderBook, report: MemoryReport) -> OrderBook:
    """The trainer's word, unless an order is under way: then the report may be from before it."""
    if book.waiting:
        return book
    said, in_force = Counter(report.in_force), book.in_force
    for action, known in Counter(in_force).items():
        for _ in range(known - said[action]):
            in_force = _without_newest(in_force, action)
    unheard = said - Counter(in_force)
    return replace(book, in_force=(*in_force, *unheard.elements()))


def trainer_started(book: OrderBook) -> OrderBook:
    """Nobody answers what the trainer before this one left: its own reports count from now on."""
    return replace(book, waiting=())


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
    if action is MemoryAction.CLEANUP or not answer:
        return book
    if order.undo:
        return replace(book, in_force=_without_newest(book.in_force, action))
    if action is HALVE or action not in book.in_force:
        return replace(book, in_force=(*book.in_force, action))
    return book


def _without_newest(in_force: tuple[MemoryAction, ...], action: MemoryAction) -> tuple[MemoryAction, ...]:
    for place in reversed(range(len(in_force))):
        if in_force[place] is action:
            return in_force[:place] + in_force[place + 1 :]
    return in_force
