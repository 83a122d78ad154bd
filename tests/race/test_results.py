"""results.jsonl: what was appended is there again; a kill in the middle of a line loses that line only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import SettingsError
from tests.race.fake_race import fake_result
from trainer_node.race.results import FILE_NAME, open_results, read_results
from trainer_node.race.run_result import RunKey, RunResult


def result_of(seed: int, purpose: str = "race") -> RunResult:
    config = (("predictor.temper", "balanced"), ("trainer.optimizer.rate", 0.02))
    return fake_result(
        RunKey(task="digits", arm="ours", config=config, planned_steps=50, seed=seed, purpose=purpose)
    )


def test_appended_results_are_read_again_in_their_order(tmp_path: Path) -> None:
    wanted = [result_of(seed) for seed in (3, 1, 2)]
    with open_results(tmp_path) as results:
        for result in wanted:
            results.append(result)
    with open_results(tmp_path) as results:
        assert list(results.by_identity.values()) == wanted
        assert results.note == ""


def test_a_run_that_is_there_is_not_written_twice(tmp_path: Path) -> None:
    with open_results(tmp_path) as results:
        results.append(result_of(1))
        results.append(result_of(1, purpose="target"))
    assert len((tmp_path / FILE_NAME).read_bytes().splitlines()) == 1


def test_a_run_that_is_timed_again_takes_the_place_of_the_former(tmp_path: Path) -> None:
    first, again = (replace(result_of(1, purpose="time"), machine=name) for name in ("before", "after"))
    with open_results(tmp_path) as results:
        results.append(first)
        results.append(again)
        assert list(results.by_identity.values()) == [again]
    assert list(read_results(tmp_path / FILE_NAME)[0].values()) == [again]


def test_a_torn_last_line_is_dropped_with_a_note_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with open_results(tmp_path) as results:
        results.append(result_of(1))
        whole = path.stat().st_size
        results.append(result_of(2))
    content = path.read_bytes()
    for length in range(whole + 1, len(content), 97):
        path.write_bytes(content[:length])
        with open_results(tmp_path) as results:
            assert [result.key.seed for result in results.by_identity.values()] == [1]
            assert "torn" in results.note
            results.append(result_of(2))
        assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    with open_results(tmp_path) as results:
        for seed in (1, 2):
            results.append(result_of(seed))
    path = tmp_path / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0][:40] + b"\n" + lines[1])
    with pytest.raises(SettingsError, match="line 1"):
        read_results(path)


def test_two_races_cannot_write_in_one_folder(tmp_path: Path) -> None:
    with open_results(tmp_path), pytest.raises(SettingsError, match="another race"), open_results(tmp_path):
        pass
