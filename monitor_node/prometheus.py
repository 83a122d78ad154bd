"""The newest snapshot as Prometheus metrics. What is unknown gives no sample: never 0, never the last value.

Names carry their unit (bytes, seconds, ratio); a loss that is NaN or infinite is exported as just that. All
are gauges, except what only grows. `hpt_current_step` goes back where a jump is refused; `hpt_step_total`
counts the steps that were really taken, undone ones too, and is held where a resume from an older checkpoint
would send it back, because `rate()` takes a counter that falls for one that began again at zero. Labels are
of fixed sets, or bounded in number and length. Decides nothing, knows no HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from common.messages import Verdict

RUN_STATES = ("starting", "running", "stalled", "crashed", "stopping", "finished")
_LIVENESS_UP = {"alive": 1.0, "stalled": 1.0, "silent": 0.0, "finished": 0.0}  # unseen: no sample
_MARKERS = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}
_MAX_LABELS = 64  # values of one label that come from a stream
_MAX_CHARACTERS = 120

Snapshot = Mapping[str, Any]
Sample = tuple[tuple[str, ...], float]  # label values, value


class SnapshotCollector(Collector):
    """Asks for the snapshot once for each scrape. Holds only where counters stood."""

    def __init__(self, newest: Callable[[], Snapshot]) -> None:
        self._newest = newest
        self._steps = 0.0

    def collect(self) -> Iterator[Metric]:
        snapshot = self._newest()
        progress = _section(snapshot, "progress")
        steps = _number(progress, "step")
        if steps is not None:
            self._steps = max(self._steps, steps + (_number(progress, "lost_steps") or 0.0))
            yield _counter("hpt_step", "Optimizer steps taken, undone ones too", [((), self._steps)])
        yield from gauges(snapshot)
        yield from counters(snapshot)
        yield from labelled(snapshot)

    def describe(self) -> Iterable[Metric]:
        return []  # registered without a scrape: there is no snapshot yet


def exposition(collector: Collector, accept: str) -> tuple[bytes, str]:
    """The body of /metrics and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    try:
        encode, content_type = choose_encoder(accept)
    except (ValueError, TypeError):  # the library compares whatever stands there for a version
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


# name, what it says, section, key. Read top down as the page is read.
_GAUGES = (
    ("hpt_current_step", "Last step; goes back where a jump is undone", "progress", "step"),
    ("hpt_total_steps", "Steps that the run is to take", "progress", "total_steps"),
    ("hpt_train_loss", "Loss of the last step", "progress", "loss"),
    ("hpt_held_out_loss", "Loss on held-out data at the last evaluation", "progress", "held_out_loss"),
    (
        "hpt_held_out_accuracy_ratio",
        "Share of held-out examples that are right",
        "progress",
        "held_out_accuracy",
    ),
    ("hpt_steps_per_second", "Kept steps per second of the trainer", "progress", "steps_per_second"),
    ("hpt_units_per_second", "Tokens or examples per second", "progress", "units_per_second"),
    ("hpt_eta_seconds", "Time to the end at the present speed", "progress", "eta_seconds"),
    ("hpt_virtual_steps", "Steps that kept jumps stand for", "progress", "virtual_steps"),
    ("hpt_virtual_ratio", "Virtual steps as a share of all", "progress", "virtual_share"),
    ("hpt_pace_progress_per_second", "Steps' worth of progress per second", "pace", "progress_per_second"),
    (
        "hpt_pace_plain_progress_per_second",
        "The same of plain training",
        "pace",
        "plain_progress_per_second",
    ),
    (
        "hpt_pace_saved_ratio",
        "Share of time that prediction saves; negative = it costs",
        "pace",
        "saved_share",
    ),
    ("hpt_rate_factor", "Times the scheduled learning rate, as it stands", "controls", "rate_factor"),
    ("hpt_batch_factor", "Times the configured batch, as it stands", "controls", "batch_factor"),
    ("hpt_context_tokens", "Context of a text run, as it stands", "controls", "context_tokens"),
    (
        "hpt_noise_scale_ratio",
        "Gradient noise scale over the batch of the step",
        "controls",
        "noise_scale_over_batch",
    ),
    ("hpt_memory_used_bytes", "Memory in use on the device", "memory", "used_bytes"),
    ("hpt_memory_total_bytes", "Memory of the device", "memory", "total_bytes"),
    ("hpt_memory_trainer_bytes", "Memory of the trainer", "memory", "trainer_bytes"),
    ("hpt_memory_next_peak_bytes", "Forecast of the next peak", "memory", "next_peak_bytes"),
    (
        "hpt_memory_seconds_until_emergency",
        "When memory is full at this rate",
        "memory",
        "seconds_until_emergency",
    ),
    ("hpt_checkpoint_step", "Step of the newest checkpoint", "checkpoint", "step"),
    ("hpt_checkpoint_timestamp_seconds", "When it was written, unix time", "checkpoint", "at_unix_seconds"),
    ("hpt_start_timestamp_seconds", "When the run began, unix time", "run", "started_unix_seconds"),
    ("hpt_server_connected", "1 while the monitor reads the message server", "server", "connected"),
    ("hpt_server_away_seconds", "For how long it has not", "server", "away_seconds"),
    ("hpt_prediction_paused", "1 while a person has paused prediction", "actions", "paused"),
)
_COUNTERS = (
    ("hpt_lost_steps", "Real steps that were undone", "progress", "lost_steps"),
    ("hpt_dead_letters", "Messages that a node gave up", "counters", "dead_letters"),
)


