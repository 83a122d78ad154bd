"""What people see of memory: readings, thresholds, who holds what, the outlook, every order and its answer.

Two sections of snapshot.py. Pure; decides nothing. Unknown is None, never zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from monitor_node.order_log import OrderRow, order_id_of, order_text
from monitor_node.peak_forecast import next_peak_bytes, seconds_until
from monitor_node.run_view import RunView
from monitor_node.thresholds import limits_of


def memory_section(view: RunView, now_seconds: float) -> dict[str, Any]:
    sample, guard = view.sample, view.guard
    limits = limits_of(view.settings.monitor, sample.total_bytes) if sample else None
    until_seconds = None
    if limits is not None:
        until_seconds = seconds_until(guard.peaks, limits.emergency_bytes, now_seconds=now_seconds)
    return {
        "source": sample.source if sample else None,
        "device": sample.device if sample else None,
        "used_bytes": sample.used_bytes if sample else None,
        "total_bytes": sample.total_bytes if sample else None,
        "trainer_bytes": sample.trainer_bytes if sample else None,
        "unknown_reason": sample.unknown_reason if sample else "no sample yet",
        "level": view.level.level.label,
        "notice_bytes": limits.notice_bytes if limits else None,
        "cleanup_bytes": limits.cleanup_bytes if limits else None,
        "high_bytes": limits.high_bytes if limits else None,
        "emergency_bytes": limits.emergency_bytes if limits else None,
        "is_thrashing": guard.is_thrashing,
        "in_force": [action.value for action in guard.book.in_force],
        "readings": {name: dataclasses.asdict(said) for name, said in sorted(guard.readings.items())},
        "next_peak_bytes": next_peak_bytes(guard.peaks),
        "seconds_until_emergency": None if until_seconds is None else round(until_seconds, -1),
        "report": None if guard.report is None else dataclasses.asdict(guard.report),
    }


def order_row(row: OrderRow) -> dict[str, Any]:
    order, done = row.order, row.done
    return {
        "order_id": order_id_of(order),
        "action": order_text(order),
        "reason": order.reason,
        "at_unix_seconds": row.at_unix_seconds,
        "done": done is not None,  # answered: `refused` says how
        "refused": done is not None and not done.done,
        "bytes_before": done.bytes_before if done else None,
        "bytes_after": done.bytes_after if done else None,
        "detail": done.detail if done else None,
    }
