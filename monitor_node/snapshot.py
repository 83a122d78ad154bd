"""What people see: turns a RunView into one JSON-able dict. Pure; decides nothing.

`monitor-node status` prints exactly this and the live page draws exactly this. A number that is
not finite is null with a marker beside it ("NaN", "inf", "-inf"), because JSON has no such
numbers and a reader must not take them for "unknown". Sizes are in bytes, `at` times in seconds since 1970.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.messages import Verdict
from common.streams import NODES
from monitor_node.checkpoint_checks import checkpoint_rows
from monitor_node.control_section import control_series, controls_section, expected_steps, is_shown
from monitor_node.divergence import Level
from monitor_node.liveness import Liveness
from monitor_node.memory_snapshot import memory_section, order_row
from monitor_node.pace import pace_rows, pace_section, whole_pace
from monitor_node.proposal_book import ProposalRow
from monitor_node.provenance import provenance_section
from monitor_node.run_view import AlertRow, RunView
from monitor_node.series import Curve, marker_of
from monitor_node.stream_health import StreamFacts, stream_rows
from monitor_node.timing import timing_section
from monitor_node.verdict import RunStatus, status_of, words


def as_dict(view: RunView, *, now_seconds: float) -> dict[str, Any]:
    """The whole view. `now_seconds`: the monotonic clock that `fold` was given."""
    status = status_of(view, now_seconds)
    progress = _progress(view, status)
    settings_toml = view.started.settings_toml if view.started else None
    sections: dict[str, Any] = {
        "run": _run(view, status, words(view, status, now_seconds)),
        "progress": progress,
        "pace": pace_section(
            whole_pace(view.time, view.worth), steps_are_alike=not view.curves.controls.has_moved
        ),
        "timing": timing_section(view.time),
        "counters": _counters(view),
        "proposals": [_proposal(row) for row in reversed(view.jumps.rows)],
        "nodes": [_node(view, node, now_seconds) for node in NODES],
        "memory": memory_section(view, now_seconds),
        "orders": [order_row(row) for row in reversed(view.orders.rows)],
        "alerts": [_alert(row) for row in reversed(view.alerts)],
        "divergence": _divergence(view),
        "health": {
            node: {metric.name: metric.value for metric in sample.metrics}
            for node, sample in sorted(view.health.items())
        },
        "checkpoint": _checkpoint(view),
        "checkpoints": checkpoint_rows(view.checkpoints, view.checkpoint_checks),
        "streams": dict(sorted(view.stream_lengths.items())),
        "stream_health": stream_rows(view.streams, _stream_facts(view, now_seconds)),
        "settings": {"toml": settings_toml},
        "provenance": provenance_section(view.provenance, settings_toml),
        "holder_names": view.curves.holders.names,
        "marks": {"train": _marks(view.curves.train), "held_out": _marks(view.curves.held_out)},
    }
    series = _series(view)
    if is_shown(view):
        sections["controls"] = controls_section(view)
        series |= _rows_of(control_series(view))
    return {**{name: plain(section) for name, section in sections.items()}, "series": series}


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


def _series(view: RunView) -> dict[str, list[Any]]:
    """Plain already: a curve takes finite numbers only, and `plain` of all the rows would take 5 ms."""
    curves = view.curves
    rows: dict[str, Sequence[Sequence[Any]]] = {
        "train": curves.train.points(),
        "held_out": curves.held_out.points(),
        "forecast": plain(curves.forecast.points()),  # but for its spread
        "memory": curves.memory.points(),
        "phases": curves.phases.segments(),
        "jumps": curves.jumps,
        "seconds": curves.seconds.points(),
        "units": curves.units.points(),
        "holders": curves.holders.rows(),
        "order_marks": plain(view.orders.marks),
        "proposals": view.jumps.marks,
        "pace": pace_rows(view.time, view.worth),
    }
    return _rows_of(rows)


def _rows_of(curves: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, list[Any]]:
    return {name: list(map(list, rows)) for name, rows in curves.items()}


def _run(view: RunView, status: RunStatus, line: str) -> dict[str, Any]:
    started = view.started
    return {
        "run_id": view.run_id,
        "status": status.value,
        "words": line,
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
    total_steps = expected_steps(view)
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
    return {"proposals": view.proposals, **verdicts, "dead_letters": view.dead_letters.total()}


def _proposal(row: ProposalRow) -> dict[str, Any]:
    outcome, said = row.outcome, row.said
    return {
        "decision_id": outcome.decision_id,
        "step": outcome.base_step,
        "horizon_steps": outcome.horizon_steps,
        "verdict": outcome.verdict.value,
        "reason": said.reason if said else None,
        "predicted_loss": said.predicted_loss if said else None,
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
    if not view.checkpoints:
        return None
    newest = view.checkpoints[-1]
    return {
        "name": newest.written.name,
        "step": newest.written.step,
        "emergency": newest.written.emergency,
        "at_unix_seconds": newest.at_unix_seconds,
    }


def _alert(row: AlertRow) -> dict[str, Any]:
    return {
        "severity": row.alert.severity,
        "kind": row.alert.kind,
        "node": row.alert.node,
        "text": row.alert.text,
        "step": row.alert.step,
        "at_unix_seconds": row.at_unix_seconds,
    }


def _stream_facts(view: RunView, now_seconds: float) -> StreamFacts:
    lives = view.watch.lives
    living = [node for node in lives if view.watch.state_of(node, now_seconds) is not Liveness.FINISHED]
    return StreamFacts(
        entries=view.stream_lengths,
        trainer_step=view.step,
        node_steps={node: lives[node].beat.step for node in living},
        dead_letters=view.dead_letters,
        unanswered_orders=view.orders.unanswered,
    )


def _marks(curve: Curve) -> list[tuple[int, str]]:
    return list(curve.marks)
