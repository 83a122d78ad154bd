"""The newest orders of the monitor with the trainer's answers, and a mark in time for each. Bounded; pure.

What is in force is order_book.py's business.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from common import messages as m
from monitor_node.series import append_bounded

_ROWS = 12
_MARKS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderRow:
    """An order of the monitor and, once it came, the trainer's acknowledgement."""

    order: m.Order
    done: m.OrderDone | None
    at_unix_seconds: float


@dataclass(kw_only=True)
class OrderLog:
    rows: deque[OrderRow] = field(default_factory=lambda: deque(maxlen=_ROWS))  # oldest first
    marks: list[tuple[float, str, str]] = field(
        default_factory=list
    )  # (unix seconds, what, what became of it)

    def asked(self, order: m.Order, at_unix_seconds: float) -> None:
        self.rows.append(OrderRow(order=order, done=None, at_unix_seconds=at_unix_seconds))
        append_bounded(self.marks, (at_unix_seconds, order_text(order), "asked"), _MARKS)

    def answered(self, done: m.OrderDone, at_unix_seconds: float) -> None:
        """An answer to an order that is not among the newest, or was answered before, changes nothing."""
        for place, row in enumerate(self.rows):
            if row.done is None and order_id_of(row.order) == done.order_id:
                self.rows[place] = replace(row, done=done)
                what_became = "done" if done.done else "refused"
                append_bounded(self.marks, (at_unix_seconds, order_text(row.order), what_became), _MARKS)

    @property
    def unanswered(self) -> int:
        return sum(row.done is None for row in self.rows)


def order_id_of(order: m.Order) -> str:
    return order.order_id if isinstance(order, m.MemoryOrder) else order.request_id


def order_text(order: m.Order) -> str:
    """What it asks for, e.g. "undo recompute"."""
    match order:
        case m.CheckpointRequest():
            return "emergency checkpoint" if order.emergency else "checkpoint"
        case m.StopRequest():
            return "stop"
    return f"undo {order.action.value}" if order.undo else order.action.value
