"""Turns what is known of memory into messages for the trainer and for people. Pure.

Level: thresholds.py; an allocator that frees its cache step after step counts as high. Which order is next:
ladder.py. From the clean-up level on a PhaseVeto is renewed while it lasts, since a jump needs memory for
its snapshot. A run that diverges is vetoed in the same way, and one whose prediction a person paused, so that
one veto speaks for all reasons and none lifts another's. A GPU whose sensor stays unknown is vetoed too
(blind is not safe); on a CPU unknown is only reported, because the operating system swaps before it kills.
Alerts: an error of the GPU (Xid), once for each number; a level that rises, pressure that is over, a sensor
lost and found, memory that will be full soon (once, until the outlook has been good for ten minutes). Never
touches weights, never stops training: every veto lapses by itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from common.messages import Alert, Message, PhaseVeto, VramSample
from common.settings import GIB, MonitorSettings
from monitor_node.ladder import Footing, LadderState, climb
from monitor_node.memory_facts import MemoryFacts
from monitor_node.nvml_events import XID
from monitor_node.peak_forecast import seconds_until
from monitor_node.thresholds import Level, LevelState, Limits, limits_of, next_level
from monitor_node.xid import XidKind, judge_xid

VETO_SECONDS = 10.0  # how long one veto holds
RENEW_SECONDS = 4.0  # two renewals may get lost before a veto lapses
LOST_SAMPLES = 5  # unknown readings in a row until a GPU's sensor counts as lost; guess, untested
GOOD_OUTLOOK_SECONDS = 600.0  # until a forecast is told again: its own memory; guess, untested


@dataclass(frozen=True, kw_only=True)
class EnforcerState:
    memory: LevelState = field(default_factory=LevelState)
    ladder: LadderState = field(default_factory=LadderState)
    was_thrashing: bool = False
    unknown_samples: int = 0  # in a row
    forecast_at_seconds: float | None = None  # when memory was last seen to fill up; None = not, or long ago
    memory_reason: str = ""  # for a veto; "" = none
    divergence_reason: str = ""  # the same of divergence.py
    operator_reason: str = ""  # the same of the person at the page (actions.py)
    told_xids: frozenset[int] = frozenset()
    veto_reason: str = ""  # of the active veto; "" = none
    vetoed_at_seconds: float = 0.0
    orders: int = 0  # given so far; numbers the ids


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What stays the same between readings."""

    generation: int  # of the monitor: ids stay unique when it restarts
    is_gpu: bool
    monitor: MonitorSettings


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All that is known at one reading."""

    sample: VramSample
    facts: MemoryFacts
    step: int  # of the trainer
    now_seconds: float


def enforce(state: EnforcerState, seen: Seen, setting: Setting) -> tuple[EnforcerState, tuple[Message, ...]]:
    """The next state, and orders and alerts in the order in which to publish them."""
    sample, facts, now_seconds = seen.sample, seen.facts, seen.now_seconds
    limits = limits_of(setting.monitor, sample.total_bytes)
    memory = next_level(state.memory, used_bytes=sample.used_bytes, limits=limits, now_seconds=now_seconds)
    level = max(memory.level, Level.HIGH) if facts.is_thrashing else memory.level
    unknown_samples = 0 if sample.used_bytes is not None else state.unknown_samples + 1
    numbers = itertools.count(state.orders + 1)
    footing = Footing(
        is_known=sample.used_bytes is not None and limits is not None,
        level=level,
        is_relieved=memory.calm_since_seconds is not None and not facts.is_thrashing,
        reason=_level_text(level, seen, limits),
        step=seen.step,
        now_seconds=now_seconds,
        micro_batch=facts.report.micro_batch if facts.report else None,
        out_of_memory=facts.report.out_of_memory if facts.report else 0,
        book=facts.book,
        grow_back_steps=setting.monitor.grow_back_steps,
        cleanup_every_steps=setting.monitor.cleanup_every_steps,
    )
    ladder, orders = climb(state.ladder, footing, next_id=lambda: f"{setting.generation}.{next(numbers)}")
    forecast_at_seconds, outlook = _outlook(state, seen, limits)
    new = replace(
        state,
        memory=memory,
        ladder=ladder,
        was_thrashing=facts.is_thrashing,
        unknown_samples=unknown_samples,
        forecast_at_seconds=forecast_at_seconds,
        memory_reason=_memory_reason(level, unknown_samples, setting, sample),
        orders=next(numbers) - 1,
    )
    new, errors = _xid_alerts(new, seen)
    alerts = [*errors, *_level_alerts(state, new, seen, limits), *_sensor_alerts(state, new, seen), *outlook]
    new, vetoes = _renewed_veto(new, setting, now_seconds=now_seconds)
    return new, (*alerts, *orders, *vetoes)


def object_to_divergence(
    state: EnforcerState, reason: str, setting: Setting, *, now_seconds: float
) -> tuple[EnforcerState, tuple[Message, ...]]:
    """The next state and a veto or its end; `reason` is "" while the run is sound."""
    return _renewed_veto(replace(state, divergence_reason=reason), setting, now_seconds=now_seconds)


def pause_for_operator(
    state: EnforcerState, reason: str, setting: Setting, *, now_seconds: float
) -> tuple[EnforcerState, tuple[Message, ...]]:
    """The same for a person's wish; `reason` is "" while nothing is paused."""
    return _renewed_veto(replace(state, operator_reason=reason), setting, now_seconds=now_seconds)


