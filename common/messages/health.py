"""Messages that do not teach the predictor: vetoes and orders of the monitor, readings, signs of life."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseVeto:
    """The newest one counts. It lapses `valid_seconds` after arrival: a dead monitor stops nothing."""

    veto_id: str
    active: bool
    reason: str
    valid_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOrder:
    order_id: str
    action: str  # "cleanup"
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRequest:
    request_id: str
    emergency: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderDone:
    """The trainer's acknowledgement of a MemoryOrder or CheckpointRequest."""

    order_id: str
    bytes_before: int | None  # memory the trainer held; None = unknown
    bytes_after: int | None
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Held-out loss. The predictor never reads it: it must not learn from the score."""

    step: int
    virtual_steps: int
    loss: float  # nats per token, or per example
    accuracy: float | None  # classification only
    train_seconds: float  # wall seconds of training so far


@dataclass(frozen=True, kw_only=True, slots=True)
class VramSample:
    """Memory of the device or process. Unknown is None with a reason, never zero."""

    source: str  # "nvml", "rss"
    device: str
    used_bytes: int | None
    total_bytes: int | None
    trainer_bytes: int | None
    unknown_reason: str  # "" when all is known


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    name: str
    value: float | None
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthSample:
    node: str
    step: int
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    node: str
    severity: str  # "info", "warning", "error"
    kind: str  # stable key, e.g. "prediction_lost"
    text: str  # what happened and what to do
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    node: str
    generation: int
    process_id: int
    state: str  # "starting", "running", "stopping"
    step: int  # last step this node knows of
    uptime_seconds: float
    counters: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLost:
    node: str
    silent_seconds: float
    last_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    stream: str
    entry_id: str
    kind: str
    deliveries: int  # tries of a message that a node could not handle
    error: str
    body: bytes
