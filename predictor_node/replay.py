"""Replay: the recorded history through a fresh predictor, its decisions against the recorded ones.

A decision is the same when its bytes are. Twins are found by (trainer generation, decision id); a
restarted predictor may have said one twice, then both must be equal. States of checkpoints are
kept in memory, so that a run that was resumed goes on from what was learned then. Reads no clock
and writes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import codec
from common.bus import STREAM_START, Entry, EntryId
from common.errors import CheckpointError, CodecError, HybridError, RecordingError
from common.messages import Alert, Message, PhaseDecision, RunEnded, RunStarted
from common.streams import DECISIONS, HISTORY, PREDICTOR, notes_of
from predictor_node.holes import PASSED_OVER
from predictor_node.node import STATE_LOST, Predictor
from predictor_node.state import FolderStore, MemoryStore

DecisionKey = tuple[int, str]  # (trainer generation, decision id): a resumed run reuses ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    decisions: tuple[PhaseDecision, ...]  # in the order of the history
    duplicates: int  # recorded more than once, equally
    unrecorded: int  # made again, but a crash came before they were recorded
    difference: str  # the first one, field by field; "" when there is none
    gap: str  # what is missing, or was to the live predictor; "" = nothing is, else nothing was compared
    notes: tuple[str, ...]  # what a reader must know, one line each


def replay(entries: Iterable[Entry], *, is_sealed: bool, state_dir: Path | None = None) -> Replayed:
    """Replay the entries of one recording.

    `is_sealed` says that the recording ended properly: then its last decisions may not be missing.
    `state_dir` holds predictor states, for a resume from a checkpoint that the recording lacks.
    Stops at a hole in the history and says so in `gap`. Raises RecordingError for an entry that
    cannot be read and for an empty history.
    """
    by_stream: dict[str, list[tuple[Entry, Message]]] = {HISTORY: [], DECISIONS: [], notes_of(PREDICTOR): []}
    for entry in entries:
        if entry.stream in by_stream:
            by_stream[entry.stream].append((entry, _decoded(entry)))
    history = by_stream[HISTORY]
    if not history:
        raise RecordingError("holds no history: nothing to replay")
    num_whole, gap = _whole_part([entry.id for entry, _ in history])
    alerts = [m for _, m in by_stream[notes_of(PREDICTOR)] if isinstance(m, Alert)]
    lost = [alert for alert in alerts if alert.kind == STATE_LOST]
    if not gap:
        gap = next((_passed_over(alert) for alert in alerts if alert.kind == PASSED_OVER), "")
    decisions, notes = _decide_again(history[:num_whole], lost, state_dir)
    recorded = _recorded_bodies(by_stream[DECISIONS])
    torn = _torn_generations(history, is_sealed=is_sealed)
    difference = "" if gap else _first_difference(decisions, recorded, torn)
    return Replayed(
        decisions=tuple(decisions),
        duplicates=sum(len(bodies) - 1 for bodies in recorded.values()),
        unrecorded=sum(_key(decision) not in recorded for decision in decisions),
        difference=difference,
        gap=gap,
        notes=tuple(notes),
    )


def line_of(decision: PhaseDecision) -> str:
    """One decision for people."""
    forecast = decision.forecast
    expected = (
        f"{forecast.loss:.4f} (without {forecast.loss_without:.4f} +/- {forecast.spread:.4f})"
        if forecast
        else "none"
    )
    return (
        f"step {decision.base_step:>7}.{decision.base_attempt:<3} {decision.phase.value:<7}"
        f" horizon {decision.horizon_steps:>4}  |c| {math.hypot(*decision.coefficients):8.4f}"
        f"  forecast {expected}  {decision.reason}"
    )


def _decoded(entry: Entry) -> Message:
    try:
        return codec.decode_entry(entry)
    except CodecError as error:
        raise RecordingError(f"{entry.stream} {entry.id} cannot be read: {error}") from None


def _whole_part(ids: Sequence[EntryId]) -> tuple[int, str]:
    """How many entries there are before the first hole, and what is missing there.

    Every generation starts at sequence 1.
    """
    previous = STREAM_START
    for position, entry_id in enumerate(ids):
        is_new = entry_id.generation != previous.generation
        expected = EntryId(entry_id.generation, 1 if is_new else previous.sequence + 1)
        if entry_id != expected:
            return position, (
                f"the history has a gap: {expected} is missing before {entry_id}"
                " (lost by the server or the recorder); decisions after it cannot be reproduced"
            )
        previous = entry_id
    return len(ids), ""


def _passed_over(alert: Alert) -> str:
    return f"the live predictor did not look at all of the history: {alert.text}; nothing was compared"


def _decide_again(
    history: Sequence[tuple[Entry, Message]], lost: Sequence[Alert], state_dir: Path | None
) -> tuple[list[PhaseDecision], list[str]]:
    store = MemoryStore(keep_all=True)
    predictor = Predictor(store)
    decisions: list[PhaseDecision] = []
    notes: list[str] = []
    for entry, message in history:
        if isinstance(message, RunStarted) and message.resumed_from:
            notes += _prepare_resume(store, message, lost, state_dir)
        try:
            answers = predictor.handle(message, entry.id)
        except (HybridError, ValueError) as error:  # the live node made a dead letter of it
            notes.append(f"{entry.kind} {entry.id} was not understood: {error}")
            continue
        decisions += [answer for answer in answers if isinstance(answer, PhaseDecision)]
        notes += [answer.text for answer in answers if isinstance(answer, Alert)]
    return decisions, notes


def _prepare_resume(
    store: MemoryStore, message: RunStarted, lost: Sequence[Alert], state_dir: Path | None
) -> list[str]:
    """Make the store hold what the live predictor had: lost there is lost here, unseen is from disk."""
    name = message.resumed_from
    if any(alert.step == message.first_step and name in alert.text for alert in lost):
        store.forget(name)
    elif state_dir is not None and not store.has(name):
        try:
            store.save(FolderStore(state_dir).load(name), keep=1)
        except CheckpointError as error:
            return [f"the recording lacks what led to {name}, and its state is not there: {error}"]
    return []


def _recorded_bodies(recorded: Iterable[tuple[Entry, Message]]) -> dict[DecisionKey, list[bytes]]:
    bodies: dict[DecisionKey, list[bytes]] = {}
    for entry, message in recorded:
        if isinstance(message, PhaseDecision):
            bodies.setdefault(_key(message), []).append(entry.body)
    return bodies


def _key(decision: PhaseDecision) -> DecisionKey:
    return decision.base_generation, decision.decision_id


def _torn_generations(history: Sequence[tuple[Entry, Message]], *, is_sealed: bool) -> set[int]:
    """Trainer generations whose last decisions may be missing: killed, or cut off by the recorder."""
    ended = {entry.id.generation for entry, message in history if isinstance(message, RunEnded)}
    last = history[-1][0].id.generation
    torn = {entry.id.generation for entry, _ in history} - ended - {last}
    return torn if is_sealed else torn | {last}


def _first_difference(
    decisions: Sequence[PhaseDecision], recorded: dict[DecisionKey, list[bytes]], torn: set[int]
) -> str:
    last_recorded = {
        decision.base_generation: position
        for position, decision in enumerate(decisions)
        if _key(decision) in recorded
    }
    for position, decision in enumerate(decisions):
        generation = decision.base_generation
        name = f"decision {decision.decision_id} of trainer generation {generation}"
        bodies = recorded.get(_key(decision))
        if bodies is None:
            if generation not in torn or position < last_recorded.get(generation, -1):
                return f"{name}: not recorded; replayed: {line_of(decision)}"
            continue
        replayed_body = codec.encode(decision)
        for body in bodies:
            if body != replayed_body:
                return "\n  ".join([f"{name} differs:", *_differing_fields(body, decision)])
    made = {_key(decision) for decision in decisions}
    for generation, decision_id in recorded:
        if (generation, decision_id) not in made:
            return f"decision {decision_id} of trainer generation {generation}: recorded, but not made again"
    return ""


def _differing_fields(body: bytes, replayed: PhaseDecision) -> list[str]:
    """`field: recorded X, replayed Y`. `repr` tells any two floats apart."""
    recorded = codec.decode(PhaseDecision.__name__, body)
    lines: list[str] = []
    for field in dataclasses.fields(PhaseDecision):
        theirs, mine = getattr(recorded, field.name), getattr(replayed, field.name)
        if field.name == "coefficients" and len(theirs) == len(mine):
            lines += [
                f"coefficients[{index}]: recorded {left!r}, replayed {right!r}"
                for index, (left, right) in enumerate(zip(theirs, mine, strict=True))
                if repr(left) != repr(right)
            ]
        elif repr(theirs) != repr(mine):
            lines.append(f"{field.name}: recorded {theirs!r}, replayed {mine!r}")
    return lines or ["equal in every field, but encoded differently"]
