"""Every message of the system. The glossary is in training.py."""

from __future__ import annotations

from common.messages.health import (
    Alert,
    CheckpointRequest,
    DeadLetter,
    Evaluation,
    HealthSample,
    Heartbeat,
    Holder,
    MemoryAction,
    MemoryOrder,
    MemoryReport,
    Metric,
    NodeLost,
    Order,
    OrderDone,
    PhaseVeto,
    Reading,
    StopRequest,
    VramSample,
)
from common.messages.training import (
    APPLIED_VERDICTS,
    DIRECTIONS,
    SCHEMA,
    CheckpointWritten,
    Controls,
    DecisionPoint,
    Forecast,
    GroupSpec,
    Observation,
    Outcome,
    ParameterSpec,
    Phase,
    PhaseDecision,
    RunEnded,
    RunStarted,
    Verdict,
)

__all__ = [
    "APPLIED_VERDICTS",
    "DIRECTIONS",
    "MESSAGE_TYPES",
    "SCHEMA",
    "Alert",
    "CheckpointRequest",
    "CheckpointWritten",
    "Controls",
    "DeadLetter",
    "DecisionPoint",
    "Evaluation",
    "Forecast",
    "GroupSpec",
    "HealthSample",
    "Heartbeat",
    "Holder",
    "MemoryAction",
    "MemoryOrder",
    "MemoryReport",
    "Message",
    "Metric",
    "NodeLost",
    "Observation",
    "Order",
    "OrderDone",
    "Outcome",
    "ParameterSpec",
    "Phase",
    "PhaseDecision",
    "PhaseVeto",
    "Reading",
    "RunEnded",
    "RunStarted",
    "StopRequest",
    "Verdict",
    "VramSample",
]

Message = (
    RunStarted | Observation | Outcome | CheckpointWritten | RunEnded
    | PhaseDecision
    | PhaseVeto | MemoryOrder | CheckpointRequest | StopRequest
    | OrderDone | Evaluation | VramSample | MemoryReport | HealthSample
    | Alert | Heartbeat | NodeLost | DeadLetter
)  # fmt: skip

MESSAGE_TYPES: dict[str, type] = {kind.__name__: kind for kind in Message.__args__}
