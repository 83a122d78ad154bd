"""A checkpoint of a stranger: whole by its digests, senseless in its content. It is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import sealed_folder
from common.errors import CheckpointError
from tests.trainer.test_checkpoint import newest, run_with_checkpoints
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node import checkpoint

KEYS = ("version", "parameters", "optimizer_values", "progress", "ledger", "housekeeping", "memory")
JUNK: tuple[Any, ...] = (None, [], {}, "x", -1, 1e308, [[1], {"a": None}], {"step": [], "phase": {"x": 1}})
# An optimizer without any state is left out: SGD has none, so it begins anew.
WRONG_TENSORS = [
    (name, how)
    for name in ("model", "optimizer", "basis", "random")
    for how in ("missing", "not tensors", "no tensors", "other shapes", "other names")
    if (name, how) != ("optimizer", "no tensors")
]
DEEP = '{"version": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_with_checkpoints(root, stop_at=12)
    return newest(root)


def sealed_anew(saved: Path, root: Path, change: Callable[[Path], None]) -> Path:
    """A copy with a manifest that fits, whatever `change` made of its files."""
    temporary = sealed_folder.begin(root, saved.name)
    for path in saved.iterdir():
        if path.name != sealed_folder.MANIFEST:
            shutil.copyfile(path, temporary / path.name)
    change(temporary)
    return sealed_folder.seal(temporary, {"step": 12, "generation": 1, "fingerprint": ""})


def change_state(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        change(state)
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    return write


def refusal(folder: Path) -> str:
    """Why it is refused; nothing has changed then."""
    loop = tiny_loop(ScriptedLinks(), tiny_settings())
    before = weights_of(loop)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder, loop)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert loop.progress.step == 0
    assert same_bits(before, weights_of(loop))
    return str(error.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_state_of_any_other_shape_is_refused_in_one_line_or_harmless(
    saved: Path, tmp_path: Path, key: str
) -> None:
    for number, junk in enumerate(JUNK):
        folder = sealed_anew(
            saved, tmp_path / str(number), change_state(lambda state, junk=junk: state.update({key: junk}))
        )
        loop = tiny_loop(ScriptedLinks(), tiny_settings())
        try:
            checkpoint.load(folder, loop)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert key in ("ledger", "housekeeping", "memory", "optimizer_values"), junk


@pytest.mark.parametrize("text", ["", "[]", "null", "\x00", '"x"', DEEP])
def test_a_state_that_is_no_state_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    refusal(sealed_anew(saved, tmp_path, lambda folder: (folder / "state.json").write_text(text)))


@pytest.mark.parametrize(("name", "how"), WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused_before_a_weight_changes(
    saved: Path, tmp_path: Path, name: str, how: str
) -> None:
    def change(folder: Path) -> None:
        file = folder / f"{name}.safetensors"
        tensors = load_file(file)
        match how:
            case "missing":
                file.unlink()
            case "not tensors":
                file.write_bytes(b"\x80\x04K\x01.")  # a pickle
            case "no tensors":
                save_file({}, file)
            case "other shapes":
                save_file({key: torch.zeros(3, 1, 2) for key in tensors}, file)
            case "other names":
                save_file({f"0.{i}.x": t.clone() for i, t in enumerate(tensors.values())}, file)

    assert saved.name in refusal(sealed_anew(saved, tmp_path, change))
