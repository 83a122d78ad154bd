"""Which of all that was said led to the weights of the end: the lineage of a run over its starts. Pure.

A start (generation) goes on from a checkpoint of an earlier one; what that one did after the checkpoint is
void. Outcomes on the lineage say which decisions were taken; a run that takes the same must end in the same
bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common import codec, sealed_folder
from common.bus import Entry, EntryId
from common.errors import CodecError
from common.messages import (
    APPLIED_VERDICTS,
    CheckpointWritten,
    Message,
    Observation,
    Outcome,
    PhaseDecision,
    RunStarted,
    Verdict,
)
from common.streams import DECISIONS, HISTORY

TAKEN = APPLIED_VERDICTS | {Verdict.REST}  # a rest may set the length of the next window


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    generations: tuple[int, ...]  # of the trainer, oldest first
    outcomes: tuple[tuple[int, Outcome], ...]  # (generation, outcome), in order
    observations: tuple[tuple[int, Observation], ...]
    ends: Mapping[int, tuple[float, float]]  # generation -> (attempt, step) after which what it did is void
    unknown: str  # why it could not be followed to the beginning; "" = it was


def decoded(entries: Sequence[Entry], stream: str) -> list[tuple[EntryId, Message]]:
    """In the order of their ids; what does not decode is left out."""
    found = []
    for entry in sorted((e for e in entries if e.stream == stream), key=lambda e: e.id):
        try:
            found.append((entry.id, codec.decode_entry(entry)))
        except CodecError:
            continue
    return found


def lineage(entries: Sequence[Entry]) -> Lineage:
    """Back from the newest start to the fresh one."""
    history = decoded(entries, HISTORY)
    starts = {m.generation: m for _, m in reversed(history) if isinstance(m, RunStarted)}
    generation = max((entry_id.generation for entry_id, _ in history), default=0)
    kept: list[tuple[int, list[Message]]] = []
    ends: dict[int, tuple[float, float]] = {}
    until = ""  # name of the checkpoint that the next start went on from
    unknown = ""
    while generation:
        said = [m for entry_id, m in history if entry_id.generation == generation]
        kept.append((generation, _up_to(said, until)))
        ends[generation] = _end(said, until)
        start = starts.get(generation)
        if start is None:
            unknown = f"nobody saw the start of generation {generation}"
            break
        until = start.resumed_from
        generation = sealed_folder.age_key(until)[0] if until else 0
    kept.reverse()
    return Lineage(
        generations=tuple(generation for generation, _ in kept),
        outcomes=tuple((g, m) for g, said in kept for m in said if isinstance(m, Outcome)),
        observations=tuple((g, m) for g, said in kept for m in said if isinstance(m, Observation)),
        ends=ends,
        unknown=unknown,
    )


def _up_to(said: list[Message], checkpoint: str) -> list[Message]:
    """All before this checkpoint was written; all there is if that was never said (killed while saving)."""
    for position, message in enumerate(said):
        if checkpoint and isinstance(message, CheckpointWritten) and message.name == checkpoint:
            return said[:position]
    return said


def _end(said: list[Message], checkpoint: str) -> tuple[float, float]:
    """Attempts rise while steps may fall: their pairs are in the order of time."""
    for message in said:
        if checkpoint and isinstance(message, CheckpointWritten) and message.name == checkpoint:
            return message.attempt, message.step
    return math.inf, math.inf


def taken_decisions(
    entries: Sequence[Entry], line: Lineage, verdicts_on_disk: Mapping[str, set[str]]
) -> tuple[list[PhaseDecision], list[str]]:
    """The decisions that the lineage took, in order, and the ids of those that nobody recorded.

    `verdicts_on_disk` (decision id -> verdicts in metrics.jsonl) tell of outcomes that the server lost.
    """
    recorded = {
        (m.base_generation, m.decision_id): m
        for _, m in decoded(entries, DECISIONS)
        if isinstance(m, PhaseDecision)
    }
    verdicts = {(generation, outcome.decision_id): outcome.verdict for generation, outcome in line.outcomes}
    missing = [
        f"{name} of generation {generation}"
        for (generation, name), verdict in verdicts.items()
        if verdict in TAKEN and (generation, name) not in recorded
    ]
    taken = []
    for key, decision in recorded.items():
        is_void = (decision.base_attempt, decision.base_step) > line.ends.get(key[0], (-1, -1))
        if key in verdicts:
            is_taken = verdicts[key] in TAKEN
        else:
            told = verdicts_on_disk.get(decision.decision_id, set())
            is_taken = not is_void and bool(told & {verdict.value for verdict in TAKEN})
        if is_taken:
            taken.append(decision)
    return taken, missing
