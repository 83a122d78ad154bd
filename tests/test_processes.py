"""Whole runs in real processes: three nodes, a private server, and what happens when one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from common import sealed_folder
from common.recording import read_recording
from tests.nodes import (
    checkpoint_steps,
    child_running,
    children_of,
    command,
    kill,
    last_step,
    metric_lines,
    run_to_end,
    running,
    summary_of,
    up_command,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LOCKSTEP = "trainer.decision_mode=lockstep"
STEPS = 240


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed lockstep run; several tests read it."""
    runs = tmp_path_factory.mktemp("runs")
    done = run_to_end(up_command(runs, "whole", LOCKSTEP, steps=STEPS))
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "whole"


def final_state(run: Path) -> dict[str, bytes]:
    """Bytes of everything that must be equal between equal runs."""
    trainer = sealed_folder.folders(run / "checkpoints" / "trainer")[0]
    predictor = sealed_folder.folders(run / "checkpoints" / "predictor")[0]
    files = [trainer / f"{name}.safetensors" for name in ("model", "optimizer", "basis", "random")]
    files += [predictor / "history.safetensors", predictor / "learned.json"]
    return {file.name: file.read_bytes() for file in files}


def test_up_trains_records_and_sums_up(whole_run: Path) -> None:
    summary = summary_of(whole_run)
    assert summary["status"] == "finished"
    assert summary["real_steps"] == STEPS
    assert summary["applied"] == summary["accepted"] + summary["refused"] > 0
    assert summary["val_loss_last"] < 0.6 * summary["val_loss_first"]
    assert summary["stale"] == summary["vetoed"] == 0
    assert 0 < summary["seconds_in_steps"] < summary["seconds_total"]
    assert (whole_run / "config.toml").is_file()
    assert list((whole_run / "tensorboard").glob("events.*"))
    recording = read_recording(whole_run / "recording.hpt")
    assert recording.sealed
    applied = [o for o in metric_lines(whole_run, "Outcome") if o["delta_norm"] > 0]
    assert len(applied) == summary["applied"]
    assert all(-1 <= o["delta_cosine"] <= 1 for o in applied if o["verdict"] == "accepted")


def test_replay_reproduces_every_decision_byte_for_byte(whole_run: Path) -> None:
    done = run_to_end(command("predictor_node", "replay", str(whole_run / "recording.hpt"), "--check"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byte for byte" in done.stdout


def test_recorded_decisions_repeat_the_run_without_a_predictor_on_any_server(
    whole_run: Path, server_urls: dict[str, str], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(len(server_urls)) as at_once:
        ends = at_once.map(lambda name: repeat(whole_run, tmp_path, name, server_urls[name]), server_urls)
    for name, done in zip(server_urls, ends, strict=True):
        assert done.returncode == 0, done.stdout + done.stderr
        states = [
            (sealed_folder.folders(run / "checkpoints" / "trainer")[0] / "model.safetensors").read_bytes()
            for run in (whole_run, tmp_path / name)
        ]
        assert states[0] == states[1], name


def repeat(run: Path, runs_dir: Path, run_id: str, url: str) -> subprocess.CompletedProcess[str]:
    """A trainer alone, with the decisions of a recorded run."""
    return run_to_end(
        command(
            "trainer_node", "train", "--config", str(run / "config.toml"), "--runs-dir", str(runs_dir),
            "--run-id", run_id, "--decisions", str(run / "recording.hpt"),
        ),
        env={**os.environ, "HPT_REDIS_URL": url},
    )  # fmt: skip


VICTIMS = ("trainer", "all")


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Path]]]:
    """A run per victim, killed and resumed; all at the same time, because each keeps one core busy."""
    with ThreadPoolExecutor(len(VICTIMS)) as at_once:
        yield {
            victim: at_once.submit(kill_and_resume, tmp_path_factory.mktemp(victim), victim)
            for victim in VICTIMS
        }


