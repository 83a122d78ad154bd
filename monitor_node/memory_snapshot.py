"""What people see of memory: readings, thresholds, who holds what, the outlook, every order and its answer.

Two sections of snapshot.py. Pure; decides nothing. Unknown is None, never zero. What the run planned to hold
(common/memory_plan.py) is there as soon as it has said which parameters it trains: before any reading.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from common.errors import SettingsError
from common.memory_plan import Site, plan_memory
from monitor_node.order_log import OrderRow, order_id_of, order_text
from monitor_node.peak_forecast import next_peak_bytes, seconds_until
from monitor_node.run_view import RunView
from monitor_node.thresholds import limits_of

ABSURD_BYTES = 1 << 60  # a plan beyond it is made of shapes that no model has


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
        "planned": planned_holders(view),
    }


def planned_holders(view: RunView) -> list[dict[str, Any]] | None:
    """Of the settings, before any order; frozen weights and buffers are not told of. None: not known yet."""
    is_gpu = _is_on_gpu(view)
    if view.started is None or not view.has_settings or is_gpu is None:
        return None
    try:
        plan = plan_memory(view.started.groups, view.settings, Site(is_gpu=is_gpu))
    except SettingsError:  # an optimizer of a newer program
        return None
    if not all(0 <= holder.num_bytes < ABSURD_BYTES for holder in plan.holders):
        return None
    return [dataclasses.asdict(holder) for holder in plan.holders]


def _is_on_gpu(view: RunView) -> bool | None:
    wanted, report = view.settings.trainer.device, view.guard.report
    if wanted != "auto":
        return wanted == "cuda"
    if report is not None:
        return report.allocated_bytes is not None
    sources = {"rss": False, "nvml": True, "nvml-v1": True, "host": True}
    return sources.get(view.sample.source) if view.sample else None


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
