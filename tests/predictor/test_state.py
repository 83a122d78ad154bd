"""Predictor checkpoints: exact, verified, the same from folder and memory, kept as long as the trainer's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from common import sealed_folder
from common.bus import EntryId
from common.config import dump_settings
from common.errors import CheckpointError, EnvironmentFault
from common.messages import DIRECTIONS
from predictor_node.history import History
from predictor_node.policy import PolicyState
from predictor_node.state import FolderStore, Learned, MemoryStore, RunFacts, SavedState, StateStore, files_of
from tests.predictor.scripted import observed, small_settings


def state_at(step: int, *, run_id: str = "r", loss: float = 0.1 + 0.2) -> SavedState:
    history = History()
    for seen in range(1, step + 1):
        history = history.append(observed(seen, loss=loss))
    return SavedState(
        name=f"step-{step:08d}.gen-1",
        applied=EntryId(1, step + 1),
        facts=RunFacts(
            run_id=run_id,
            generation=1,
            feature_version=1,
            directions=DIRECTIONS,
            num_groups=2,
            settings_toml=dump_settings(small_settings()),
        ),
        learned=Learned(
            history=history,
            policy=PolicyState(
                values={"proposals": 3, "nested": [math.nan, 1e-300, 0.1]}, tensors=b"\x00bytes"
            ),
            counters={"proposals": 3, "rests": 1},
            last_outcome_id="8.0",
        ),
    )


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return FolderStore(tmp_path / "predictor") if request.param == "folder" else MemoryStore()


def test_load_gives_back_what_was_saved_nan_included(store: StateStore) -> None:
    state = state_at(5, loss=math.nan)
    store.save(state, keep=3)
    loaded = store.load(state.name)
    assert files_of(loaded) == files_of(state)
    assert (loaded.name, loaded.applied, loaded.facts) == (state.name, state.applied, state.facts)
    assert math.isnan(loaded.learned.history.rows[0].loss)


def test_unknown_name_is_one_clear_line(store: StateStore) -> None:
    with pytest.raises(CheckpointError) as caught:
        store.load("step-00000001.gen-1")
    assert "\n" not in str(caught.value)


def test_newest_is_of_this_run(store: StateStore) -> None:
    assert store.newest("r") is None
    for step in (4, 8):
        store.save(state_at(step), keep=9)
    store.save(state_at(12, run_id="other"), keep=9)
    newest = store.newest("r")
    assert newest is not None
    assert newest.applied == EntryId(1, 9)


def test_saving_again_replaces(store: StateStore) -> None:
    store.save(state_at(5), keep=3)
    store.save(state_at(5, loss=7.0), keep=3)
    assert store.load("step-00000005.gen-1").learned.history.rows[0].loss == 7.0


def test_only_the_newest_are_kept(store: StateStore) -> None:
    for step in (1, 2, 3, 4):
        store.save(state_at(step), keep=2)
    assert store.load("step-00000004.gen-1").applied == EntryId(1, 5)
    assert store.load("step-00000003.gen-1").applied == EntryId(1, 4)
    with pytest.raises(CheckpointError):
        store.load("step-00000002.gen-1")


def test_equal_states_are_equal_folders(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        FolderStore(tmp_path / folder).save(state_at(5), keep=3)
    one, two = (tmp_path / folder / "step-00000005.gen-1" for folder in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert set(names) == {"manifest.json", *files_of(state_at(5))}
    assert [(one / name).read_bytes() for name in names] == [(two / name).read_bytes() for name in names]


def test_state_is_kept_while_its_trainer_checkpoint_exists(tmp_path: Path) -> None:
    (tmp_path / "trainer" / "step-00000001.gen-1").mkdir(parents=True)
    store = FolderStore(tmp_path / "predictor")
    for step in (1, 2, 3):
        store.save(state_at(step), keep=1)
    assert sorted(path.name for path in (tmp_path / "predictor").iterdir()) == [
        "step-00000001.gen-1",
        "step-00000003.gen-1",
    ]


@pytest.mark.parametrize("name", ["learned.json", "history.safetensors", "position.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damaged_file_is_noticed_and_the_older_state_is_newest(
    tmp_path: Path, name: str, damage: str
) -> None:
    store = FolderStore(tmp_path)
    for step in (4, 8):
        store.save(state_at(step), keep=3)
    victim = tmp_path / "step-00000008.gen-1" / name
    content = bytearray(victim.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0x80
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flip" else content[:middle])
    with pytest.raises(CheckpointError) as caught:
        store.load("step-00000008.gen-1")
    assert "\n" not in str(caught.value)
    newest = store.newest("r")
    assert newest is not None
    assert newest.name == "step-00000004.gen-1"


def test_another_schema_is_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(state_at(4), keep=3)
    manifest = tmp_path / "step-00000004.gen-1" / "manifest.json"
    changed = {**json.loads(manifest.read_text()), "predictor_schema": 99}
    manifest.write_text(sealed_folder.manifest_text(changed))
    with pytest.raises(CheckpointError, match="schema 99"):
        store.load("step-00000004.gen-1")


def test_copied_under_another_name_is_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(state_at(4), keep=3)
    (tmp_path / "step-00000004.gen-1").rename(tmp_path / "step-00000009.gen-1")
    with pytest.raises(CheckpointError):
        store.load("step-00000009.gen-1")


@pytest.mark.parametrize("name", ["../escape", "/tmp/x", "", "step-00000001.gen-1/..", "step-1.gen-1"])
def test_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    store = FolderStore(tmp_path / "predictor")
    with pytest.raises(CheckpointError):
        store.save(replace(state_at(1), name=name), keep=3)
    with pytest.raises(CheckpointError):
        store.load(name)
    assert list(tmp_path.rglob("*")) == []


def test_whole_state_outside_the_folder_is_not_loaded(tmp_path: Path) -> None:
    FolderStore(tmp_path / "outside").save(state_at(4), keep=3)
    with pytest.raises(CheckpointError, match="not the name"):
        FolderStore(tmp_path / "predictor").load("../outside/step-00000004.gen-1")


def test_folder_that_cannot_be_written_is_the_environments_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault) as caught:
        FolderStore(tmp_path / "file").save(state_at(1), keep=3)
    assert "\n" not in str(caught.value)


def test_generation_is_remembered_across_stores(tmp_path: Path) -> None:
    assert FolderStore(tmp_path / "new").last_generation() == 0
    FolderStore(tmp_path / "new").remember_generation(7)
    assert FolderStore(tmp_path / "new").last_generation() == 7
    assert FolderStore(tmp_path / "new").newest("r") is None
    (tmp_path / "new" / "generation").write_text("seven")
    with pytest.raises(CheckpointError, match="delete it"):
        FolderStore(tmp_path / "new").last_generation()
