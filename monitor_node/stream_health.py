"""How well the streams of a run are kept, from the ids read and from what the nodes say. Pure; sends nothing.

    duplicates   entries read at or below an id that was read before; the server should refuse them
    damaged      entries whose checksum says that they are not what their writer sent; left out
    gaps         holes in the numbering of one generation: entries dropped by their writer or trimmed unread
    fenced       former starts of the writer, whose writes the server refuses since a newer one began
    lag_steps    how far behind the trainer its reader is (history) or its writer is (notes)
    pending      entries that wait for their reader; known of orders only

Unknown is None. What was trimmed before the first read is no gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.streams import HISTORY, NODES, ORDERS, PREDICTOR, STREAMS, notes_of


@dataclass(slots=True)
class StreamCount:
    generation: int  # of the newest entry read
    sequence: int
    fenced: int = 0
    duplicates: int = 0
    gaps: int = 0
    damaged: int = 0


@dataclass(kw_only=True)
class StreamBook:
    """Counts of the entries that were read, by stream."""

    counts: dict[str, StreamCount] = field(default_factory=dict)

    def read(self, stream: str, generation: int, sequence: int, *, is_damaged: bool = False) -> None:
        """An entry with this id was read, after all that were read before."""
        if stream not in STREAMS:
            return
        count = self.counts.get(stream)
        if count is None:
            self.counts[stream] = StreamCount(generation, sequence, damaged=int(is_damaged))
            return
        count.damaged += is_damaged
        if (generation, sequence) <= (count.generation, count.sequence):
            count.duplicates += 1
            return
        is_new = generation > count.generation
        count.fenced += is_new
        count.gaps += sequence != (1 if is_new else count.sequence + 1)
        count.generation, count.sequence = generation, sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamFacts:
    """What else is known."""

    entries: Mapping[str, int]  # by stream
    trainer_step: int
    node_steps: Mapping[str, int]  # of the nodes that live
    dead_letters: Mapping[str, int]  # by stream
    unanswered_orders: int


def stream_rows(book: StreamBook, facts: StreamFacts) -> list[dict[str, Any]]:
    lags = {node: max(0, facts.trainer_step - step) for node, step in facts.node_steps.items()}
    lag_of = {HISTORY: lags.get(PREDICTOR), **{notes_of(node): lags.get(node) for node in NODES}}
    pending_of = {ORDERS: facts.unanswered_orders}
    rows = []
    for stream in STREAMS:
        count = book.counts.get(stream)
        rows.append({
            "stream": stream,
            "entries": facts.entries.get(stream),
            "lag_steps": lag_of.get(stream),
            "pending": pending_of.get(stream),
            "dead_letters": facts.dead_letters.get(stream, 0),
            "fenced": count.fenced if count else None,
            "duplicates": count.duplicates if count else None,
            "gaps": count.gaps if count else None,
            "damaged": count.damaged if count else None,
        })  # fmt: skip
    return rows
