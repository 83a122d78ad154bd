"""Reading the runs of a folder: what is told of each, and what is never followed or believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from monitor_node import run_metrics
from monitor_node import runs as runs_module
from monitor_node.runs import MAX_RUNS, Run, RunsFolder, settings_that_differ
from monitor_node.runs_server import as_csv, as_dict
from tests.monitor.run_folders import LINES, SUMMARY, add_lines, evaluation, make_run, observation, read


def test_a_run_that_ended_is_told_by_its_summary_and_its_curve_by_its_metrics(tmp_path: Path) -> None:
    make_run(tmp_path, "one", summary=SUMMARY)
    run = read(tmp_path)["one"]
    assert run.problems == []
    assert (run.status, run.task, run.steps, run.seconds) == ("finished", "digits", 100, 12.5)
    assert (run.kept, run.refused, run.virtual_share, run.loss_last) == (5, 2, 0.25, 2.9)
    assert run.curve == [(0, 7.0, 0.0), (50, 4.0, 5.0), (100, 3.0, 10.0)]


def test_a_run_that_goes_on_is_told_by_its_metrics(tmp_path: Path) -> None:
    make_run(tmp_path, "one", *LINES[:-1])
    run = read(tmp_path)["one"]
    assert run.problems == []
    assert (run.status, run.task, run.steps, run.seconds) == ("not ended", "language", 100, 10.0)
    assert (run.kept, run.refused, run.virtual_share) == (1, 1, 0.2)
    assert (run.loss_first, run.loss_last) == (7.0, 3.0)


def test_the_summary_of_a_run_that_went_on_afterwards_is_not_believed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", summary=SUMMARY | {"status": "stopped"})
    add_lines(folder, observation(140), evaluation(150, 2.0))
    run = read(tmp_path)["one"]
    assert (run.status, run.steps, run.loss_last) == ("not ended", 140, 2.0)


def test_an_evaluation_that_was_undone_gives_way_to_the_later_one(tmp_path: Path) -> None:
    make_run(
        tmp_path, "one", evaluation(0, 7.0), evaluation(50, 9.0), evaluation(100, 8.0), evaluation(50, 4.0)
    )
    assert [row[:2] for row in read(tmp_path)["one"].curve] == [(0, 7.0), (50, 4.0)]


def test_only_what_was_appended_is_read_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", *LINES[:-1])
    runs = RunsFolder(tmp_path)
    runs.read()
    metrics = folder / "metrics.jsonl"
    known = metrics.stat().st_size
    with metrics.open("r+b") as file:  # what was read once is not read again, so this is not noticed
        file.write(b"x" * (known - 1))
    with metrics.open("a") as file:
        file.write('{"kind": "Evaluation", "st')
    assert [row[0] for row in runs.read()[0][0].curve] == [0, 50, 100]
    with metrics.open("a") as file:
        file.write('ep": 150, "loss": 2.5, "train_seconds": 15.0}\n')
    [run] = runs.read()[0]
    assert [row[0] for row in run.curve] == [0, 50, 100, 150]
    assert run.problems == []


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one")
    runs = RunsFolder(tmp_path)
    runs.read()
    (folder / "metrics.jsonl").write_text("")
    add_lines(folder, evaluation(0, 6.0))
    assert [row[:2] for row in runs.read()[0][0].curve] == [(0, 6.0)]


def test_a_loss_that_is_no_number_is_a_mark(tmp_path: Path) -> None:
    make_run(tmp_path, "one", evaluation(0, 7.0), evaluation(50, "nan"), evaluation(100, "inf"))
    run = read(tmp_path)["one"]
    assert run.marks == [(50, "NaN"), (100, "inf")]
    assert (run.loss_last, run.loss_last_marker) == (None, "inf")
    json.dumps(as_dict([run], "runs", ""), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("summary.json", b"{", "summary.json is not valid JSON"),
        ("summary.json", b"[]", "summary.json is not a JSON object"),
        ("summary.json", b"\xff", "summary.json is not text"),
        ("summary.json", b"[" * 100_000, "summary.json is not valid JSON"),
        ("summary.json", b" " * (runs_module.MAX_SUMMARY_BYTES + 1), "summary.json has 1,048,577 bytes"),
        ("config.toml", b"= 1", "config.toml is not valid TOML"),
        ("config.toml", None, "config.toml is missing"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("metrics.jsonl", b'{"kind": "Eval\n[]\n{"kind": 3}\n', "3 unreadable lines"),
        ("metrics.jsonl", b'{"kind": "Evaluation", "step": 1e9, "loss": 1}\n', "1 unreadable lines"),
        ("metrics.jsonl", b"x" * (3 << 20) + b"\n", "1 unreadable lines"),
    ],
)
def test_a_damaged_run_is_listed_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    folder = make_run(tmp_path, "bad", summary=SUMMARY)
    make_run(tmp_path, "good", summary=SUMMARY)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    found = read(tmp_path)
    assert [problem for problem in found["bad"].problems if reason in problem]
    assert len(found["bad"].problems) == 1
    assert found["good"].problems == []


@pytest.mark.parametrize("number", ["1" * 400, "1e999", "-1e999", "NaN", '"x"', "true", "null", "{}"])
def test_no_number_of_a_file_breaks_the_table(tmp_path: Path, number: str) -> None:
    folder = make_run(tmp_path, "one", evaluation(0, 7.0))
    keys = ("real_steps", "seconds_total", "accepted", "virtual_share", "val_loss_last")
    (folder / "summary.json").write_text("{" + ",".join(f'"{key}": {number}' for key in keys) + "}")
    with (folder / "metrics.jsonl").open("a") as file:
        for kind, name in (("Observation", "step"), ("Evaluation", "step"), ("Evaluation", "loss")):
            file.write(f'{{"kind": "{kind}", "step": 5, "loss": 1.0, "{name}": {number}}}\n')
    found, _ = RunsFolder(tmp_path).read()
    json.dumps(as_dict(found, "runs", ""), allow_nan=False)
    assert as_csv(found)


@pytest.mark.parametrize("kind", ["run", "file", "dangling"])
def test_no_link_is_followed(tmp_path: Path, kind: str) -> None:
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    runs.mkdir()
    elsewhere.mkdir()
    secret = make_run(elsewhere, "secret", summary=SUMMARY | {"task": "secret"})
    if kind == "file":
        folder = make_run(runs, "one")
        (folder / "summary.json").symlink_to(secret / "summary.json")
    else:
        (runs / "one").symlink_to(secret if kind == "run" else tmp_path / "nowhere")
    [run] = read(runs).values()
    assert [problem for problem in run.problems if "links are not followed" in problem]
    assert run.task != "secret"
    assert (run.curve != []) is (kind == "file")


def test_a_pipe_in_place_of_a_file_holds_nobody_up(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one")
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert read(tmp_path)["one"].problems == ["metrics.jsonl is not a file"]


def test_a_long_line_between_two_good_ones_costs_only_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", evaluation(0, 7.0))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "Evaluation", "x": "' + "y" * (2 << 20) + '"}\n')
    add_lines(folder, evaluation(50, 4.0))
    assert [row[0] for row in read(tmp_path)["one"].curve] == [0, 50]


def test_many_bytes_are_read_over_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "one", *LINES[:-1])
    monkeypatch.setattr(runs_module, "_READ_BYTES", 150)
    monkeypatch.setattr(run_metrics, "_CHUNK_BYTES", 7)  # no line is read in one piece
    runs = RunsFolder(tmp_path)
    [first] = runs.read()[0]
    assert first.problems[0].startswith("metrics.jsonl is being read")
    for _ in range(20):
        [run] = runs.read()[0]
    assert run.problems == []
    assert len(run.curve) == 3
    assert run.steps == 100


def test_the_newest_runs_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    for number in range(MAX_RUNS + 3):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "summary.json").write_text("{}")
        os.utime(folder, (number, number))
    (tmp_path / "notes").mkdir()  # no run
    found, note = RunsFolder(tmp_path).read()
    assert len(found) == MAX_RUNS
    assert "3 older runs" in note
    assert "run-0" not in {run.name for run in found}


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    make_run(tmp_path, "two", values={"trainer": {"seed": 5, "steps": 77}})
    found = list(read(tmp_path).values())
    assert settings_that_differ(found) == ["trainer.seed", "trainer.steps"]
    assert settings_that_differ([*found, Run(name="damaged")]) == ["trainer.seed", "trainer.steps"]
    page = as_dict(found, "runs", "")
    assert page["runs"][1]["settings"] == {"trainer.seed": "5", "trainer.steps": "77"}


def test_a_folder_that_is_none_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds the runs"):
        RunsFolder(tmp_path / "none")
