"""`trainer-node race`: a smoke race leaves its files; stopping changes nothing; a mistake writes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import EnvironmentFault, SettingsError
from common.settings import RunSettings
from tests.race.fake_race import (
    run_always_failing,
    run_and_interrupt,
    run_elsewhere,
    run_fake,
    run_or_die,
    run_users_mistake,
)
from trainer_node.cli import main
from trainer_node.race import evidence
from trainer_node.race import options as race_options
from trainer_node.race.options import RaceOptions, plan_of
from trainer_node.race.race import race
from trainer_node.race.results import FILE_NAME, read_results
from trainer_node.race.run_result import RunKey
from trainer_node.race.show import RaceDisplay, list_lines
from trainer_node.race.tasks import TASKS, race_settings
from trainer_node.race.waves import Wave

Cli = Callable[..., tuple[int, str]]

BAD_INPUT = {
    "no task": ([], "name a task"),
    "wrong task": (["digit"], "did you mean digits?"),
    "wrong arm": (["digits", "--arms", "our"], "did you mean ours?"),
    "wrong rule": (["digits", "--rule", "honest"], "decayed"),
    "no seeds": (["digits", "--seeds", "0"], "--seeds 0"),
    "too many trials": (["digits", "--trials", "99999"], "--trials 99999"),
    "no workers": (["digits", "--workers", "-1"], "--workers -1"),
    "no time": (["digits", "--budget", "0"], "--budget 0"),
    "time is not a number": (["digits", "--budget", "nan"], "--budget nan"),
    "text without data": (["text"], "add --data"),
    "data that is not there": (["python", "--data", "nowhere"], "nowhere"),
    "data for a task that has its own": (["digits", "--data", "x.txt"], "leave out --data"),
    "fitted on nothing": (["digits", "--rule", "fitted"], "--fitted-on N"),
    "fitted under another rule": (["digits", "--rule", "decayed", "--fitted-on", "2"], "--fitted-on N"),
    "quick evidence": (["digits", "--quick", "--evidence"], "no evidence"),
}


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs `race` in this process, in an empty folder; (exit code, what it said last on stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trainer-node", "race", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        return int(leaving.value.code or 0), lines[-1] if lines else ""

    return run


@pytest.mark.parametrize("name", BAD_INPUT)
def test_a_users_mistake_is_one_line_exit_2_and_nothing_written(name: str, cli: Cli, tmp_path: Path) -> None:
    arguments, expected = BAD_INPUT[name]
    code, error = cli(*arguments)
    assert code == 2
    assert expected in error
    assert list(tmp_path.iterdir()) == []


def fake_options(out: Path, **more: object) -> RaceOptions:
    return RaceOptions(
        **{"task": "digits", "quick": True, "workers": 1, "out": out, "today": "2026-11-21", **more}
    )  # type: ignore[arg-type]


def runs_of(out: Path) -> set[str]:
    return set(read_results(out / FILE_NAME)[0])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes seconds and has tests of its own (test_report.py)."""
    if "real" not in request.node.name:
        monkeypatch.setattr("trainer_node.race.plots.draw_all", lambda out_dir, figures: {})


def test_a_race_that_was_cut_off_and_taken_up_again_has_the_runs_of_one_that_was_not(tmp_path: Path) -> None:
    assert race(fake_options(tmp_path / "whole"), runner=run_fake) == 0
    report = json.loads((tmp_path / "whole" / "report.json").read_text())["race"]
    assert (report["incomplete"], report["in_distribution"]) == ([], [])
    assert race(fake_options(tmp_path / "cut"), runner=run_fake) == 0
    path = tmp_path / "cut" / FILE_NAME
    path.write_bytes(path.read_bytes()[:9000])
    assert len(runs_of(tmp_path / "cut")) < len(runs_of(tmp_path / "whole"))
    assert race(fake_options(tmp_path / "cut"), runner=run_fake) == 0
    assert runs_of(tmp_path / "cut") == runs_of(tmp_path / "whole")


