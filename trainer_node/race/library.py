"""Race a model of your own: the arms of a race on whatever `build` makes.

    def build(seed):
        model = Net(); data = load(seed)
        return model, lambda batch: loss(model(batch[0]), batch[1]), data.train_batches, data.held_out_batches

    results = race_model(build, arms=["adamw-decay", "ours"], seeds=range(10), steps=400)

`build` is called once per run, after torch was seeded; it must give the same weights and batches for the same
seed, and a fresh model each time. Makes the runs one after the other in this process; tuning, workers
and reports are those of `trainer-node race`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.config import load_settings
from common.errors import DataError
from common.settings import TrainerSettings
from trainer_node.data import EpochOrder
from trainer_node.race.arms import Pairs, arm_named, run_settings
from trainer_node.race.in_process import PredictorFactory, installed_predictor
from trainer_node.race.run_arm import run_task
from trainer_node.race.run_result import RunKey, RunResult
from trainer_node.tasks import Task

Built = tuple[nn.Module, Callable[[Any], Tensor], Iterable[Any], Iterable[Any]]
BASE_PRESET = "race-regression"  # windows, probation and schedule suit some hundred steps


class ListedBatches:
    """TrainBatches over batches that exist: each epoch in an order of its own, the last ones held back."""

    def __init__(self, batches: Sequence[Any], *, seed: int, guard_batches: int) -> None:
        """Raises DataError without one batch besides the guard's."""
        self._batches, self._trained = batches, len(batches) - guard_batches
        if self._trained < 1:
            raise DataError(
                f"build gave {len(batches)} training batches, the guard holds back {guard_batches}: give more"
            )
        self._order = EpochOrder(self._trained, seed=seed)

    def batch(self, position: int) -> Any:
        ((_, chosen),) = self._order.take(position, 1)
        return self._batches[int(chosen[0])]

    def epoch(self, position: int) -> float:
        return position / self._trained

    def guard(self, index: int) -> Any:
        if not 0 <= index < len(self._batches) - self._trained:
            raise IndexError(f"guard batch {index} of {len(self._batches) - self._trained}")
        return self._batches[self._trained + index]


def race_model(
    build: Callable[[int], Built],
    *,
    arms: Iterable[str],
    seeds: Iterable[int],
    steps: int,
    name: str = "own-model",
    overrides: Iterable[str] = (),
    configs: Mapping[str, Pairs] | None = None,
    eval_every_steps: int | None = None,
    predictor: PredictorFactory = installed_predictor,
) -> list[RunResult]:
    """One run per arm and seed, arms inside seeds. Raises SettingsError, DataError.

    `build(seed)` -> (model, loss_of(batch) -> mean loss (), training batches, held-out batches); iterables
    are listed once, sequences are used as they are. `overrides` are settings for all arms (as `--set`),
    `configs` tuned ones per arm.
    """
    base = load_settings(preset=BASE_PRESET, overrides=overrides)
    chosen, results = [arm_named(arm) for arm in arms], []
    for seed in seeds:
        for arm in chosen:
            config = tuple(sorted((configs or {}).get(arm.name, ())))
            settings = run_settings(arm, base, config, steps=steps, seed=seed)
            task = own_task(build, settings.trainer, name=name)
            key = RunKey(
                task=name, arm=arm.name, config=config, planned_steps=steps, seed=seed, purpose="race"
            )
            result = run_task(key, settings, task, eval_every_steps=eval_every_steps, predictor=predictor)
            results.append(result)
    return results


def own_task(build: Callable[[int], Built], settings: TrainerSettings, *, name: str) -> Task:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model, loss_of, train, held_out = build(settings.seed)
    validation = _listed(held_out)
    if not validation:
        raise DataError("build gave no held-out batches: give at least one")
    return Task(
        name=name,
        description="a model of your own",
        device=next(model.parameters()).device,
        model=model,
        loss=loss_of,
        accuracy=None,
        train=ListedBatches(_listed(train), seed=settings.seed, guard_batches=settings.verify.guard_batches),
        validation=validation,
        unit="batches",
        units_per_step=settings.batch.accumulation,
        tokenizer_path=None,
    )


def _listed(batches: Iterable[Any]) -> Sequence[Any]:
    return batches if isinstance(batches, Sequence) else list(batches)
