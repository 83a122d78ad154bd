"""Checkpoints behind the trainer's back: the writer may die and the disk may fill, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from common import sealed_folder
from common.errors import CheckpointError
from common.messages import Alert, CheckpointRequest, CheckpointWritten, OrderDone
from tests.nodes import QUICK, command, last_step, metric_lines, running, summary_of, wait_for
from tests.trainer.test_rollback import PLAIN, run
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node import checkpoint
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_buffer import make_buffer
from trainer_node.housekeeping import Housekeeping
from trainer_node.node import TrainerJob, run_trainer
from trainer_node.run_folder import RunFolder, newest_checkpoint

CPU = torch.device("cpu")


def checkpoints_with_writer(root: Path, told: list[str], staging: str = "memory") -> Checkpoints:
    buffer = make_buffer(staging, CPU)
    return Checkpoints(root, keep=3, on_failure=told.append, buffer=buffer, has_process=True)


def steps_in(root: Path) -> list[int]:
    return [sealed_folder.age_key(folder.name)[1] for folder in sealed_folder.folders(root)]


@pytest.mark.parametrize("staging", ["memory", "disk"])
def test_a_killed_writer_costs_no_checkpoint_and_is_told_once(staging: str, tmp_path: Path) -> None:
    told: list[str] = []
    checkpoints = checkpoints_with_writer(tmp_path, told, staging)
    loop = tiny_loop(ScriptedLinks(), tiny_settings("predictor.enabled=false"))
    for step in (1, 2, 3):
        loop.progress.step = step
        if step == 2:
            os.kill(writer_of(checkpoints), signal.SIGKILL)
        assert checkpoints.save(loop, Housekeeping(print, None).to_json(), emergency=False) is not None
        checkpoints.wait()
        assert steps_in(tmp_path)[0] == step
        assert not checkpoints.last_failed
    assert len(told) == 1
    assert "killed by SIGKILL" in told[0]
    assert "step-00000002.gen-1" in told[0]
    assert psutil.pid_exists(writer_of(checkpoints)), "the third had no writer of its own"
    checkpoints.close()
    for folder in sealed_folder.folders(tmp_path):
        fresh = tiny_loop(ScriptedLinks(), tiny_settings("predictor.enabled=false"))
        checkpoint.load(folder, fresh)
        assert same_bits(weights_of(fresh), weights_of(loop))


def writer_of(checkpoints: Checkpoints) -> int:
    assert checkpoints._process is not None
    process_id = checkpoints._process.process_id
    assert process_id is not None
    return process_id


def test_no_writer_at_all_costs_no_checkpoint_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    checkpoints = checkpoints_with_writer(tmp_path, told)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    loop = tiny_loop(ScriptedLinks(), tiny_settings("predictor.enabled=false"))
    checkpoints.save(loop, {}, emergency=False)
    checkpoints.close()
    assert steps_in(tmp_path) == [0]
    assert "could not be started" in told[0]


def test_a_disk_that_fails_behind_the_back_takes_the_best_name_back_and_no_order_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    links = ScriptedLinks()
    checkpoints = checkpoints_with_writer(tmp_path / "disk", told)
    housekeeping = Housekeeping(links.emit, checkpoints)
    loop = tiny_loop(links, tiny_settings("predictor.enabled=false"))
    housekeeping.last_loss, housekeeping._next_checkpoint_step = 2.0, 1000
    assert housekeeping.save(loop, is_awaited=True)
    best = checkpoints.best_name
    (tmp_path / "disk").rename(tmp_path / "kept")
    (tmp_path / "disk").write_text("in the way")  # as an unmounted disk: nothing can be made there
    loop.progress.step, housekeeping.last_loss = 1, 1.0
    assert housekeeping.save(loop)  # nobody knows yet
    loop.progress.step, housekeeping.last_loss = 2, 1.5
    housekeeping._obey(loop, CheckpointRequest(request_id="c", emergency=True, reason="memory"))
    assert checkpoints.best_name == best
    assert len(told) == 2
    assert all("Not a directory" in text for text in told)
    assert [order.done for order in links.of(OrderDone)] == [False]
    assert [written.step for written in links.of(CheckpointWritten)] == [0, 1]
    checkpoints.close()
    sealed_folder.verify(tmp_path / "kept" / best)


def test_a_rollback_says_which_checkpoints_it_passed_over_and_why(tmp_path: Path) -> None:
    done_once = False

    def damage(loop) -> None:
        nonlocal done_once
        folders = sealed_folder.folders(tmp_path)
        if loop.progress.step == 53 and not done_once:
            done_once = True
            path = folders[0] / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-1])

    # The writer looks at the newest folders itself: damage under its eyes is another story than this one.
    done = run(tmp_path, PLAIN, "trainer.checkpoint.every_steps=10", after_step=damage, waits_for_saves=True,
               is_rotten=lambda p: 52 <= p < 60)  # fmt: skip
    told = [alert.text for alert in done.links.of(Alert) if alert.kind == "checkpoint_passed_over"]
    assert done_once
    assert any("model.safetensors is cut or too long" in text and "step-" in text for text in told), told


# ---- the whole process ---------------------------------------------------------------------------


def train(root: Path, *overrides: str, steps: int) -> list[str]:
    settings = [part for text in (*QUICK, *overrides) for part in ("--set", text)]
    return command(
        "trainer_node", "train", "--preset", "digits", "--steps", str(steps), "--runs-dir", str(root),
        "--run-id", "r", "--redis", f"memory://{root.name}", *settings,
        "--set", "predictor.enabled=false",
    )  # fmt: skip


def test_sigterm_drains_the_save_in_flight_writes_the_last_one_and_leaves_no_process(tmp_path: Path) -> None:
    """A checkpoint at every step: the signal comes within a save."""
    root = tmp_path / "r"
    with running(train(tmp_path, "trainer.checkpoint.every_steps=1", steps=100_000)) as trainer:
        wait_for(lambda: last_step(root) > 20)
        family = psutil.Process(trainer.pid).children(recursive=True)
        assert ["common.folder_process" in " ".join(child.cmdline()) for child in family] == [True]
        for process in (*family, trainer):
            process.send_signal(signal.SIGTERM)  # as an init system does, to all of the group
        output, _ = trainer.communicate(timeout=60)
    assert trainer.returncode == 0, output
    assert not any(child.is_running() for child in family)
    run_folder = RunFolder(root)
    newest, reasons = newest_checkpoint(run_folder, with_predictor=False)
    assert reasons == []
    assert sealed_folder.is_emergency(newest.name)
    assert sealed_folder.age_key(newest.name)[1] == summary_of(root)["real_steps"] == last_step(root)
    assert not list(run_folder.trainer_checkpoints.glob("*.tmp"))
    assert metric_lines(root, "CheckpointWritten")[-1]["name"] == newest.name


def test_a_resumed_run_says_in_its_events_why_the_newest_checkpoint_was_not_taken(tmp_path: Path) -> None:
    settings = tiny_settings("predictor.enabled=false", "trainer.decision_mode=live", "trainer.threads=1")
    root = tmp_path / "r"
    job = TrainerJob(
        run=RunFolder(root), settings=settings, redis_url=f"memory://{tmp_path.name}", resume=True
    )
    run_trainer(job, threading.Event())
    newest = sealed_folder.folders(root / "checkpoints" / "trainer")[0]
    path = newest / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    run_trainer(job, threading.Event())
    (alert,) = metric_lines(root, "Alert")
    assert alert["alert_kind"] == "checkpoint_passed_over"
    assert f"{newest.name}: optimizer.safetensors is damaged" in alert["text"]


def test_none_that_is_whole_is_refused_with_the_reason_of_each(tmp_path: Path) -> None:
    told: list[str] = []
    run_folder = RunFolder(tmp_path)
    checkpoints = checkpoints_with_writer(run_folder.trainer_checkpoints, told)
    loop = tiny_loop(ScriptedLinks(), tiny_settings("predictor.enabled=false"))
    for step in (1, 2):
        loop.progress.step = step
        checkpoints.save(loop, {}, emergency=False)
    checkpoints.close()
    newest, older = sealed_folder.folders(run_folder.trainer_checkpoints)
    (newest / "state.json").unlink()
    (older / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError) as error:
        newest_checkpoint(run_folder, with_predictor=False)
    assert f"{newest.name}: state.json is missing" in str(error.value)
    assert f"{older.name}: manifest.json is damaged" in str(error.value)
    assert "\n" not in str(error.value)
    assert told == []