def _renewed_veto(
    state: EnforcerState, setting: Setting, *, now_seconds: float
) -> tuple[EnforcerState, tuple[Message, ...]]:
    reason = state.memory_reason or state.divergence_reason or state.operator_reason
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


_SEVERITY = {Level.NOTICE: "info", Level.CLEANUP: "warning", Level.HIGH: "warning", Level.EMERGENCY: "error"}


def _memory_reason(level: Level, unknown_samples: int, setting: Setting, sample: VramSample) -> str:
    if level >= Level.CLEANUP:
        return f"memory level {level.label}"
    if setting.is_gpu and unknown_samples >= LOST_SAMPLES:
        return f"memory of the GPU is unknown: {sample.unknown_reason}"
    return ""


def _level_alerts(
    before: EnforcerState, after: EnforcerState, seen: Seen, limits: Limits | None
) -> list[Alert]:
    """On the way up each level; on the way down only that the pressure is over."""
    level, former = after.memory.level, before.memory.level
    alerts = []
    if level > former:
        alerts.append(_alert("memory_level", _SEVERITY[level], _level_text(level, seen, limits), seen.step))
    elif level < Level.CLEANUP <= former:
        alerts.append(_alert("memory_level", "info", f"memory {_used(seen)}: no pressure", seen.step))
    if after.was_thrashing and not before.was_thrashing:
        alerts.append(_alert("memory_thrashing", "warning", _level_text(Level.HIGH, seen, limits), seen.step))
    return alerts


def _sensor_alerts(before: EnforcerState, after: EnforcerState, seen: Seen) -> list[Alert]:
    sample = seen.sample
    if after.unknown_samples == LOST_SAMPLES:
        text = f"memory is unknown ({sample.unknown_reason}); the monitor cannot warn of a full device"
        return [_alert("memory_unknown", "warning", text, seen.step)]
    if after.unknown_samples == 0 and before.unknown_samples >= LOST_SAMPLES:
        return [_alert("memory_known", "info", f"memory is readable again ({sample.source})", seen.step)]
    return []


_XID_SEVERITY = {XidKind.APPLICATION: "warning", XidKind.SUSPECT: "warning", XidKind.FATAL: "error"}


def _xid_alerts(state: EnforcerState, seen: Seen) -> tuple[EnforcerState, list[Alert]]:
    """A storm of one error is told once."""
    values = [reading.value for reading in seen.sample.readings if reading.name == XID]
    codes = {int(value) for value in values if value is not None} - state.told_xids
    verdicts = [judge_xid(code) for code in sorted(codes)]
    alerts = [_alert("gpu_error", _XID_SEVERITY[v.kind], v.text, seen.step) for v in verdicts]
    return replace(state, told_xids=state.told_xids | codes), alerts


def _outlook(state: EnforcerState, seen: Seen, limits: Limits | None) -> tuple[float | None, list[Alert]]:
    told_at_seconds, peaks = state.forecast_at_seconds, seen.facts.peaks
    if limits is None:
        return told_at_seconds, []
    left_seconds = seconds_until(peaks, limits.emergency_bytes, now_seconds=seen.now_seconds)
    if left_seconds is None or peaks.trend is None:
        is_over = told_at_seconds is not None and seen.now_seconds - told_at_seconds >= GOOD_OUTLOOK_SECONDS
        return None if is_over else told_at_seconds, []
    if told_at_seconds is not None:
        return seen.now_seconds, []
    text = (
        f"memory will reach the emergency level ({limits.emergency_bytes / GIB:.2f} GiB) in about"
        f" {max(1, round(left_seconds / 60))} min if it goes on like this: {_used(seen)}, growing by"
        f" {peaks.trend.bytes_per_second * 3600 / GIB:.2g} GiB an hour; the status shows who holds it"
    )
    return seen.now_seconds, [_alert("memory_forecast", "warning", text, seen.step)]


def _level_text(level: Level, seen: Seen, limits: Limits | None) -> str:
    text = f"memory level {level.label}: {_used(seen)}"
    if seen.facts.is_thrashing:
        return f"{text}, the allocator had to free its cache to find room"
    if limits is None or level is Level.NORMAL:
        return text
    return f"{text}, threshold {limits.enter_bytes(level) / GIB:.2f} GiB"


def _used(seen: Seen) -> str:
    if seen.sample.used_bytes is None:
        return "use unknown"
    return f"{seen.sample.used_bytes / GIB:.2f} GiB used on {seen.sample.device}"


def _alert(kind: str, severity: str, text: str, step: int) -> Alert:
    return Alert(node="monitor", severity=severity, kind=kind, text=text, step=step)
