"""The regression task: batches by position, a teacher that is the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.config import load_settings
from trainer_node.groups import parameter_groups
from trainer_node.model.mlp import INPUTS, OUTPUTS
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.step import mean_loss, train_step
from trainer_node.synthetic import TARGET_NOISE, RegressionBatches, held_out_regression, teacher
from trainer_node.tasks import build_task

CPU = torch.device("cpu")


def batches(seed: int = 0) -> RegressionBatches:
    return RegressionBatches(sequences=64, seed=seed, guard_batches=2, device=CPU)


def test_a_batch_is_a_function_of_seed_and_position() -> None:
    first, again = batches(), batches()
    for position in (7, 0, 7):
        here, there = first.batch(position), again.batch(position)
        assert torch.equal(here.inputs, there.inputs)
        assert torch.equal(here.targets, there.targets)
    assert not torch.equal(batches(0).batch(0).inputs, batches(1).batch(0).inputs)


def test_no_example_is_seen_twice_and_none_of_guard_or_held_out_is_trained_on() -> None:
    train = batches()
    everything = [train.batch(position).inputs for position in range(20)]
    everything += [train.guard(0).inputs, train.guard(1).inputs]
    everything += [batch.inputs for batch in held_out_regression(sequences=64, batches=3, device=CPU)]
    rows = torch.cat(everything)
    assert len(torch.unique(rows, dim=0)) == len(rows) == 25 * 64
    with pytest.raises(IndexError):
        train.guard(2)


def test_targets_are_the_teachers_of_about_unit_variance_with_noise_in_training_only() -> None:
    (held,) = held_out_regression(sequences=4096, batches=1, device=CPU)
    assert held.inputs.shape == (4096, INPUTS)
    assert held.targets.shape == (4096, OUTPUTS)
    assert np.array_equal(held.targets.numpy(), teacher()(held.inputs.numpy()))
    assert 0.9 < float(held.targets.var()) < 1.1
    trained = batches().batch(0)
    noise = trained.targets.numpy() - teacher()(trained.inputs.numpy())
    assert 0.8 * TARGET_NOISE < noise.std() < 1.2 * TARGET_NOISE


def test_the_best_linear_student_is_left_with_a_third_of_the_variance() -> None:
    (held,) = held_out_regression(sequences=4096, batches=1, device=CPU)
    linear = held.inputs @ torch.linalg.lstsq(held.inputs, held.targets).solution
    assert 0.3 < float((linear - held.targets).square().mean()) < 0.4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_task_learns(optimizer: str) -> None:
    small = ["trainer.model.width=32", "trainer.batch.sequences=128", f"trainer.optimizer.name={optimizer}"]
    settings = load_settings(preset="race-regression", overrides=small).trainer
    task = build_task(settings, CPU)
    first = mean_loss(task.model, task.loss, task.validation)
    assert first == pytest.approx(1.0, abs=0.2)
    optimizers, groups = build_optimizers(task.model, settings.optimizer, CPU), parameter_groups(task.model)
    assert len(optimizers) == (2 if optimizer == "muon" else 1)
    set_rates(optimizers, 1.0)
    for step in range(60):
        train_step(task.model, task.loss, [task.train.batch(step)], optimizers, groups, clip_norm=1.0)
    assert mean_loss(task.model, task.loss, task.validation) < 0.6 * first


def test_initial_weights_come_from_the_seed_and_leave_the_global_random_state_alone() -> None:
    settings = load_settings(preset="race-regression").trainer
    torch.manual_seed(9)
    before = torch.get_rng_state()
    left, right = build_task(settings, CPU), build_task(settings, CPU)
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(left.model.parameters(), right.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
