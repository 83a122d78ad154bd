import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from common.config import load_settings
from common.errors import DataError
from common.schedule import rate_factor
from trainer_node import tasks
from trainer_node.groups import parameter_groups
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.step import mean_loss, train_step
from trainer_node.tasks import build_model, build_task

CPU = torch.device("cpu")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        lines = [f"def function_{i}_{j}(x):\n    return x + {j}\n" for j in range(20)]
        (folder / f"{i}.py").write_text("".join(lines))
    return folder


def settings(tmp_path, corpus, *overrides):
    preset = "nano"
    small = [
        f"trainer.data.path='{corpus}'",
        f"trainer.data.cache_dir='{tmp_path / 'cache'}'",
        "trainer.data.validation_share=0.2",
        "trainer.model.layers=2",
        "trainer.model.width=32",
        "trainer.model.context_tokens=16",
        "trainer.model.vocabulary_size=300",
        "trainer.batch.sequences=8",
        "trainer.batch.accumulation=2",
        "trainer.schedule.warmup_steps=5",
    ]
    return load_settings(preset=preset, overrides=[*small, *overrides]).trainer


def train(task, options, steps):
    optimizers = build_optimizers(task.model, options.optimizer, CPU)
    groups = parameter_groups(task.model)
    count = options.batch.accumulation
    for step in range(steps):
        set_rates(optimizers, rate_factor(step, steps, options.schedule))
        batches = [task.train.batch(step * count + i) for i in range(count)]
        train_step(task.model, task.loss, batches, optimizers, groups, clip_norm=1.0)


def test_language_task_learns_held_out_text(tmp_path, corpus):
    options = settings(tmp_path, corpus)
    task = build_task(options, CPU)
    assert (task.unit, task.units_per_step) == ("tokens", 8 * 2 * 16)
    first = mean_loss(task.model, task.loss, task.validation)
    train(task, options, 30)
    assert mean_loss(task.model, task.loss, task.validation) < 0.6 * first
    assert "30 files" not in task.description  # some are held out
    assert task.tokenizer_path.exists()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_digits_task_learns_held_out_images(name):
    options = load_settings(
        preset="digits",
        overrides=[f"trainer.optimizer.name={name}", "trainer.schedule.warmup_steps=5"],
    ).trainer
    task = build_task(options, CPU)
    assert (task.unit, task.units_per_step) == ("images", options.batch.sequences)
    train(task, options, 120)
    assert task.accuracy(task.validation[0]).item() > 0.7
    assert mean_loss(task.model, task.loss, task.validation) < 1.0


def test_digits_are_those_of_scikit_learn_bit_for_bit_with_and_without_its_import(monkeypatch):
    known = load_digits()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sklearn.datasets", None)  # importing it fails
        read = tasks._load_digits()
    monkeypatch.setattr(tasks, "DIGITS_FILE", "moved/elsewhere.csv.gz")
    for images, labels in (read, tasks._load_digits()):
        assert (images.shape, images.dtype, labels.dtype) == ((1797, 1, 8, 8), np.float32, np.int64)
        assert images.tobytes() == (known.images / 16.0).astype(np.float32).tobytes()
        assert labels.tobytes() == known.target.astype(np.int64).tobytes()


def test_held_out_digits_are_in_no_training_batch():
    options = load_settings(preset="digits", overrides=["trainer.seed=3"]).trainer
    task = build_task(options, CPU)
    seen = {batch.numpy().tobytes() for i in range(60) for batch in task.train.batch(i).inputs}
    held = [image.numpy().tobytes() for image in task.validation[0].inputs]
    assert not seen & set(held)
    assert len(held) == round(0.2 * 1797)


def test_weights_follow_the_seed_and_leave_the_global_random_state_alone(tmp_path, corpus):
    states = [torch.get_rng_state()]
    models = [
        build_model(settings(tmp_path, corpus, f"trainer.seed={seed}"), CPU).state_dict()
        for seed in (1, 1, 2)
    ]
    states.append(torch.get_rng_state())
    assert torch.equal(*states)
    weights = [model["embedding.weight"] for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_shapes_depend_on_settings_and_never_on_how_many_merges_the_text_gave(tmp_path, corpus):
    task = build_task(settings(tmp_path, corpus, "trainer.model.vocabulary_size=9000"), CPU)
    assert task.model.embedding.weight.shape == (9000, 32)


def test_text_smaller_than_a_batch_is_an_error_with_numbers(tmp_path, corpus):
    with pytest.raises(
        DataError, match=r"has \d+ tokens, .* need \d+; give more text, or lower trainer.batch"
    ):
        build_task(settings(tmp_path, corpus, "trainer.batch.sequences=4000"), CPU)


def test_missing_data_is_an_error_and_writes_no_cache(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        build_task(settings(tmp_path, tmp_path / "missing"), CPU)
    assert not (tmp_path / "cache").exists()
