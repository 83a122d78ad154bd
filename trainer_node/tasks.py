"""The three built-in tasks. A Task is everything the loop knows of what is being learned.

language: a GPT on the user's text. digits: a CNN on scikit-learn's 8 x 8 digits, so that nothing in the
loop assumes text. regression: an MLP on a synthetic teacher, the one task whose data never ends. Builds
models and data from settings; initial weights come from `settings.seed` and leave torch's global
random state alone. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.control_rules import any_on
from common.errors import DataError, SettingsError
from common.settings import ModelSettings, TrainerSettings
from trainer_node.corpus import collect
from trainer_node.data import Batch, HeldOutText, ImageBatches, TextBatches, TrainBatches, place
from trainer_node.model.cnn import DigitsCNN
from trainer_node.model.gpt import GPT
from trainer_node.model.mlp import RegressionMLP
from trainer_node.split import WHOLE, Split
from trainer_node.synthetic import RegressionBatches, held_out_regression
from trainer_node.tokens import END_TOKEN, prepare_tokens

DIGITS_SPLIT_SEED = 0  # the held-out digits are the same in every run
SHAPES = 64  # for which a model is compiled at most; beyond that torch runs it as it is. Its default is 8
DIGITS_FILE = "datasets/data/digits.csv.gz"  # inside scikit-learn


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    description: str  # one line for people
    device: torch.device
    model: nn.Module
    loss: Callable[[Batch], Tensor]  # mean of a micro-batch, () nats per unit; regression: squared error
    accuracy: Callable[[Batch], Tensor] | None  # () share of right answers in [0, 1]
    logits: Callable[[Tensor], Tensor] | None = None  # inputs -> (..., classes); None: there are no classes
    train: TrainBatches
    validation: Sequence[Batch]  # fixed held-out batches of equal size
    unit: str  # what units_per_step counts: "tokens", "images", "examples"
    units_per_step: int
    tokenizer_path: Path | None
    split: Split = WHOLE  # of model and batches among ranks (parallel.py); loss and batches are this rank's


def build_task(settings: TrainerSettings, device: torch.device) -> Task:
    """Raises DataError for the user's data, EnvironmentFault for the disk, SettingsError as build_model."""
    builders = {"language": language_task, "digits": digits_task, "regression": regression_task}
    return builders[settings.task](settings, device)


