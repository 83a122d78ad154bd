"""Laws of a run's folder: whose it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.config import load_settings
from common.errors import EnvironmentFault
from trainer_node import run_folder, up


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    settings = [load_settings(preset="digits", overrides=[f"trainer.seed={seed}"]) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda each: run_folder.create_next(tmp_path, "digits-1", each), settings))
    assert {run.run_id for run in runs} == {"digits-1", *(f"digits-1-{number}" for number in range(2, 9))}
    for run, each in zip(runs, settings, strict=True):
        assert load_settings(file=run.config) == each


def test_a_run_that_nobody_named_takes_the_next_id_and_a_named_one_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []
    monkeypatch.setattr(up, "_run_nodes", lambda run, _: ids.append(run.run_id) or 0)
    settings = load_settings(preset="digits")
    for is_named in (False, False, True):
        assert up.start_run(settings, run_id="first", runs_dir=tmp_path, is_named=is_named) == 0
    assert ids == ["first", "first-2", "first"]  # nothing has run in it yet


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="choose another --runs-dir"):
        run_folder.create_next(tmp_path / "file", "first", load_settings(preset="digits"))
