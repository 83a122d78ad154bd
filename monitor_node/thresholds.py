"""Turns memory readings into a level. Decides nothing else, reads no clock and no sensor.

Four thresholds: clean-up and emergency as set (bytes, else a share of the device), else those of the card
whose size is nearest; notice lies as far below clean-up as emergency above it, high in the middle of the
two. For 16 GiB that is 10, 12, 13, 14, of which hybrid-predict-trainer-rs had 10, 12 and 14.
Hysteresis: a level is entered at once when use reaches its threshold and left only after use has
stayed 3 points of the total below it for the dwell time, one level at a time. An unknown reading
keeps the level and restarts the dwell: a sensor that is lost cannot lower an alarm.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from common.settings import GIB, MonitorSettings

LEAVE_GAP_SHARE = 0.03  # systems.md 3.2: enter and leave differ by at least 3 points
DWELL_SECONDS = 5.0  # guess, untested


class Level(enum.IntEnum):
    NORMAL = 0
    NOTICE = 1
    CLEANUP = 2
    HIGH = 3
    EMERGENCY = 4

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, kw_only=True)
class Card:
    """A size of device and the shares of it that hold for devices of about that size."""

    total_gib: int
    cleanup_share: float
    emergency_share: float


# 16: the issue and the original. The others keep 1, 2, 5 and 8 GiB above emergency: a step's activations
# grow with the card, but more slowly than the card. Guesses, untested.
CARDS = (
    Card(total_gib=8, cleanup_share=0.75, emergency_share=0.875),
    Card(total_gib=16, cleanup_share=0.75, emergency_share=0.875),
    Card(total_gib=24, cleanup_share=19.5 / 24, emergency_share=22 / 24),
    Card(total_gib=80, cleanup_share=68 / 80, emergency_share=75 / 80),
    Card(total_gib=141, cleanup_share=122 / 141, emergency_share=133 / 141),
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes at which a level begins, rising; notice < cleanup < high < emergency."""

    notice_bytes: int
    cleanup_bytes: int
    high_bytes: int
    emergency_bytes: int
    leave_gap_bytes: int
    dwell_seconds: float = DWELL_SECONDS

    def enter_bytes(self, level: Level) -> int:
        """`level` is not NORMAL."""
        return (self.notice_bytes, self.cleanup_bytes, self.high_bytes, self.emergency_bytes)[level - 1]

    def leave_bytes(self, level: Level) -> int:
        """At most this much must be used for the level to fall; positive, so that every level can be left."""
        entered_bytes = self.enter_bytes(level)
        return max(entered_bytes - self.leave_gap_bytes, entered_bytes // 2)


@dataclass(frozen=True, kw_only=True)
class LevelState:
    level: Level = Level.NORMAL
    calm_since_seconds: float | None = None  # use has been below the leave threshold since then


def card_of(total_bytes: int) -> Card:
    """The nearest by ratio: what is sold as 24 GB reports 22.5 to 24.0 GiB."""
    total_gib = max(total_bytes, 1) / GIB
    return min(CARDS, key=lambda card: abs(math.log(total_gib / card.total_gib)))


def limits_of(settings: MonitorSettings, total_bytes: int | None) -> Limits | None:
    """Thresholds in bytes; None while a share is asked for and the total is unknown."""
    cleanup_bytes, emergency_bytes = settings.cleanup_bytes, settings.emergency_bytes
    if total_bytes is None:
        if not (cleanup_bytes and emergency_bytes):
            return None
        total_bytes = emergency_bytes
    card = card_of(total_bytes)
    cleanup_bytes = cleanup_bytes or int((settings.cleanup_share or card.cleanup_share) * total_bytes)
    emergency_bytes = emergency_bytes or int((settings.emergency_share or card.emergency_share) * total_bytes)
    if cleanup_bytes >= emergency_bytes:  # one was set beyond the other of the card: the set one holds
        if settings.emergency_bytes or settings.emergency_share:
            cleanup_bytes = int(emergency_bytes * card.cleanup_share / card.emergency_share)
        else:
            emergency_bytes = max(cleanup_bytes + 2, (cleanup_bytes + total_bytes) // 2)
    step_bytes = emergency_bytes - cleanup_bytes
    return Limits(
        notice_bytes=max(cleanup_bytes - step_bytes, cleanup_bytes // 2),
        cleanup_bytes=cleanup_bytes,
        high_bytes=cleanup_bytes + (step_bytes + 1) // 2,
        emergency_bytes=emergency_bytes,
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
    if state.level is Level.NORMAL or used_bytes > limits.leave_bytes(state.level):
        return LevelState(level=state.level)
    calm_since_seconds = now_seconds if state.calm_since_seconds is None else state.calm_since_seconds
    if now_seconds - calm_since_seconds < limits.dwell_seconds:
        return LevelState(level=state.level, calm_since_seconds=calm_since_seconds)
    return LevelState(level=Level(state.level - 1))


def _reached(used_bytes: int, limits: Limits) -> Level:
    reached = [level for level in Level if level and used_bytes >= limits.enter_bytes(level)]
    return max(reached, default=Level.NORMAL)