def build_model(settings: TrainerSettings, device: torch.device) -> nn.Module:
    """Freshly initialised; its shapes depend on the settings alone, never on the data.

    Raises SettingsError for a packing by document of what has none.
    """
    document_token = END_TOKEN if settings.data.packing == "document" else None
    if document_token is not None and settings.task != "language":
        raise SettingsError(
            f"trainer.data.packing = document: task {settings.task} has no documents; leave it at stream"
        )
    kinds: dict[str, Callable[[ModelSettings], nn.Module]] = {
        "language": partial(GPT, document_token=document_token),
        "digits": DigitsCNN,
        "regression": RegressionMLP,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = kinds[settings.task](settings.model)
    return model.to(device)


def language_task(settings: TrainerSettings, device: torch.device) -> Task:
    data, batch, context = settings.data, settings.batch, settings.model.context_tokens
    corpus = collect(data.path, data.suffixes, data.max_bytes)
    is_packed = data.packing == "document"
    if is_packed and len(corpus.documents) == 1:
        raise DataError(
            f"{corpus.source}: is one document, and trainer.data.packing = document keeps documents apart;"
            " give --data a folder of files or set it to stream"
        )
    tokens = prepare_tokens(
        corpus,
        vocabulary_size=settings.model.vocabulary_size,
        cache_dir=data.cache_dir,
        validation_share=data.validation_share,
    )
    model = _compiled(build_model(settings, device), settings, device)
    train, held_out = tokens.sidecar.train, tokens.sidecar.validation
    return Task(
        name="language",
        description=f"{corpus.source}: {train.documents} files, {train.tokens:,} tokens;"
        f" held out: {held_out.documents} files, {held_out.tokens:,} tokens"
        + ("; each file sees itself alone" if is_packed else ""),
        device=device,
        model=model,
        loss=lambda batch: model(batch.inputs, batch.targets),
        accuracy=None,
        logits=lambda inputs: model(inputs),
        train=TextBatches(
            tokens.train,
            sequences=batch.sequences,
            context_tokens=context,
            seed=settings.seed,
            guard_batches=settings.verify.guard_batches,
            device=device,
        ),
        validation=HeldOutText(
            tokens.validation,
            sequences=batch.sequences,
            context_tokens=context,
            batches=settings.evaluation_batches,
            device=device,
        ),
        unit="tokens",
        units_per_step=batch.sequences * batch.accumulation * context,
        tokenizer_path=tokens.tokenizer_path,
    )


def digits_task(settings: TrainerSettings, device: torch.device) -> Task:
    """All held-out images are one batch; `evaluation_batches` and the text settings do not apply."""
    images, labels = _load_digits()
    order = np.random.default_rng(DIGITS_SPLIT_SEED).permutation(len(images))
    held = order[: max(1, round(settings.data.validation_share * len(images)))]
    kept = order[len(held) :]
    model = _compiled(build_model(settings, device), settings, device)
    return Task(
        name="digits",
        description=f"scikit-learn's digits: {len(kept)} images; held out: {len(held)}",
        device=device,
        model=model,
        loss=lambda batch: model(batch.inputs, batch.targets),
        accuracy=lambda batch: (model(batch.inputs).argmax(-1) == batch.targets).float().mean(),
        logits=lambda inputs: model(inputs),
        train=ImageBatches(
            images[kept],
            labels[kept],
            sequences=settings.batch.sequences,
            seed=settings.seed,
            guard_batches=settings.verify.guard_batches,
            device=device,
        ),
        validation=(Batch(place(images[held], device), place(labels[held], device)),),
        unit="images",
        units_per_step=settings.batch.sequences * settings.batch.accumulation,
        tokenizer_path=None,
    )


def regression_task(settings: TrainerSettings, device: torch.device) -> Task:
    """The settings of data do not apply."""
    model = _compiled(build_model(settings, device), settings, device)
    sequences = settings.batch.sequences
    return Task(
        name="regression",
        description="a fixed random teacher: fresh examples in every batch, held-out ones without noise",
        device=device,
        model=model,
        loss=lambda batch: model(batch.inputs, batch.targets),
        accuracy=None,
        train=RegressionBatches(
            sequences=sequences,
            seed=settings.seed,
            guard_batches=settings.verify.guard_batches,
            device=device,
        ),
        validation=held_out_regression(
            sequences=sequences, batches=settings.evaluation_batches, device=device
        ),
        unit="examples",
        units_per_step=sequences * settings.batch.accumulation,
        tokenizer_path=None,
    )


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 1, 8, 8) float32 in [0, 1] and labels (1797,) int64."""
    package = find_spec("sklearn")
    file = Path(package.origin if package and package.origin else "").parent / DIGITS_FILE
    if file.is_file():  # 0.01 s; the import takes 1.05 s of CPU in every process (2026-11-21)
        rows = np.loadtxt(file, delimiter=",")
        pixels, labels = rows[:, :-1], rows[:, -1]
    else:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
    return (pixels.reshape(-1, 1, 8, 8) / 16.0).astype(np.float32), labels.astype(np.int64)


def _compiled(model: nn.Module, settings: TrainerSettings, device: torch.device) -> nn.Module:
    if settings.compile and device.type == "cuda":
        # Batches of other shapes, which controls may bring, get kernels of their own. By default torch makes
        # one for any shape at the second and takes that for the first shape too, from then on (2.13): other
        # digits after a trial that was set back, and slower.
        has_controls = any_on(settings.controls)
        if has_controls:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
        model.compile(dynamic=False if has_controls else None)  # in place: the parameters keep their names
    return model
