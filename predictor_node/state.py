"""The predictor's own checkpoints: what is in one, the folder that holds them, the twin in memory.

<state_dir>/<name of the trainer's checkpoint>/     a sealed folder (common/sealed_folder.py)
    learned.json, history.safetensors, policy.safetensors
                                        what was learned; byte-identical for equal runs, resumed or not
    position.json                       run, generation, last applied entry, the RunStarted facts
    manifest.json                       sizes and SHA-256 of the others; written last
<state_dir>/generation                  the newest generation of a predictor that wrote here
No time stamps, sorted keys, exact floats. Never unpickles; everything read is verified first.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common import sealed_folder
from common.bus import EntryId
from common.errors import SENSELESS, CheckpointError, EnvironmentFault
from common.messages import RunStarted
from predictor_node.history import History
from predictor_node.history_file import history_from_bytes, history_to_bytes
from predictor_node.policy import PolicyState

SCHEMA = 2
_GENERATION = "generation"
_LEARNED, _HISTORY, _POSITION = "learned.json", "history.safetensors", "position.json"
_POLICY = "policy.safetensors"  # empty for a policy without tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What RunStarted says and decisions depend on."""

    run_id: str
    generation: int  # of the trainer
    feature_version: int
    directions: tuple[str, ...]  # (K)
    num_groups: int
    settings_toml: str
    group_sizes: tuple[int, ...] = ()  # (G) weights per group