@pytest.fixture
def _ctrl_c_arrives() -> Iterator[None]:
    """A shell lets its background jobs ignore Ctrl-C, and children inherit that."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("_ctrl_c_arrives")
def test_ctrl_c_leaves_a_state_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert race(fake_options(tmp_path / "whole"), runner=run_fake) == 0
    assert race(fake_options(tmp_path / "cut"), runner=run_and_interrupt) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "cut" / "report.json").is_file()
    assert runs_of(tmp_path / "cut") < runs_of(tmp_path / "whole")
    assert race(fake_options(tmp_path / "cut"), runner=run_fake) == 0
    assert runs_of(tmp_path / "cut") == runs_of(tmp_path / "whole")


def test_a_finished_race_runs_nothing_again(tmp_path: Path) -> None:
    assert race(fake_options(tmp_path), runner=run_fake) == 0
    before = (tmp_path / FILE_NAME).read_bytes()
    assert race(fake_options(tmp_path), runner=run_users_mistake) == 0
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_more_seeds_and_arms_go_on_in_the_same_folder_other_settings_do_not(tmp_path: Path) -> None:
    assert race(fake_options(tmp_path), runner=run_fake) == 0
    few = runs_of(tmp_path)
    more = fake_options(tmp_path, seeds=3, arms="adamw-decay,ours-fixed,ours,snoo")
    assert race(more, runner=run_fake) == 0
    assert few < runs_of(tmp_path)
    with pytest.raises(SettingsError, match="another --out"):
        race(fake_options(tmp_path, quick=False), runner=run_fake)


def test_a_race_does_not_go_on_with_data_that_have_changed_under_the_same_name(tmp_path: Path) -> None:
    options = fake_options(tmp_path)
    race_options.check_data(options, "book.txt: 1,000 tokens")  # nothing is there yet
    race_options.write_folder(options, plan_of(options), data="book.txt: 1,000 tokens")
    race_options.check_data(options, "book.txt: 1,000 tokens")
    with pytest.raises(
        SettingsError, match=r"other data \(book.txt: 1,000 tokens; now book.txt: 999 tokens\)"
    ):
        race_options.check_data(options, "book.txt: 999 tokens")


def test_results_of_other_code_are_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert race(fake_options(tmp_path), runner=run_fake) == 0
    monkeypatch.setattr(race_options, "code_fingerprint", lambda: "other")
    assert race(fake_options(tmp_path), runner=run_fake) == 0
    assert "another version of the code" in capsys.readouterr().err


def test_a_race_that_went_on_elsewhere_with_other_code_says_so(tmp_path: Path) -> None:
    assert race(fake_options(tmp_path), runner=run_fake) == 0
    alone = evidence.read(tmp_path / "digits.decayed.json")
    assert (alone.machine, alone.notes) == ("no machine", ())
    assert race(fake_options(tmp_path, seeds=3), runner=run_elsewhere) == 0
    both = evidence.read(tmp_path / "digits.decayed.json")
    assert both.machine == "no machine and another machine"
    assert both.notes == ("Its runs were made by 2 versions of the code, those that were timed by 2.",)
    assert both.notes[0] in json.loads((tmp_path / "report.json").read_text())["reservations"]


def test_a_worker_that_dies_is_told_and_its_arm_named_as_incomplete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert race(fake_options(tmp_path, seeds=3), runner=run_or_die) == 0
    assert "its worker died (exit code 7)" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["race"]["incomplete"]) == {"adamw-decay", "ours-fixed", "ours"}


def test_without_a_target_the_race_ends_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert race(fake_options(tmp_path, seeds=2), runner=run_or_die) == 0
    assert "no target can be set" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["race"]["target"] is None


def test_where_no_run_succeeds_the_race_ends_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="no run succeeded: OSError: no space left"):
        race(fake_options(tmp_path), runner=run_always_failing)
    assert "Traceback" in (tmp_path / "failures.log").read_text()


def test_when_the_budget_is_spent_no_run_starts_and_what_is_there_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert race(fake_options(tmp_path, seeds=2), runner=run_fake) == 0
    more = fake_options(tmp_path, seeds=500, budget_minutes=1e-9)
    before = runs_of(tmp_path)
    assert race(more, runner=run_users_mistake) == 0
    assert runs_of(tmp_path) == before
    assert "budget" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["race"]["incomplete"]


def test_every_task_and_arm_is_listed() -> None:
    text = "\n".join(list_lines())
    assert all(f"  {task} " in text for task in TASKS)
    assert "  ours " in text


def test_the_plan_of_a_quick_race_is_small() -> None:
    plan = plan_of(RaceOptions(task="python", quick=True))
    assert (len(plan.seeds), plan.trials, len(plan.arms)) == (2, 1, 3)
    assert plan.base_steps * 4 == plan_of(RaceOptions(task="python")).base_steps


def test_the_display_says_phase_runs_and_minutes_left(capsys: pytest.CaptureFixture[str]) -> None:
    display = RaceDisplay(Console(stderr=True, highlight=False))
    key = RunKey(task="digits", arm="ours", config=(), planned_steps=100, seed=0, purpose="race")
    display.begin(Wave(phase="race", keys=(key, key)), 1000)
    display.ended(key)
    display.close()
    assert "race: 2 runs" in capsys.readouterr().err
    assert "1 runs, " in display.numbers()
    assert "min left" in display.numbers()


@pytest.mark.slow
def test_a_real_race_of_digits_leaves_its_files(tmp_path: Path) -> None:
    """The command itself, in processes of its own, with shorter runs than --quick has."""
    script = (
        "import trainer_node.race.options as options, trainer_node.cli as cli\n"
        "options.QUICK_SHARE = 10\n"
        "if __name__ == '__main__': cli.main()\n"
    )
    program = tmp_path / "program.py"
    program.write_text(script)
    root = Path(__file__).resolve().parents[2]
    asked = ["race", "digits", "--quick", "--seeds", "1", "--out", "out"]
    ended = subprocess.run(
        [sys.executable, str(program), *asked],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "failed:" not in ended.stderr
    for name in ("results.jsonl", "race.json", "report.json", "table.txt", "index.html"):
        assert (tmp_path / "out" / name).is_file(), name
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["race"]["incomplete"] == []
    assert report["race"]["target"] > 0


def test_an_audit_is_of_our_arm_and_says_each_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, object] = {}

    def audit_task(settings: RunSettings, out_dir: Path, **more: object) -> list[str]:
        seen.update(more, policy=settings.predictor.policy, steps=settings.trainer.steps, out=out_dir)
        return ["all is well"]

    monkeypatch.setattr("trainer_node.race.audit.audit_task", audit_task)
    assert race(fake_options(tmp_path, audit=True, seeds=4, command="again")) == 0
    assert capsys.readouterr().out == "all is well\n"
    quick_steps = race_settings("digits").trainer.steps // 4
    assert seen == {
        "policy": "learned", "steps": quick_steps, "out": tmp_path, "seeds": (0, 1, 2, 3),
        "task": "digits", "command": "again",
    }  # fmt: skip
