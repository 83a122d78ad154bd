"""The run in one line of words: what it does, whether prediction pays, memory, the newest checkpoint. Pure.

Each sentence is there only where it is known.
"""

from __future__ import annotations

import enum

from common.control_rules import any_on
from common.messages import APPLIED_VERDICTS, Verdict
from common.streams import TRAINER
from common.trying import may_ever_jump, why_never
from monitor_node.control_section import expected_steps
from monitor_node.liveness import Liveness
from monitor_node.pace import Pace, whole_pace
from monitor_node.peak_forecast import seconds_until
from monitor_node.run_view import RunView
from monitor_node.thresholds import Level, limits_of

GIB = 1 << 30
STEADY_SECONDS = 300.0  # in which memory that is steady moved by less than
STEADY_SHARE = 0.02  # of the device
_LEAST_SECONDS = 30.0  # of samples before anything is called steady
NOTHING_SHARE = 0.005  # saved or spent, and not worth the name


class RunStatus(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    STALLED = "stalled"  # the trainer beats, its step does not move
    CRASHED = "crashed"  # the trainer is silent
    STOPPING = "stopping"
    FINISHED = "finished"


def status_of(view: RunView, now_seconds: float) -> RunStatus:
    if view.ended is not None:
        return RunStatus.FINISHED
    trainer = view.watch.state_of(TRAINER, now_seconds)
    life = view.watch.lives.get(TRAINER)
    if trainer is Liveness.SILENT or trainer is Liveness.FINISHED:
        return RunStatus.CRASHED  # no RunEnded: even a trainer that said "stopping" did not get there
    if trainer is Liveness.STALLED:
        return RunStatus.STALLED
    if life is not None and life.beat.state == "stopping":
        return RunStatus.STOPPING
    return RunStatus.RUNNING if view.phase is not None else RunStatus.STARTING


def words(view: RunView, status: RunStatus, now_seconds: float) -> str:
    sentences = [_doing(view, status), _prediction(view)]
    if status not in (RunStatus.FINISHED, RunStatus.CRASHED):
        sentences.append(_memory(view, now_seconds))
    if status is not RunStatus.FINISHED:
        sentences.append(_checkpoint(view, now_seconds))
    if view.veto:
        sentences.append(f"Prediction is vetoed: {view.veto.reason}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _doing(view: RunView, status: RunStatus) -> str:
    total_steps = expected_steps(view)
    total = f" of {total_steps:,}" if total_steps is not None else ""
    at_step = f"step {view.step:,}{total}"
    return {
        RunStatus.STARTING: "Starting: waiting for the trainer's first step.",
        RunStatus.RUNNING: f"Running: {at_step}.",
        RunStatus.STALLED: f"Stalled: the trainer is alive, but stays at {at_step}.",
        RunStatus.CRASHED: f"The trainer fell silent at {at_step}; `trainer-node resume` continues the run.",
        RunStatus.STOPPING: f"Stopping at {at_step}.",
        RunStatus.FINISHED: f"Ended at {at_step} ({view.ended.reason if view.ended else ''}).",
    }[status]


def _prediction(view: RunView) -> str:
    pace = whole_pace(view.time, view.worth)
    applied = sum(view.verdicts[verdict] for verdict in APPLIED_VERDICTS)
    if view.has_settings and view.settings.predictor.enabled and not may_ever_jump(view.settings):
        head = "No jumps" if any_on(view.settings.trainer.controls) else "Plain training"
        return f"{head}: {why_never(view.settings)}."
    controls = view.curves.controls
    is_off = view.has_settings and not view.settings.predictor.enabled
    if pace is None or is_off or controls.has_moved:
        if not applied:
            return ""
        share = view.virtual_steps / max(1, view.step + view.virtual_steps)
        tried = "jumps and changes of controls" if controls.is_used else "jumps"
        kept = f"{view.verdicts[Verdict.ACCEPTED]} of {applied} applied {tried} were kept"
        beside = " Whether they pay shows beside a run without them." if controls.has_moved else ""
        return f"{kept}; {share:.0%} of the steps so far are virtual.{beside}"
    return saving(pace)


def saving(pace: Pace) -> str:
    share = pace.saved_share
    if abs(share) < NOTHING_SHARE:
        return "Prediction neither saves nor costs time."
    verb = "saves" if share > 0 else "costs"
    return f"Prediction {verb} {percent(abs(share))} at equal loss."


def percent(share: float) -> str:
    """One decimal below ten."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def _memory(view: RunView, now_seconds: float) -> str:
    sample = view.sample
    if sample is None or sample.used_bytes is None:
        return ""
    used = f"{sample.used_bytes / GIB:.1f}"
    at = f"{used} of {sample.total_bytes / GIB:.1f} GiB" if sample.total_bytes else f"{used} GiB"
    level = view.level.level
    at += f", level {level.label}" if level is not Level.NORMAL else ""
    limits = limits_of(view.settings.monitor, sample.total_bytes)
    if limits is not None:
        until_seconds = seconds_until(view.guard.peaks, limits.emergency_bytes, now_seconds=now_seconds)
        if until_seconds is not None:
            return f"Memory rising, at {at}: emergency in about {ago(until_seconds)}."
    return f"Memory {'steady ' if is_steady(view) else ''}at {at}."


def is_steady(view: RunView) -> bool:
    """Moved by less than STEADY_SHARE of the device in the last minutes."""
    total_bytes = view.sample.total_bytes if view.sample else None
    points = view.curves.memory.points()
    if not total_bytes or not points:
        return False
    recent = [point for point in points if point[0] >= points[-1][0] - STEADY_SECONDS]
    heights = [point[1] for point in recent]
    is_long_enough = recent[-1][0] - recent[0][0] >= _LEAST_SECONDS
    return is_long_enough and max(heights) - min(heights) <= STEADY_SHARE * total_bytes


def _checkpoint(view: RunView, now_seconds: float) -> str:
    if not view.checkpoints:
        return ""
    newest = view.checkpoints[-1]
    kind = "Emergency checkpoint" if newest.written.emergency else "Checkpoint"
    return f"{kind} {ago(max(0.0, now_seconds - newest.at_seconds))} ago."


def ago(seconds: float) -> str:
    """Coarse, so that the line does not change all the time."""
    if seconds < 100:
        return f"{max(10, int(seconds // 10) * 10)} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{round(seconds / 3600)} h" if seconds < 48 * 3600 else f"{round(seconds / 86400)} days"
