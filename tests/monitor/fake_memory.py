"""The memory sections of the made-up snapshot: a card that fills up to the clean-up level and is relieved.

Every number is invented; nothing here is a measurement.
"""

from __future__ import annotations

import math
from typing import Any

GIB = 1 << 30
START_SECONDS = 1_795_280_400.0  # 2026-11-21 17:00 UTC
STEP_SECONDS = 0.42
EVERY_STEPS = 64  # a proposal
HOLDERS = ("weights", "optimizer", "gradients", "averages", "history", "snapshot", "rest")


def at_unix_seconds(step: int) -> float:
    return START_SECONDS + STEP_SECONDS * step


def memory_section(step: int) -> dict[str, Any]:
    reading = {"name": "temperature", "value": 61.0, "unit": "C", "source": "nvml", "unknown_reason": ""}
    used_bytes = int(used_gib(step) * GIB)
    return {
        "source": "nvml",
        "device": "a made-up 16 GiB card",
        "used_bytes": used_bytes,
        "total_bytes": 16 * GIB,
        "trainer_bytes": used_bytes - GIB // 2,
        "unknown_reason": "",
        "level": "notice" if used_bytes > 10 * GIB else "normal",
        "notice_bytes": 10 * GIB,
        "cleanup_bytes": 12 * GIB,
        "high_bytes": 13 * GIB,
        "emergency_bytes": 14 * GIB,
        "is_thrashing": False,
        "in_force": [],
        "readings": {
            "temperature": reading,
            "power": reading | {"name": "power", "value": 214.0, "unit": "W"},
        },
        "next_peak_bytes": int(10.4 * GIB),
        "seconds_until_emergency": None,
        "report": None,
        "planned": None,
    }


def used_gib(step: int) -> float:
    """Grows to the clean-up level by step 700, falls when directions move to host memory."""
    grown = 8.6 + 3.6 * min(step, 700) / 700
    fallen = 0.0 if step < 705 else 2.3
    return grown - fallen + 0.12 * math.sin(step / 9)


def held_gib(step: int) -> list[float]:
    averages, history = (1.1, 2.9) if step < 705 else (1.1, 0.7)
    fixed = [
        2.1,
        2.8,
        1.0,
        averages,
        history * min(1.0, 0.2 + step / 700),
        0.6 if step % EVERY_STEPS < 16 else 0.0,
    ]
    return [*fixed, max(0.1, used_gib(step) - 0.5 - sum(fixed))]


ORDERS = [
    (690, "cleanup", "used memory is above the clean-up level", True, 12.2, 11.9, ""),
    (700, "basis-bf16", "clean-up freed too little", True, 12.3, 9.9, ""),
    (900, "undo basis-bf16", "clean for 180 steps", False, None, None, "no room: 12.1 GiB would be needed"),
]


def order_rows(step: int) -> list[dict[str, Any]]:
    return [
        {
            "order_id": f"1.{at}",
            "action": action,
            "reason": reason,
            "at_unix_seconds": at_unix_seconds(at),
            "done": True,
            "refused": not is_done,
            "bytes_before": int(before * GIB) if before else None,
            "bytes_after": int(after * GIB) if after else None,
            "detail": detail,
        }
        for at, action, reason, is_done, before, after, detail in ORDERS
        if at <= step
    ]
