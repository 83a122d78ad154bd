"""A trainer's generation is above all that its run ever had, whatever the server has forgotten."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from common import codec, sealed_folder
from common.bus import Entry, EntryId
from common.config import load_settings
from common.errors import EnvironmentFault, Fenced
from common.messages import RunEnded
from common.open_bus import open_bus
from common.outbox import Outbox
from common.streams import HISTORY
from tests.faults import wait_until
from trainer_node.node import TrainerJob, run_trainer
from trainer_node.run_folder import RunFolder, last_generation, remember_generation

SETTINGS = (
    "trainer.steps=2", "trainer.schedule.warmup_steps=1", "trainer.threads=1",
    "trainer.batch.sequences=4", "trainer.model.channels=4",
    "predictor.enabled=false", "trainer.checkpoint.every_steps=0",
)  # fmt: skip


def job_of(run: RunFolder, server: str, *overrides: str) -> TrainerJob:
    settings = load_settings(preset="digits", overrides=[*SETTINGS, *overrides])
    return TrainerJob(run=run, settings=settings, redis_url=f"memory://{server}", resume=True)


def start(run: RunFolder, server: str) -> int:
    """One start of the trainer on this server; the generation it was given."""
    assert run_trainer(job_of(run, server), threading.Event()) == 0
    return sealed_folder.age_key(sealed_folder.folders(run.trainer_checkpoints)[0].name)[0]


def test_a_start_on_a_new_server_is_above_one_that_left_no_checkpoint(tmp_path: Path) -> None:
    """Otherwise its ids come again, and recorder and predictor would take them for old ones."""
    run = RunFolder(tmp_path / "run")
    assert start(run, f"{tmp_path}-first") == 1
    shutil.rmtree(run.trainer_checkpoints)
    assert start(run, f"{tmp_path}-second") == 2


def test_the_generation_is_remembered_whole_or_not_at_all(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert last_generation(run) == 0
    remember_generation(run, 7)
    assert last_generation(run) == 7
    run.generation.write_text("7 or so")
    assert last_generation(run) == 0


def test_a_generation_that_cannot_be_remembered_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        remember_generation(RunFolder(tmp_path / "absent"), 1)


def test_a_fenced_trainer_leaves_the_folder_to_the_newer_one(tmp_path: Path) -> None:
    """Its last checkpoint and its summary would lie among the newer one's, and take their place."""
    run, ends = RunFolder(tmp_path / "run"), []

    def train() -> None:
        try:
            run_trainer(job_of(run, str(tmp_path), "trainer.steps=1000000"), threading.Event())
        except Fenced as error:
            ends.append(error)

    older = threading.Thread(target=train)
    older.start()
    bus = open_bus(f"memory://{tmp_path}", run.run_id)
    wait_until(lambda: bus.length(HISTORY) > 3, 60.0)
    before = set(run.trainer_checkpoints.iterdir()) if run.trainer_checkpoints.exists() else set()
    newer = RunEnded(step=1, reason="stopped")
    bus.publish([Entry(HISTORY, EntryId(9, 1), "RunEnded", codec.encode(newer), 0.0)])
    older.join(60.0)
    assert [str(end).split(": ")[-1][:23] for end in ends] == ["generation 9 writes now"]
    assert not run.summary.exists()
    assert (set(run.trainer_checkpoints.iterdir()) if run.trainer_checkpoints.exists() else set()) == before


def test_words_that_never_reached_a_server_are_told_to_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Outbox, "close", lambda self, seconds: False)
    run = RunFolder(tmp_path / "run")
    start(run, str(tmp_path))
    assert "never reached a server" in capsys.readouterr().err
    assert "unpublished" in run.metrics.read_text(encoding="utf-8")