def kill_and_resume(runs: Path, victim: str) -> Path:
    run = runs / "killed"
    with running(up_command(runs, "killed", LOCKSTEP, steps=STEPS)) as up:
        wait_for(lambda: len(checkpoint_steps(run)) >= 2 and checkpoint_steps(run, "predictor"))
        victims = [child_running(up.pid, "trainer_node", "train")]
        if victim == "all":
            victims = [psutil.Process(up.pid), *children_of(up.pid)]
        for process in victims:
            kill(process)
        up.wait(60)
    assert not (run / "summary.json").exists(), "the run ended before it was killed: make it longer"
    done = run_to_end(command("trainer_node", "resume", str(run)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resume from step-" in done.stderr
    return run


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(
    whole_run: Path, resumed_runs: dict[str, Future[Path]], victim: str
) -> None:
    undisturbed, resumed = final_state(whole_run), final_state(resumed_runs[victim].result())
    assert [name for name in undisturbed if undisturbed[name] != resumed[name]] == []


HELPERS = {"predictor": ("predictor_node",), "monitor": ("monitor_node",), "server": ("unixsocket",)}


@dataclass(frozen=True)
class HurtRun:
    path: Path
    returncode: int
    output: str


@pytest.fixture(scope="module")
def hurt_run(tmp_path_factory: pytest.TempPathFactory) -> HurtRun:
    """A run that loses each helper in turn, each time gets predictions again, and is stopped by Ctrl-C."""
    runs = tmp_path_factory.mktemp("runs")
    run = runs / "hurt"
    with running(up_command(runs, "hurt", steps=100_000)) as up:
        wait_for_a_jump(run, "nobody", after_step=0)
        for victim, words in HELPERS.items():
            killed_at = last_step(run)
            kill(child_running(up.pid, *words))
            # New proposals are applied well after the kill: prediction is back, and training went on.
            wait_for_a_jump(run, victim, after_step=killed_at + 50)
            child_running(up.pid, *words)  # it is there again
        up.send_signal(signal.SIGINT)
        output, _ = up.communicate(timeout=60)
    return HurtRun(run, up.returncode, output)


def wait_for_a_jump(run: Path, victim: str, *, after_step: int) -> None:
    def has_jumped() -> bool:
        jumps = [o["base_step"] for o in metric_lines(run, "Outcome") if o["delta_norm"] > 0]
        return bool(jumps) and jumps[-1] > after_step

    try:
        wait_for(has_jumped)
    except AssertionError:
        pytest.fail(f"killed: {victim}; no jump after step {after_step}, the last step is {last_step(run)}")


def test_killing_a_helper_never_stops_training_and_prediction_comes_back(hurt_run: HurtRun) -> None:
    assert hurt_run.returncode == 0, hurt_run.output
    steps = [o["step"] for o in metric_lines(hurt_run.path, "Observation")]
    assert set(range(1, max(steps) + 1)) == set(steps)


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(hurt_run: HurtRun) -> None:
    run, output = hurt_run.path, hurt_run.output
    assert hurt_run.returncode == 0, output
    assert f"trainer-node resume {run}" in output
    newest = sealed_folder.folders(run / "checkpoints" / "trainer")[0]
    assert sealed_folder.is_emergency(newest.name)
    sealed_folder.verify(newest)
    assert summary_of(run)["status"] == "stopped"


def test_killing_the_parent_leaves_nothing_behind(tmp_path: Path) -> None:
    run = tmp_path / "orphans"
    with running(up_command(tmp_path, "orphans", steps=100_000)) as up:
        wait_for(lambda: last_step(run) > 20)
        family = [child_running(up.pid, name) for name in ("predictor_node", "monitor_node", "unixsocket")]
        trainer = child_running(up.pid, "trainer_node", "train")
        kill(up)
        wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in [*family, trainer]))
    newest = sealed_folder.folders(run / "checkpoints" / "trainer")[0]
    assert sealed_folder.is_emergency(newest.name)


def test_up_without_prediction_needs_no_predictor(tmp_path: Path) -> None:
    done = run_to_end(up_command(tmp_path, "plain", "predictor.enabled=false", steps=60))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(tmp_path / "plain")
    assert summary["real_steps"] == 60
    assert summary["proposals"] == summary["virtual_steps"] == 0
    assert not (tmp_path / "plain" / "logs" / "predictor.log").exists()
