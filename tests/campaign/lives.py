"""What the predictor should have answered and learned, life by life, from what it says of its lives. Pure.

A life is one process: it starts behind an entry that a saved state has applied, and says which entries it
never got (gaps) and which it gave up (dead letters). All others, in the order of their ids, it must have
applied once: so a slow twin that is given exactly those must make the same decisions and save the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import codec
from common.bus import STREAM_START, Entry, EntryId
from common.errors import CheckpointError, CodecError, HybridError
from common.messages import Alert, DeadLetter, PhaseDecision, RunStarted
from common.streams import DECISIONS, HISTORY, PREDICTOR, notes_of
from predictor_node.node import STATE_LOST, Predictor
from predictor_node.state import SavedState, files_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    generation: int  # of the predictor
    behind: EntryId  # last entry that was in the state it started from
    missing: tuple[tuple[EntryId, EntryId], ...]  # (first missing, read instead): reported, not applied

    def has_missed(self, entry_id: EntryId) -> bool:
        return any(first <= entry_id < instead for first, instead in self.missing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    decisions: Mapping[tuple[int, int, str], bytes]  # (predictor, trainer generation, decision id) -> body
    states: Mapping[str, Mapping[str, bytes]]  # name of a state -> file name -> content
    unknown: tuple[str, ...] = ()  # lives that cannot be followed, and why


@dataclass(slots=True)
class _Making:
    decisions: dict[tuple[int, int, str], bytes] = field(default_factory=dict)
    states: dict[str, SavedState] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Store:
    """See predictor_node.state.StateStore; keeps everything."""

    states: dict[str, SavedState]

    def save(self, state: SavedState, *, keep: int) -> None:
        self.states[state.name] = state

    def load(self, name: str) -> SavedState:
        if name not in self.states:
            raise CheckpointError(f"no state named {name}")
        return self.states[name]

    def newest(self, run_id: str) -> SavedState | None:
        return None

    def last_generation(self) -> int:
        return 0

    def remember_generation(self, generation: int) -> None:
        pass


def lives_of(log: Iterable[Mapping[str, Any]]) -> list[Life]:
    """From the events of the predictor's log, in their order."""
    lives: list[Life] = []
    for record in log:
        if record["event"] == "serving":
            behind = EntryId.parse(record["behind"])
            lives.append(Life(generation=record["generation"], behind=behind, missing=()))
        elif record["event"] == "entries_missing" and lives:
            hole = EntryId.parse(record["first"]), EntryId.parse(record["read_instead"])
            last = lives[-1]
            lives[-1] = Life(generation=last.generation, behind=last.behind, missing=(*last.missing, hole))
    return lives


def expected(entries: Sequence[Entry], lives: Sequence[Life]) -> Expected:
    """What the twin says and saves in each life."""
    history = sorted((e for e in entries if e.stream == HISTORY), key=lambda e: e.id)
    notes = [e for e in entries if e.stream == notes_of(PREDICTOR)]
    making = _Making()
    for life in lives:
        _live(life, history, [e for e in notes if e.id.generation == life.generation], making)
    return Expected(
        decisions=making.decisions,
        states={name: files_of(state) for name, state in making.states.items()},
        unknown=tuple(making.unknown),
    )


def recorded_decisions(entries: Iterable[Entry]) -> dict[tuple[int, int, str], bytes]:
    """What the predictor's lives really said; see Expected.decisions."""
    found = {}
    for entry in entries:
        if entry.stream == DECISIONS:
            message = _decoded(entry)
            if isinstance(message, PhaseDecision):
                key = entry.id.generation, message.base_generation, message.decision_id
                found[key] = entry.body
    return found


def _live(life: Life, history: Sequence[Entry], notes: Sequence[Entry], making: _Making) -> None:
    said = [message for message in map(_decoded, notes) if message is not None]
    given_up = {m.entry_id for m in said if isinstance(m, DeadLetter) and m.stream == HISTORY}
    lost = [m for m in said if isinstance(m, Alert) and m.kind == STATE_LOST]
    store = _Store(dict(making.states))
    predictor = Predictor(store)
    start = [state for state in making.states.values() if state.applied == life.behind]
    if life.behind != STREAM_START:
        if not start:
            making.unknown.append(
                f"life {life.generation} started from an unknown state behind {life.behind}"
            )
            return
        predictor.restore(start[-1])
    for entry in history:
        if entry.id <= life.behind or life.has_missed(entry.id) or str(entry.id) in given_up:
            continue
        _apply(entry, predictor, store, lost, life.generation, making)
    making.states.update(store.states)


def _apply(
    entry: Entry, predictor: Predictor, store: _Store, lost: Sequence[Alert], generation: int, making: _Making
) -> None:
    message = _decoded(entry)
    if message is None:
        return
    if isinstance(message, RunStarted) and message.resumed_from:
        name = message.resumed_from
        if any(alert.step == message.first_step and name in alert.text for alert in lost):
            store.states.pop(name, None)
    try:
        answers = predictor.handle(message, entry.id)
    except (HybridError, ValueError):
        return  # the live one made a dead letter of it
    for answer in answers:
        if isinstance(answer, PhaseDecision):
            key = generation, answer.base_generation, answer.decision_id
            making.decisions[key] = codec.encode(answer)


def _decoded(entry: Entry) -> Any:
    try:
        return codec.decode_entry(entry)
    except CodecError:
        return None