def gauges(snapshot: Snapshot) -> Iterator[Metric]:
    for name, what, section, key in _GAUGES:
        yield from _some(GaugeMetricFamily(name, what), [((), _number(_section(snapshot, section), key))])
    run = _section(snapshot, "run")
    if run:
        yield from _some(
            GaugeMetricFamily("hpt_prediction_vetoed", "1 while a veto is in force"),
            [((), float(run.get("veto") is not None))],
        )


def counters(snapshot: Snapshot) -> Iterator[Metric]:
    for name, what, section, key in _COUNTERS:
        number = _number(_section(snapshot, section), key)
        if number is not None:
            yield _counter(name, what, [((), number)])
    told = _section(snapshot, "counters")
    verdicts = [((verdict.value,), _number(told, verdict.value)) for verdict in Verdict]
    yield from _some(
        CounterMetricFamily("hpt_proposals", "Proposals by what became of them", labels=["verdict"]), verdicts
    )


def labelled(snapshot: Snapshot) -> Iterator[Metric]:
    """What there is several of."""
    for name, what, labels, samples in (
        ("hpt_run_status", "1 for the state of the run", ("status",), _status(snapshot)),
        ("hpt_node_up", "1 = beats, 0 = silent or gone", ("node",), _of_nodes(snapshot, _up)),
        ("hpt_heartbeat_age_seconds", "Since the last heartbeat", ("node",), _of_nodes(snapshot, _age)),
        ("hpt_memory_threshold_bytes", "Where a level begins", ("level",), _thresholds(snapshot)),
        ("hpt_memory_holder_bytes", "Who holds memory", ("holder", "place"), _holders(snapshot)),
        ("hpt_device_reading", "Sensors of the device", ("name", "unit", "source"), _readings(snapshot)),
        ("hpt_time_ratio", "Share of the trainer's time", ("purpose",), _shares(snapshot)),
        ("hpt_stream_entries", "Entries of a stream", ("stream",), _of_streams(snapshot, "entries")),
        ("hpt_stream_lag_steps", "Steps behind the trainer", ("stream",), _of_streams(snapshot, "lag_steps")),
        ("hpt_stream_pending", "Delivered, not answered", ("stream",), _of_streams(snapshot, "pending")),
        ("hpt_node_count", "What a node counts", ("node", "name"), _node_counters(snapshot)),
        ("hpt_health", "Health measures of a node", ("node", "name"), _health(snapshot)),
    ):
        yield from _some(GaugeMetricFamily(name, what, labels=labels), samples)
    for key in ("dead_letters", "fenced", "duplicates", "gaps", "damaged"):
        family = CounterMetricFamily(
            f"hpt_stream_{key}", f"{key} of a stream".replace("_", " "), labels=["stream"]
        )
        yield from _some(family, _of_streams(snapshot, key))
    run = _section(snapshot, "run")
    if run:
        facts = {key: _label(run.get(key)) for key in ("run_id", "task", "decision_mode", "generation")}
        yield InfoMetricFamily("hpt_run", "Which run this is", value=facts)


