"""Whole runs in real processes: three nodes, a private server, and what happens when one is killed."""

from __future__ import annotations

import os
import signal
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


def test_recorded_decisions_repeat_the_run_without_a_predictor(
    whole_run: Path, server_url: str, tmp_path: Path
) -> None:
    done = run_to_end(
        command(
            "trainer_node", "train", "--config", str(whole_run / "config.toml"), "--runs-dir", str(tmp_path),
            "--run-id", "again", "--decisions", str(whole_run / "recording.hpt"),
        ),
        env={**os.environ, "HPT_REDIS_URL": server_url},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    states = [
        (sealed_folder.folders(run / "checkpoints" / "trainer")[0] / "model.safetensors").read_bytes()
        for run in (whole_run, tmp_path / "again")
    ]
    assert states[0] == states[1]


@pytest.mark.parametrize("victim", ["trainer", "all"])
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(
    whole_run: Path, victim: str, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    with running(up_command(tmp_path, "killed", LOCKSTEP, steps=STEPS)) as up:
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
    undisturbed, resumed = final_state(whole_run), final_state(run)
    assert [name for name in undisturbed if undisturbed[name] != resumed[name]] == []


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    with running(up_command(tmp_path, "stopped", steps=100_000)) as up:
        wait_for(lambda: last_step(run) > 60)
        up.send_signal(signal.SIGINT)
        output, _ = up.communicate(timeout=60)
    assert up.returncode == 0, output
    assert f"trainer-node resume {run}" in output
    newest = sealed_folder.folders(run / "checkpoints" / "trainer")[0]
    assert sealed_folder.is_emergency(newest.name)
    sealed_folder.verify(newest)
    assert summary_of(run)["status"] == "stopped"


@pytest.mark.parametrize("victim", ["predictor", "monitor", "server"])
def test_killing_a_helper_never_stops_training_and_prediction_comes_back(victim: str, tmp_path: Path) -> None:
    run = tmp_path / "hurt"
    words = {"predictor": ("predictor_node",), "monitor": ("monitor_node",), "server": ("unixsocket",)}[
        victim
    ]
    with running(up_command(tmp_path, "hurt", steps=100_000)) as up:
        wait_for(lambda: any(o["delta_norm"] > 0 for o in metric_lines(run, "Outcome")))
        killed_at = last_step(run)
        kill(child_running(up.pid, *words))
        # New proposals are applied well after the kill: prediction is back, and training went on.
        wait_for(lambda: last_step(run) > killed_at + 50)
        wait_for(
            lambda: any(
                o["delta_norm"] > 0 and o["base_step"] > killed_at + 50 for o in metric_lines(run, "Outcome")
            )
        )
        child_running(up.pid, *words)  # it is there again
        up.send_signal(signal.SIGINT)
        output, _ = up.communicate(timeout=60)
    assert up.returncode == 0, output
    steps = [o["step"] for o in metric_lines(run, "Observation")]
    assert set(range(1, max(steps) + 1)) == set(steps)


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