def facts_of(message: RunStarted) -> RunFacts:
    sizes = [sum(math.prod(p.shape) for p in group.parameters) for group in message.groups]
    return RunFacts(
        run_id=message.run_id,
        generation=message.generation,
        feature_version=message.feature_version,
        directions=message.directions,
        num_groups=len(message.groups),
        settings_toml=message.settings_toml,
        group_sizes=tuple(sizes),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """All that observations and outcomes have taught; a resumed run has the same as an unbroken one."""

    history: History
    policy: PolicyState | None  # None before a run was seen
    counters: Mapping[str, int]
    last_outcome_id: str  # decision_id of the newest outcome, "" before the first


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedState:
    name: str  # of the trainer's checkpoint
    applied: EntryId  # last entry of `history` that is in here
    facts: RunFacts
    learned: Learned


class StateStore(Protocol):
    def save(self, state: SavedState, *, keep: int) -> None:
        """Keep under `state.name`, with the `keep` newest. Raises EnvironmentFault, CheckpointError."""
        ...

    def load(self, name: str) -> SavedState:
        """Raises CheckpointError when there is none of this name or it does not verify."""
        ...

    def newest(self, run_id: str) -> SavedState | None:
        """The newest valid state of this run; None when there is none."""
        ...

    def last_generation(self) -> int:
        """The highest generation that a predictor with this store was given; 0 before the first."""
        ...

    def remember_generation(self, generation: int) -> None:
        """A new server knows no old generations, but recordings go on: ids must never come again."""
        ...


class MemoryStore:
    """For replay, tests and a predictor without --state-dir. Keeps the `keep` last saved ones."""

    def __init__(self, *, keep_all: bool = False) -> None:
        self._states: dict[str, SavedState] = {}
        self._keep_all = keep_all
        self._generation = 0

    def save(self, state: SavedState, *, keep: int) -> None:
        self._states.pop(state.name, None)
        self._states[state.name] = state
        while len(self._states) > keep and not self._keep_all:
            del self._states[next(iter(self._states))]

    def load(self, name: str) -> SavedState:
        try:
            return self._states[name]
        except KeyError:
            raise CheckpointError(f"no predictor state named {name!r} in memory") from None

    def has(self, name: str) -> bool:
        return name in self._states

    def forget(self, name: str) -> None:
        self._states.pop(name, None)

    def newest(self, run_id: str) -> SavedState | None:
        mine = [state for state in self._states.values() if state.facts.run_id == run_id]
        return max(mine, key=lambda state: state.applied, default=None)

    def last_generation(self) -> int:
        return self._generation

    def remember_generation(self, generation: int) -> None:
        self._generation = generation


class FolderStore:
    """One sealed folder per state; the trainer's checkpoints are in the sibling folder `trainer`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def save(self, state: SavedState, *, keep: int) -> None:
        _check_name(state.name)
        temporary = sealed_folder.begin(self._root, state.name)
        try:
            for name, content in files_of(state).items():
                (temporary / name).write_bytes(content)
        except OSError as error:
            raise EnvironmentFault(f"{temporary}: not written: {error.strerror}; free space") from None
        sealed_folder.seal(temporary, {"predictor_schema": SCHEMA})
        self._prune(keep, saved_name=state.name)

    def load(self, name: str) -> SavedState:
        _check_name(name)
        return read_state(self._root / name)

    def newest(self, run_id: str) -> SavedState | None:
        """Folders that do not verify, or belong to another run, are passed over."""
        for folder in sealed_folder.folders(self._root):
            try:
                state = read_state(folder)
            except CheckpointError:
                continue
            if state.facts.run_id == run_id:
                return state
        return None

    def last_generation(self) -> int:
        path = self._root / _GENERATION
        try:
            return int(path.read_text(encoding="ascii"))
        except (FileNotFoundError, NotADirectoryError):
            return 0
        except OSError as error:
            raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError:
            raise CheckpointError(f"{path}: not a number; delete it") from None

    def remember_generation(self, generation: int) -> None:
        """Raises EnvironmentFault."""
        path = self._root / _GENERATION
        temporary = path.with_suffix(".tmp")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            temporary.write_text(f"{generation}\n", encoding="ascii")
            temporary.replace(path)
        except OSError as error:
            raise EnvironmentFault(f"{path}: cannot be written: {error.strerror}") from None

    def _prune(self, keep: int, *, saved_name: str) -> None:
        """As the trainer: the newest stay, and all whose trainer checkpoint still exists."""
        for folder in sealed_folder.folders(self._root)[keep:]:
            if folder.name != saved_name and not (self._root.parent / "trainer" / folder.name).exists():
                sealed_folder.remove(folder)


def files_of(state: SavedState) -> dict[str, bytes]:
    """File name -> content, without the manifest. Equal states give equal bytes."""
    learned = state.learned
    return {
        _LEARNED: _json_bytes(
            {
                "policy": dict(learned.policy.values) if learned.policy else None,
                "counters": dict(learned.counters),
                "last_outcome_id": learned.last_outcome_id,
            }
        ),
        _HISTORY: history_to_bytes(learned.history),
        _POLICY: learned.policy.tensors if learned.policy else b"",
        _POSITION: _json_bytes(
            {
                "name": state.name,
                "applied": list(state.applied),
                "facts": dataclasses.asdict(state.facts),
            }
        ),
    }


def read_state(folder: Path) -> SavedState:
    """A verified state. Raises CheckpointError in one line."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such predictor state")
    schema = sealed_folder.verify(folder).get("predictor_schema")
    if schema != SCHEMA:
        raise CheckpointError(f"{folder}: predictor schema {schema!r}, this version reads {SCHEMA}")
    try:
        state = _state_from(
            {name: (folder / name).read_bytes() for name in (_LEARNED, _HISTORY, _POLICY, _POSITION)}
        )
    except (OSError, *SENSELESS) as error:
        raise CheckpointError(f"{folder}: damaged predictor state: {error}") from None
    if state.name != folder.name:
        raise CheckpointError(f"{folder}: holds the state of {state.name}")
    return state


def _state_from(files: Mapping[str, bytes]) -> SavedState:
    learned, position = json.loads(files[_LEARNED]), json.loads(files[_POSITION])
    facts = dict(position["facts"])
    facts["directions"], facts["group_sizes"] = tuple(facts["directions"]), tuple(facts["group_sizes"])
    return SavedState(
        name=position["name"],
        applied=EntryId(*position["applied"]),
        facts=RunFacts(**facts),
        learned=Learned(
            history=history_from_bytes(files[_HISTORY]),
            policy=_policy_state(learned["policy"], files[_POLICY]),
            counters=dict(learned["counters"]),
            last_outcome_id=learned["last_outcome_id"],
        ),
    )


def _policy_state(values: Mapping[str, object] | None, tensors: bytes) -> PolicyState | None:
    return None if values is None else PolicyState(values=dict(values), tensors=tensors)


def _check_name(name: str) -> None:
    """Names come from messages; none may lead out of the folder."""
    try:
        sealed_folder.age_key(name)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _json_bytes(value: Mapping[str, object]) -> bytes:
    """Sorted, exact floats, NaN as NaN."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
