"""Messages that do not teach the predictor: vetoes and orders of the monitor, readings, signs of life."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class MemoryAction(enum.StrEnum):
    """What the monitor may ask of the trainer's memory, mildest first. All but CLEANUP can be undone."""

    CLEANUP = "cleanup"  # garbage collection and the allocator's cache
    BASIS_BF16 = "basis-bf16"  # directions in half the memory
    BASIS_HOST = "basis-host"  # directions and history in host memory
    PREDICTION_OFF = "prediction-off"  # no basis, no snapshots, no proposals
    HALVE_MICRO_BATCH = "halve-micro-batch"  # twice the micro-batches: the global batch stays
    RECOMPUTE = "recompute"  # activations are computed again in the backward pass


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
    action: MemoryAction
    reason: str
    undo: bool = False  # take the newest order of this action back


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRequest:
    request_id: str
    emergency: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRequest:
    """A person wants the run to stop after the present step, with a checkpoint to resume from."""

    request_id: str
    reason: str


Order = MemoryOrder | CheckpointRequest | StopRequest  # what the trainer answers with an OrderDone


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderDone:
    """The trainer's acknowledgement of an Order."""

    order_id: str
    done: bool  # False: it could not be carried out, `detail` says why; the next milder state holds
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
class Reading:
    """One number of a sensor. Unknown is None with a reason, never zero."""

    name: str  # e.g. "temperature", "power", "throttle", "recovery_action", "xid"
    value: float | None
    unit: str  # "C", "W", "1", ...
    source: str  # the call that gave it
    unknown_reason: str  # "" when known


@dataclass(frozen=True, kw_only=True, slots=True)
class VramSample:
    """Memory of the device or process. Unknown is None with a reason, never zero."""

    source: str  # "nvml", "nvml-v1", "host" (unified memory), "rss", "fake", "none" (no answer)
    device: str
    used_bytes: int | None
    total_bytes: int | None
    trainer_bytes: int | None
    unknown_reason: str  # "" when all is known
    readings: tuple[Reading, ...] = ()  # what else the device says of itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds memory: "weights", "optimizer", "gradients", "averages", "history", "snapshot", "rest"."""

    name: str
    num_bytes: int
    place: str  # "device", "host", "disk"; on a CPU the device is host memory


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryReport:
    """The trainer's own side. Bytes on its device; None where the allocator does not say."""

    step: int
    occasion: str  # "interval", a phase that begins ("predict", "full", ...), "order", "out-of-memory"
    allocated_bytes: int | None
    reserved_bytes: int | None
    inactive_split_bytes: int | None  # reserved, free and in pieces: fragmentation
    peak_bytes: int | None  # highest allocation of one step since the last report
    alloc_retries: int  # since the process began; rising = the allocator is thrashing
    out_of_memory: int  # caught since the process began
    micro_batch: int  # sequences or examples
    accumulation: int  # micro-batches a step
    in_force: tuple[MemoryAction, ...]  # given up and not taken back; HALVE_MICRO_BATCH once a halving
    holders: tuple[Holder, ...]


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
