"""What ranks do in the tests: functions of a module, since a process finds them by name. They write."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

from safetensors.torch import save_file

from common import sealed_folder
from common.messages import Observation
from tests.distributed.hybrid_run import (
    CONTROLS,
    change_controls,
    hybrid_settings,
    take,
    verdicts,
    whole_weights,
)
from tests.trainer.tiny import ScriptedLinks
from trainer_node.assembly import prepare_task
from trainer_node.groups import parameter_groups
from trainer_node.node import TrainerJob, run_trainer
from trainer_node.parallel import on_ranks
from trainer_node.ranks import Ranks
from trainer_node.run_folder import RunFolder
from trainer_node.step import FirstPiece, equally, make_gradients

KINDS = {
    "ddp": ("trainer.parallel.kind=ddp",),
    "fsdp": ("trainer.parallel.kind=fsdp",),
    "offload": ("trainer.parallel.kind=fsdp", "trainer.parallel.cpu_offload=true"),
}
COMPRESSED = {
    "powersgd": (
        "trainer.parallel.kind=ddp",
        "trainer.parallel.compression=powersgd",
        "trainer.parallel.compression_after_steps=10",
        "trainer.steps=60",
    ),
}


def all_kinds(ranks: Ranks, folder: str, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        loop = take(hybrid_settings(*{**KINDS, **COMPRESSED}[kind]), ranks)
        weights = whole_weights(loop)
        points = [
            (m.step, m.attempt, m.decision_point.fingerprint, m.decision_point.gram)
            for m in loop.said
            if isinstance(m, Observation) and m.decision_point
        ]
        of_ranks = [json.loads(content) for content in ranks.gather(json.dumps(points).encode())]
        if ranks.rank == 0:
            save_file(weights, Path(folder) / f"{kind}.safetensors")
            losses = [m.features[0] for m in loop.said if isinstance(m, Observation)]
            told = {"verdicts": verdicts(loop), "points_of_rank": of_ranks, "losses": losses}
            (Path(folder) / f"{kind}.json").write_text(json.dumps(told))
    for kind in ("ddp", "fsdp"):
        with_controls(kind, ranks, folder)
    of_kinds = {kind: first_piece(kind, ranks) for kind in ("ddp", "fsdp")}
    if ranks.rank == 0:
        (Path(folder) / "first_pieces.json").write_text(json.dumps(of_kinds))


def with_controls(kind: str, ranks: Ranks, folder: str) -> None:
    """A run whose batch and rate are changed on the way."""
    settings = hybrid_settings(*KINDS[kind], *CONTROLS)
    loop = take(settings, ranks, ScriptedLinks(answer=change_controls))
    weights = whole_weights(loop)
    of_ranks = [content.decode() for content in ranks.gather(repr(loop.progress.controls).encode())]
    if ranks.rank == 0:
        save_file(weights, Path(folder) / f"controls.{kind}.safetensors")
        told = {"verdicts": verdicts(loop), "controls": of_ranks, "step": loop.progress.step}
        (Path(folder) / f"controls.{kind}.json").write_text(json.dumps(told))


def first_piece(kind: str, ranks: Ranks) -> list[tuple[float, float]]:
    """(norm, share) of each rank: of the first of two micro-batches, before anything was learned."""
    settings = hybrid_settings(*KINDS[kind]).trainer
    task = on_ranks(prepare_task(settings), settings, ranks)
    first = FirstPiece(parameter_groups(task.model))
    batches = [task.train.batch(0), task.train.batch(1)]
    make_gradients(task.model, task.loss, equally(batches), [], split=task.split, first=first)
    norm, share = first.of_whole(task.split)
    return [tuple(json.loads(content)) for content in ranks.gather(json.dumps([float(norm), share]).encode())]


RUN = (
    "trainer.steps=24",
    "trainer.threads=1",
    "trainer.statistics_steps=6",
    "trainer.checkpoint.every_steps=8",
    "trainer.evaluate_every_steps=8",
    "trainer.evaluation_batches=2",
    "trainer.checkpoint.keep=100",
    "trainer.decision_mode=live",
    "trainer.decision_wait_share=0.0",
    "monitor.http=",
)


def train(folder: str, *overrides: str) -> None:
    """A run by the trainer's own process, as `trainer-node train --resume` makes it; nobody predicts."""
    job = TrainerJob(
        run=RunFolder(Path(folder)),
        settings=hybrid_settings(*RUN, *overrides),
        redis_url=f"memory://{folder}",
        resume=True,
    )
    assert run_trainer(job, threading.Event()) == 0


def train_and_resume(whole: str, cut: str, *overrides: str) -> None:
    """The run `whole`; then `cut`, which is it up to step 8, resumed: in processes that are still warm."""
    train(whole, *overrides)
    if os.environ["RANK"] == "0":
        cut_after(whole, cut, step=8)
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]  # the first store may not be gone yet
    train(cut, *overrides)


def cut_after(whole: str, cut: str, *, step: int) -> None:
    """A copy of the run as it was when it had saved this step."""
    shutil.copytree(whole, cut)
    for folder in sealed_folder.folders(RunFolder(Path(cut)).trainer_checkpoints):
        if sealed_folder.age_key(folder.name)[1] > step:
            sealed_folder.remove(folder)
