"""What people see: turns a RunView into one JSON-able dict. Pure; decides nothing.

`monitor-node status` prints exactly this and the live page draws exactly this. A number that is
not finite is null with a marker beside it ("NaN", "inf", "-inf"), because JSON has no such
numbers and a reader must not take them for "unknown". Sizes are in bytes, `at` times in seconds since 1970.
"""

from __future__ import annotations

import enum
import math
from typing import Any

from common.messages import APPLIED_VERDICTS, Verdict
from common.streams import NODES, TRAINER
from monitor_node.divergence import Level
from monitor_node.liveness import Liveness
from monitor_node.memory_snapshot import memory_section, order_row
from monitor_node.run_view import ProposalRow, RunView
from monitor_node.series import Curve, marker_of


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


def as_dict(view: RunView, *, now_seconds: float) -> dict[str, Any]:
    """The whole view. `now_seconds`: the monotonic clock that `fold` was given."""
    status = status_of(view, now_seconds)
    progress = _progress(view, status)
    sections = {
        "run": _run(view, status, progress),
        "progress": progress,
        "counters": _counters(view),
        "proposals": [_proposal(row) for row in reversed(view.outcomes)],
        "nodes": [_node(view, node, now_seconds) for node in NODES],
        "memory": memory_section(view, now_seconds),
        "orders": [order_row(row) for row in reversed(view.orders)],
        "alerts": [
            {
                "severity": row.alert.severity,
                "kind": row.alert.kind,
                "node": row.alert.node,
                "text": row.alert.text,
                "step": row.alert.step,
                "at_unix_seconds": row.at_unix_seconds,
            }
            for row in reversed(view.alerts)
        ],
        "divergence": _divergence(view),
        "health": {
            node: {metric.name: metric.value for metric in sample.metrics}
            for node, sample in sorted(view.health.items())
        },
        "checkpoint": _checkpoint(view),
        "streams": dict(sorted(view.stream_lengths.items())),
        "settings": {"toml": view.started.settings_toml if view.started else None},
        "series": {
            "train": view.train.points(),
            "held_out": view.held_out.points(),
            "forecast": view.forecast.points(),
            "memory": view.memory.points(),
            "phases": view.phases.segments(),
            "jumps": list(view.jumps),
        },
        "marks": {"train": _marks(view.train), "held_out": _marks(view.held_out)},
    }
    return {name: plain(section) for name, section in sections.items()}


def plain(value: Any) -> Any:
    """JSON-able twin: tuples become lists, a float that is not finite becomes null and a marker."""
    if isinstance(value, dict):
        result: dict[str, Any] = {}
        for key, item in value.items():
            result[key] = plain(item)
            if isinstance(item, float) and not math.isfinite(item):
                result[f"{key}_marker"] = marker_of(item)
        return result
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _run(view: RunView, status: RunStatus, progress: dict[str, Any]) -> dict[str, Any]:
    started = view.started
    return {
        "run_id": view.run_id,
        "status": status.value,
        "words": _words(view, status, progress),
        "generation": started.generation if started else None,
        "resumed_from": started.resumed_from if started else None,
        "started_unix_seconds": view.started_at_unix_seconds,
        "ended_reason": view.ended.reason if view.ended else None,
        "task": view.settings.trainer.task if view.has_settings else None,
        "decision_mode": view.settings.trainer.decision_mode if view.has_settings else None,
        "prediction_enabled": view.settings.predictor.enabled if view.has_settings else None,
        "veto": view.veto.reason if view.veto else None,
    }


def _progress(view: RunView, status: RunStatus) -> dict[str, Any]:
    total_steps = view.settings.trainer.steps if view.has_settings else None
    is_moving = status in (RunStatus.RUNNING, RunStatus.STOPPING)
    steps_per_second = view.steps_per_second
    units_per_second = None
    if steps_per_second is not None and view.units_per_step is not None:
        units_per_second = steps_per_second * view.units_per_step
    eta_seconds = None
    if is_moving and steps_per_second and total_steps is not None:
        eta_seconds = max(0, total_steps - view.step) / steps_per_second
    done = view.step + view.virtual_steps
    evaluation = view.evaluation
    return {
        "step": view.step,
        "total_steps": total_steps,
        "attempt": view.attempt,
        "phase": view.phase.value if view.phase else None,
        "loss": view.loss,
        "held_out_loss": evaluation.loss if evaluation else None,
        "held_out_step": evaluation.step if evaluation else None,
        "held_out_loss_first": view.first_held_out_loss,
        "held_out_accuracy": evaluation.accuracy if evaluation else None,
        "train_seconds": evaluation.train_seconds if evaluation else None,
        "steps_per_second": steps_per_second,
        "units_per_second": units_per_second,
        "unit": "tokens" if view.settings.trainer.task == "language" else "examples",
        "eta_seconds": eta_seconds,
        "virtual_steps": view.virtual_steps,
        "virtual_share": view.virtual_steps / done if done else 0.0,
        "lost_steps": view.lost_steps,
    }