Samples = Iterable[tuple[tuple[str, ...], float | None]]


def _status(snapshot: Snapshot) -> Samples:
    status = _section(snapshot, "run").get("status")
    return [((state,), float(state == status)) for state in RUN_STATES] if status in RUN_STATES else []


def _up(node: Mapping[str, Any]) -> float | None:
    return _LIVENESS_UP.get(node.get("liveness", ""))


def _age(node: Mapping[str, Any]) -> float | None:
    return _number(node, "heartbeat_age_seconds")


def _of_nodes(snapshot: Snapshot, value: Callable[[Mapping[str, Any]], float | None]) -> Samples:
    return [((_label(node.get("node")),), value(node)) for node in _rows(snapshot, "nodes")]


def _node_counters(snapshot: Snapshot) -> Samples:
    for node in _rows(snapshot, "nodes"):
        told = node.get("counters") or {}
        for name in sorted(told)[:_MAX_LABELS]:
            if not name.endswith("_marker"):
                yield (_label(node.get("node")), _label(name)), _number(told, name)


def _health(snapshot: Snapshot) -> Samples:
    for node, told in sorted(_section(snapshot, "health").items()):
        for name in sorted(told)[:_MAX_LABELS]:
            if not name.endswith("_marker"):
                yield (_label(node), _label(name)), _number(told, name)


def _thresholds(snapshot: Snapshot) -> Samples:
    memory = _section(snapshot, "memory")
    return [
        ((level,), _number(memory, f"{level}_bytes")) for level in ("notice", "cleanup", "high", "emergency")
    ]


def _holders(snapshot: Snapshot) -> Samples:
    report = _section(_section(snapshot, "memory"), "report")
    for holder in _rows(report, "holders")[:_MAX_LABELS]:
        yield (_label(holder.get("name")), _label(holder.get("place"))), _number(holder, "num_bytes")


def _readings(snapshot: Snapshot) -> Samples:
    told = _section(_section(snapshot, "memory"), "readings")
    for name in sorted(told)[:_MAX_LABELS]:
        said = told[name]
        yield (_label(name), _label(said.get("unit")), _label(said.get("source"))), _number(said, "value")


def _shares(snapshot: Snapshot) -> Samples:
    shares = _section(_section(snapshot, "timing"), "shares")
    purposes = [purpose for purpose in sorted(shares)[:_MAX_LABELS] if not purpose.endswith("_marker")]
    return [((_label(purpose),), _number(shares, purpose)) for purpose in purposes]


def _of_streams(snapshot: Snapshot, key: str) -> Samples:
    rows = _rows(snapshot, "stream_health")[:_MAX_LABELS]
    return [((_label(row.get("stream")),), _number(row, key)) for row in rows]


def _section(snapshot: Snapshot, name: str) -> Mapping[str, Any]:
    section = snapshot.get(name)
    return section if isinstance(section, Mapping) else {}


def _rows(snapshot: Snapshot, name: str) -> list[Mapping[str, Any]]:
    rows = snapshot.get(name)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, (list, tuple)) else []


def _number(section: Mapping[str, Any], key: str) -> float | None:
    """None = unknown. The snapshot marks a number that is not finite beside it (snapshot.plain)."""
    value = section.get(key)
    if isinstance(value, (int, float)):
        return float(value)
    return _MARKERS.get(section.get(f"{key}_marker", ""))


def _label(value: object) -> str:
    return "" if value is None else str(value)[:_MAX_CHARACTERS]


def _counter(name: str, what: str, samples: Iterable[Sample]) -> Metric:
    (metric,) = _some(CounterMetricFamily(name, what), samples)
    return metric


def _some(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Iterator[Metric]:
    """The family with its known samples; nothing at all without any. Two samples of one label set are one."""
    known = {labels: value for labels, value in samples if value is not None}
    for labels, value in known.items():
        family.add_metric(labels, value)
    if known:
        yield family
