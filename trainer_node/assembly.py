"""Puts one training job together: task, optimizers, basis, loop. No bus, no files, no terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from common.clock import Clock
from common.errors import EnvironmentFault
from common.messages import DIRECTIONS, Message, RunStarted
from common.settings import RunSettings, TrainerSettings
from common.trying import keeps_directions
from trainer_node.basis import Basis
from trainer_node.cycle import Cycle
from trainer_node.delta import compile_pass
from trainer_node.groups import ParameterGroup, parameter_groups, told_groups
from trainer_node.ledger import Ledger
from trainer_node.links import DecisionSource
from trainer_node.loop import Loop
from trainer_node.memory_report import Report, no_report
from trainer_node.optim.build import build_optimizers, check_library
from trainer_node.out_of_memory import Picture
from trainer_node.prediction import PredictionParts
from trainer_node.read_out import check_read_out
from trainer_node.snapshot import TensorStore, make_store
from trainer_node.split import WHOLE, Split
from trainer_node.tasks import Task, build_task


def choose_device(settings: TrainerSettings) -> torch.device:
    """Raises EnvironmentFault when a GPU is asked for and there is none."""
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise EnvironmentFault("no CUDA device is visible to torch; set trainer.device = auto or cpu")
    return torch.device("cuda" if has_gpu and settings.device != "cpu" else "cpu")


def prepare_task(settings: TrainerSettings) -> Task:
    """Seed, threads, data and model.

    Raises DataError, and SettingsError for an optimizer whose library is not installed, before anything is
    written into a run folder.
    """
    check_library(settings.optimizer)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = choose_device(settings)
    if device.type == "cuda" and settings.memory_fraction > 0.0:
        torch.cuda.set_per_process_memory_fraction(settings.memory_fraction, device)
    return build_task(settings, device)


def build_loop(
    task: Task,
    settings: RunSettings,
    *,
    links: DecisionSource,
    emit: Callable[[Message], None],
    housekeeping: Callable[[Loop], None],
    clock: Clock,
    generation: int,
    snapshot_folder: Path | None,
    report: Report = no_report,
) -> Loop:
    """The loop of a fresh run; where no jump can ever come, without basis and snapshots (common/trying.py).

    `snapshot_folder` also takes the picture of a memory that ran out. Raises SettingsError for an average
    that nobody keeps.
    """
    check_read_out(settings)
    trainer = settings.trainer
    optimizers = build_optimizers(task.model, trainer.optimizer, task.device)
    groups = parameter_groups(task.model)
    parts = prediction_parts(groups, optimizers, trainer, task.device, snapshot_folder, split=task.split)
    return Loop(
        task,
        optimizers,
        groups,
        trainer,
        parts=parts if keeps_directions(settings) else None,
        links=links,
        emit=emit,
        housekeeping=housekeeping,
        ledger=Ledger(clock, counted=trainer.decision_mode == "lockstep"),
        generation=generation,
        picture=Picture(snapshot_folder, task.device),
        report=report,
    )


def prediction_parts(
    groups: list[ParameterGroup],
    optimizers: Sequence[torch.optim.Optimizer],
    trainer: TrainerSettings,
    device: torch.device,
    snapshot_folder: Path | None,
    *,
    split: Split = WHOLE,
) -> PredictionParts:
    """Makes a basis and a store for snapshots, each time anew."""
    new_store = partial(make_store, trainer.checkpoint.snapshot, device, snapshot_folder)

    def parts() -> tuple[Basis, TensorStore]:
        basis = Basis(
            groups,
            optimizers,
            trainer.basis,
            seed=trainer.seed,
            park=new_store(),
            make_history_store=new_store,
            split=split,
        )
        if trainer.compile:
            compile_pass(basis)
        return basis, new_store()

    return parts


def run_started(
    loop: Cycle, *, run_id: str, settings_toml: str, resumed_from: str, feature_version: int
) -> RunStarted:
    return RunStarted(
        run_id=run_id,
        generation=loop.generation,
        resumed_from=resumed_from,
        settings_toml=settings_toml,
        feature_version=feature_version,
        directions=DIRECTIONS,
        groups=told_groups(loop.groups),
        first_step=loop.progress.step,
    )