def _counters(view: RunView) -> dict[str, int]:
    verdicts = {verdict.value: view.verdicts[verdict] for verdict in Verdict}
    return {"proposals": view.proposals, **verdicts, "dead_letters": view.dead_letters}


def _proposal(row: ProposalRow) -> dict[str, Any]:
    outcome, decision = row.outcome, row.decision
    forecast = decision.forecast if decision else None
    return {
        "decision_id": outcome.decision_id,
        "step": outcome.base_step,
        "horizon_steps": outcome.horizon_steps,
        "verdict": outcome.verdict.value,
        "reason": decision.reason if decision else None,
        "predicted_loss": forecast.loss if forecast else None,
        "loss_before": outcome.loss_before,
        "loss_after": outcome.loss_after,
        "loss_end": outcome.loss_end,
        "loss_forecast": outcome.loss_forecast,
        "loss_spread": outcome.loss_spread,
        "delta_norm": outcome.delta_norm,
        "delta_cosine": outcome.delta_cosine,
        "lost_steps": outcome.lost_steps,
        "cost_seconds": outcome.waiting_seconds
        + outcome.snapshot_seconds
        + outcome.jump_seconds
        + outcome.check_seconds
        + outcome.restore_seconds
        + outcome.lost_seconds,
        "full_step_seconds": outcome.full_step_seconds,
    }


def _node(view: RunView, node: str, now_seconds: float) -> dict[str, Any]:
    life = view.watch.lives.get(node)
    age_seconds = view.watch.age_seconds(node, now_seconds)
    return {
        "node": node,
        "liveness": view.watch.state_of(node, now_seconds).value,
        "state": life.beat.state if life else None,
        "step": life.beat.step if life else None,
        "generation": life.beat.generation if life else None,
        "process_id": life.beat.process_id if life else None,
        "heartbeat_age_seconds": None if age_seconds is None else round(age_seconds, 1),
        "uptime_seconds": life.beat.uptime_seconds if life else None,
        "counters": {c.name: c.value for c in life.beat.counters} if life else {},
    }


def _divergence(view: RunView) -> dict[str, Any]:
    found = view.divergence
    return {
        "level": max((kind.level for kind in found.kinds.values()), default=Level.NORMAL).label,
        "kinds": {name: kind.level.label for name, kind in sorted(found.kinds.items())},
        "excursions": found.excursions,
        "text": found.critical.text if found.critical else "",
    }


def _checkpoint(view: RunView) -> dict[str, Any] | None:
    if view.checkpoint is None or view.checkpoint_at_unix_seconds is None:
        return None
    return {
        "name": view.checkpoint.name,
        "step": view.checkpoint.step,
        "emergency": view.checkpoint.emergency,
        "at_unix_seconds": view.checkpoint_at_unix_seconds,
    }


def _words(view: RunView, status: RunStatus, progress: dict[str, Any]) -> str:
    """The status line: one sentence about the run, one about prediction, one about memory."""
    total = f" of {progress['total_steps']:,}" if progress["total_steps"] is not None else ""
    at_step = f"step {view.step:,}{total}"
    sentence = {
        RunStatus.STARTING: "Starting: waiting for the trainer's first step.",
        RunStatus.RUNNING: f"Running: {at_step}.",
        RunStatus.STALLED: f"Stalled: the trainer is alive, but stays at {at_step}.",
        RunStatus.CRASHED: f"The trainer fell silent at {at_step}; `trainer-node resume` continues the run.",
        RunStatus.STOPPING: f"Stopping at {at_step}.",
        RunStatus.FINISHED: f"Ended at {at_step} ({view.ended.reason if view.ended else ''}).",
    }[status]
    accepted, applied = view.verdicts[Verdict.ACCEPTED], _applied(view)
    if applied:
        share = f"{progress['virtual_share']:.0%} of the steps so far are virtual"
        sentence += f" {accepted} of {applied} applied jumps were kept; {share}."
    if view.veto:
        sentence += f" Prediction is vetoed: {view.veto.reason}."
    return sentence


def _applied(view: RunView) -> int:
    return sum(view.verdicts[verdict] for verdict in APPLIED_VERDICTS)


def _marks(curve: Curve) -> list[tuple[int, str]]:
    return list(curve.marks)
