"""Which message goes on which stream, who writes it and how long it is kept.

`hpt:{run_id}:<stream>`; the braces keep all keys of a run on one cluster slot. One writer per
stream. `history` is one stream on purpose: what the predictor learns from has one total order.
"""

from dataclasses import dataclass

from common import messages as m

TRAINER, PREDICTOR, MONITOR = NODES = ("trainer", "predictor", "monitor")

HISTORY = "history"
DECISIONS = "decisions"
ORDERS = "orders"


def notes_of(node: str) -> str:
    """The stream on which a node tells people how it is."""
    return f"notes.{node}"


@dataclass(frozen=True, slots=True)
class StreamRule:
    writer: str
    fuse_entries: int  # length at which the oldest entries go, read or not
    droppable: bool  # may be dropped by the sender when the server is away for long


STREAMS: dict[str, StreamRule] = {
    HISTORY: StreamRule(TRAINER, 200_000, droppable=False),
    DECISIONS: StreamRule(PREDICTOR, 20_000, droppable=False),
    ORDERS: StreamRule(MONITOR, 5_000, droppable=False),
    **{notes_of(node): StreamRule(node, 20_000, droppable=True) for node in NODES},
}

_HISTORY_KINDS = (m.RunStarted, m.Observation, m.Outcome, m.CheckpointWritten, m.RunEnded)
_ORDER_KINDS = (m.PhaseVeto, m.MemoryOrder, m.CheckpointRequest, m.StopRequest)


def stream_of(message: m.Message, writer: str) -> str:
    """Stream that `writer` publishes this message on."""
    if isinstance(message, _HISTORY_KINDS):
        return HISTORY
    if isinstance(message, m.PhaseDecision):
        return DECISIONS
    if isinstance(message, _ORDER_KINDS):
        return ORDERS
    return notes_of(writer)


def key_of(run_id: str, stream: str) -> str:
    return f"hpt:{{{run_id}}}:{stream}"


def generation_key(run_id: str, node: str) -> str:
    return f"hpt:{{{run_id}}}:generation.{node}"
