"""`--dry-run`: the plan as a table, exit 0, nothing written; and its one line before a run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import load_settings
from tests.trainer.tiny import tiny_settings
from trainer_node import up
from trainer_node.cli import main
from trainer_node.dry_run import plan_line, plan_lines, run_plan, size

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs a command in this process, in an empty folder without a server: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPT_REDIS_URL", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trainer-node", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        said = capsys.readouterr()
        return int(leaving.value.code or 0), said.out, said.err

    return run


@pytest.mark.parametrize("command", ["up", "train"])
@pytest.mark.parametrize("preset", ["nano", "gpt2-small", "digits"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    command: str, preset: str, cli: Cli, tmp_path: Path
) -> None:
    code, out, _ = cli(command, "--preset", preset, "--dry-run")
    assert code == 0
    assert out.splitlines() == plan_lines(load_settings(preset=preset))
    assert list(tmp_path.iterdir()) == []


def test_a_run_for_a_gpu_is_planned_where_there_is_none() -> None:
    plan = run_plan(load_settings(preset="gpt2-small"))
    assert plan.site.is_gpu
    assert plan.memory.num_weights == 123_587_328
    assert {h.place for h in plan.memory.holders if h.name == "snapshot"} == {"host"}


def test_under_torchrun_shards_are_planned_for_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    whole = run_plan(load_settings(preset="nano"))
    shard = run_plan(load_settings(preset="nano", overrides=["trainer.parallel.kind=fsdp"]))
    assert (whole.site.num_shards, shard.site.num_shards) == (1, 4)
    assert 4 * shard.memory.of("gradients") == whole.memory.of("gradients")
    assert shard.messages.decision_point == whole.messages.decision_point


def test_the_table_says_what_the_plan_holds() -> None:
    settings = load_settings(preset="gpt2-small", overrides=["trainer.basis.history_snapshots=4"])
    memory = run_plan(settings).memory
    rows = {line.split("  ")[0]: line for line in plan_lines(settings) if line}
    for holder in memory.holders:
        assert size(holder.num_bytes) in rows[holder.name]
    assert size(memory.on("device")) in rows["together"]
    assert size(memory.on("host")) in rows["together"]
    for holder in memory.passing:
        assert size(holder.num_bytes) in rows[holder.name]


def test_without_prediction_no_basis_is_spoken_of() -> None:
    settings = load_settings(preset="nano", overrides=["predictor.enabled=false"])
    assert "basis" not in plan_line(settings)
    assert "prediction   prediction is off" in plan_lines(settings)


BAD = {
    "nothing to hold": ("trainer.basis.history_snapshots=1", "holds no displacement"),
    "too large for a message": ("trainer.basis.history_sample=60000", "the largest is 25600"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_basis_that_cannot_be_is_refused_before_anything_is_written(
    name: str, more: list[str], cli: Cli, tmp_path: Path
) -> None:
    override, cure = BAD[name]
    history = ["--set", "trainer.basis.history_snapshots=3", "--set", override]
    code, _, err = cli("up", "--preset", "digits", *history, *more)
    assert code == 2
    assert cure in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_up_says_before_a_run_what_it_will_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings()
    monkeypatch.setattr(up, "_run_nodes", lambda run, settings: 0)
    assert up.start_run(settings, run_id="first", runs_dir=tmp_path) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory ")]
    memory = run_plan(settings).memory
    for name in ("weights", "gradients", "optimizer"):
        assert f"{name} {size(memory.of(name))}" in line
    assert f"basis {size(memory.basis_bytes)}" in line
    assert re.search(rf"snapshot {size(memory.of('snapshot'))} on (disk|host)", line)


SIZES = {
    0: "0 B",
    999: "999 B",
    1000: "1.0 KiB",
    1 << 20: "1.0 MiB",
    123 << 20: "123 MiB",
    5 << 50: "5120 TiB",
}


@pytest.mark.parametrize(("num_bytes", "text"), SIZES.items())
def test_sizes_are_said_in_few_digits(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
