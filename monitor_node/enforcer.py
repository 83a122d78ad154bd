"""Turns memory readings into orders for the trainer. Pure: state in, state and messages out.

Clean-up level: one MemoryOrder when it is entered, and a PhaseVeto that is renewed while it lasts,
since a jump needs memory for its snapshot. A run that diverges is vetoed in the same way, so that one
veto speaks for all reasons and none lifts another's. Emergency: one CheckpointRequest per excursion, that is
until the level has been normal again. A GPU whose sensor stays unknown is vetoed too (blind is not
safe); on a CPU unknown is only reported, because the operating system swaps before it kills.
Never touches weights, never stops training: every veto lapses by itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from common.messages import (
    Alert,
    CheckpointRequest,
    MemoryAction,
    MemoryOrder,
    Message,
    PhaseVeto,
    VramSample,
)
from common.settings import MonitorSettings
from monitor_node.thresholds import Level, LevelState, Limits, limits_of, next_level

VETO_SECONDS = 10.0  # how long one veto holds
RENEW_SECONDS = 4.0  # two renewals may get lost before a veto lapses
LOST_SAMPLES = 5  # unknown readings in a row until a GPU's sensor counts as lost; guess, untested


@dataclass(frozen=True, kw_only=True)
class EnforcerState:
    memory: LevelState = field(default_factory=LevelState)
    unknown_samples: int = 0  # in a row
    checkpoint_asked: bool = False  # in this excursion
    memory_reason: str = ""  # for a veto; "" = none
    divergence_reason: str = ""  # the same of divergence.py
    veto_reason: str = ""  # of the active veto; "" = none
    vetoed_at_seconds: float = 0.0
    orders: int = 0  # given so far; numbers the ids


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What stays the same between readings."""

    generation: int  # of the monitor: ids stay unique when it restarts
    is_gpu: bool
    monitor: MonitorSettings


def enforce(
    state: EnforcerState, sample: VramSample, setting: Setting, *, now_seconds: float, step: int
) -> tuple[EnforcerState, tuple[Message, ...]]:
    """The next state, and orders and alerts in the order in which to publish them."""
    limits = limits_of(setting.monitor, sample.total_bytes)
    memory = next_level(state.memory, used_bytes=sample.used_bytes, limits=limits, now_seconds=now_seconds)
    unknown_samples = 0 if sample.used_bytes is not None else state.unknown_samples + 1
    level, before = memory.level, state.memory.level
    numbers = itertools.count(state.orders + 1)
    reason = _memory_reason(level, unknown_samples, setting, sample)
    new = replace(state, memory=memory, unknown_samples=unknown_samples, memory_reason=reason)
    out: list[Message] = []

    def next_id() -> str:
        return f"{setting.generation}.{next(numbers)}"

    text = _level_text(level, sample, limits)
    if level is not before:
        out.append(_alert("memory_level", _SEVERITY[level], text, step))
    if before is Level.NORMAL and level > before:
        out.append(MemoryOrder(order_id=next_id(), action=MemoryAction.CLEANUP, reason=text))
    if level is Level.EMERGENCY and not state.checkpoint_asked:
        out.append(CheckpointRequest(request_id=next_id(), emergency=True, reason=text))
        new = replace(new, checkpoint_asked=True)
    elif level is Level.NORMAL:
        new = replace(new, checkpoint_asked=False)
    out += _sensor_alerts(state, unknown_samples, sample, step)

    new = replace(new, orders=next(numbers) - 1)
    new, vetoes = _renewed_veto(new, setting, now_seconds=now_seconds)
    return new, (*out, *vetoes)


def object_to_divergence(
    state: EnforcerState, reason: str, setting: Setting, *, now_seconds: float
) -> tuple[EnforcerState, tuple[Message, ...]]:
    """The next state and a veto or its end; `reason` is "" while the run is sound."""
    return _renewed_veto(replace(state, divergence_reason=reason), setting, now_seconds=now_seconds)


def _renewed_veto(
    state: EnforcerState, setting: Setting, *, now_seconds: float
) -> tuple[EnforcerState, tuple[Message, ...]]:
    reason = state.memory_reason or state.divergence_reason
    renewal_due = now_seconds - state.vetoed_at_seconds >= RENEW_SECONDS
    veto_id = f"{setting.generation}.{state.orders + 1}"
    if reason and (renewal_due or not state.veto_reason):
        veto = PhaseVeto(veto_id=veto_id, active=True, reason=reason, valid_seconds=VETO_SECONDS)
        state = replace(state, veto_reason=reason, vetoed_at_seconds=now_seconds)
    elif state.veto_reason and not reason:
        veto = PhaseVeto(veto_id=veto_id, active=False, reason="cleared", valid_seconds=0.0)
        state = replace(state, veto_reason="")
    else:
        return state, ()
    return replace(state, orders=state.orders + 1), (veto,)


_SEVERITY = {Level.NORMAL: "info", Level.CLEANUP: "warning", Level.EMERGENCY: "error"}


def _memory_reason(level: Level, unknown_samples: int, setting: Setting, sample: VramSample) -> str:
    if level > Level.NORMAL:
        return f"memory level {level.label}"
    if setting.is_gpu and unknown_samples >= LOST_SAMPLES:
        return f"memory of the GPU is unknown: {sample.unknown_reason}"
    return ""


def _sensor_alerts(
    before: EnforcerState, unknown_samples: int, sample: VramSample, step: int
) -> list[Message]:
    if unknown_samples == LOST_SAMPLES:
        text = f"memory is unknown ({sample.unknown_reason}); the monitor cannot warn of a full device"
        return [_alert("memory_unknown", "warning", text, step)]
    if unknown_samples == 0 and before.unknown_samples >= LOST_SAMPLES:
        return [_alert("memory_known", "info", f"memory is readable again ({sample.source})", step)]
    return []


def _level_text(level: Level, sample: VramSample, limits: Limits | None) -> str:
    if sample.used_bytes is None or limits is None:
        return f"memory level {level.label}"
    used = f"{sample.used_bytes / 2**30:.2f} GiB used on {sample.device}"
    if level is Level.NORMAL:
        return f"memory is back to normal: {used}"
    threshold = limits.emergency_bytes if level is Level.EMERGENCY else limits.cleanup_bytes
    return f"memory level {level.label}: {used}, threshold {threshold / 2**30:.2f} GiB"


def _alert(kind: str, severity: str, text: str, step: int) -> Alert:
    return Alert(node="monitor", severity=severity, kind=kind, text=text, step=step)
