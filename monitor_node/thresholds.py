"""Turns memory readings into a level. Decides nothing else, reads no clock and no sensor.

Hysteresis: a level is entered at once when use reaches its threshold and left only after use has
stayed 3 points of the total below it for the dwell time, one level at a time. An unknown reading
keeps the level and restarts the dwell: a sensor that is lost cannot lower an alarm.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from common.settings import MonitorSettings

LEAVE_GAP_SHARE = 0.03  # systems.md 3.2: enter and leave differ by at least 3 points
DWELL_SECONDS = 5.0  # guess, untested


class Level(enum.IntEnum):
    NORMAL = 0
    CLEANUP = 1
    EMERGENCY = 2

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, kw_only=True)
class Limits:
    cleanup_bytes: int
    emergency_bytes: int
    leave_gap_bytes: int
    dwell_seconds: float = DWELL_SECONDS


@dataclass(frozen=True, kw_only=True)
class LevelState:
    level: Level = Level.NORMAL
    calm_since_seconds: float | None = None  # use has been below the leave threshold since then


def limits_of(settings: MonitorSettings, total_bytes: int | None) -> Limits | None:
    """Thresholds in bytes; None while a share is asked for and the total is unknown."""
    if total_bytes is None:
        if not (settings.cleanup_bytes and settings.emergency_bytes):
            return None
        total_bytes = settings.emergency_bytes
    return Limits(
        cleanup_bytes=settings.cleanup_bytes or int(settings.cleanup_share * total_bytes),
        emergency_bytes=settings.emergency_bytes or int(settings.emergency_share * total_bytes),
        leave_gap_bytes=int(LEAVE_GAP_SHARE * total_bytes) + 1,
    )


def next_level(
    state: LevelState, *, used_bytes: int | None, limits: Limits | None, now_seconds: float
) -> LevelState:
    """`now_seconds` must not go back between calls."""
    if used_bytes is None or limits is None:
        return LevelState(level=state.level)
    reached = _reached(used_bytes, limits)
    if reached > state.level:
        return LevelState(level=reached)
    if state.level is Level.NORMAL or used_bytes > _leave_bytes(state.level, limits):
        return LevelState(level=state.level)
    calm_since_seconds = now_seconds if state.calm_since_seconds is None else state.calm_since_seconds
    if now_seconds - calm_since_seconds < limits.dwell_seconds:
        return LevelState(level=state.level, calm_since_seconds=calm_since_seconds)
    return LevelState(level=Level(state.level - 1))


def _reached(used_bytes: int, limits: Limits) -> Level:
    if used_bytes >= limits.emergency_bytes:
        return Level.EMERGENCY
    return Level.CLEANUP if used_bytes >= limits.cleanup_bytes else Level.NORMAL


def _leave_bytes(level: Level, limits: Limits) -> int:
    entered_bytes = limits.emergency_bytes if level is Level.EMERGENCY else limits.cleanup_bytes
    return entered_bytes - limits.leave_gap_bytes
