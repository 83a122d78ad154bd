"""A world model <-> bytes (safetensors), so that a restored one goes on bit for bit. Never unpickles.

Holds weights, optimizer moments, normaliser, ticks, random generator, live latent and counts. Settings are
the caller's: bytes that do not fit them raise CheckpointError in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.errors import SENSELESS, CheckpointError
from predictor_node.rssm import Latent

if TYPE_CHECKING:
    from predictor_node.world_model import WorldModel

SCHEMA = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def world_model_to_bytes(model: WorldModel) -> bytes:
    """Equal models give equal bytes."""
    normaliser = model.normaliser
    tensors = {f"weights.{name}": p.detach() for name, p in model.rssm.named_parameters()}
    for name, p in model.rssm.named_parameters():
        moments = model.optimizer.state.get(p, {})
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = moments.get(moment, torch.zeros_like(p)).detach()
    tensors |= {f"ticks.{name}": torch.tensor(array) for name, array in model.episodes.to_arrays().items()}
    counts = (SCHEMA, model.observed, model.updates, _optimizer_steps(model), normaliser.count)
    tensors |= {
        "counts": torch.tensor(counts, dtype=torch.int64),
        "normaliser.mean": torch.tensor(normaliser.mean_F),
        "normaliser.squares": torch.tensor(normaliser.squares_F),
        "generator": model.generator.get_state(),
        "live.hidden": model.live.hidden.clone(),
        "live.code": model.live.code.clone(),
    }
    return save(tensors)


def load_world_model(model: WorldModel, content: bytes) -> None:
    """Take over everything; `model` must have been made with the same settings. Raises CheckpointError.

    After an error the model is spoilt: make a new one.
    """
    try:
        tensors = load(content)
    except (SafetensorError, *SENSELESS) as error:
        raise CheckpointError(f"world model: not safetensors: {error}") from None
    _check(model, tensors)
    _, observed, updates, optimizer_steps, normalised = tensors["counts"].tolist()
    with torch.no_grad():
        for name, p in model.rssm.named_parameters():
            p.copy_(tensors[f"weights.{name}"])
            if optimizer_steps:
                model.optimizer.state[p] = {
                    "step": torch.tensor(float(optimizer_steps)),
                    **{moment: tensors[f"{moment}.{name}"].clone() for moment in _MOMENTS},
                }
    arrays = {name[6:]: tensor.numpy() for name, tensor in tensors.items() if name.startswith("ticks.")}
    model.episodes.load_arrays(arrays)
    model.normaliser.load(
        normalised, tensors["normaliser.mean"].numpy(), tensors["normaliser.squares"].numpy()
    )
    model.live = Latent(tensors["live.hidden"].clone(), tensors["live.code"].clone())
    model.observed, model.updates = observed, updates
    try:
        model.generator.set_state(tensors["generator"].clone())
    except RuntimeError as error:
        raise CheckpointError(f"world model: random generator: {error}") from None


def _optimizer_steps(model: WorldModel) -> int:
    first = next(model.rssm.parameters())
    return int(model.optimizer.state[first]["step"]) if first in model.optimizer.state else 0


def _check(model: WorldModel, tensors: Mapping[str, Tensor]) -> None:
    """Names, types, shapes and finite numbers; the ticks check themselves."""
    expected = {
        f"{kind}.{name}": p for kind in ("weights", *_MOMENTS) for name, p in model.rssm.named_parameters()
    }
    zeros_F = torch.tensor(model.normaliser.mean_F)
    expected |= {"counts": torch.zeros(5, dtype=torch.int64), "generator": model.generator.get_state()}
    expected |= {"normaliser.mean": zeros_F, "normaliser.squares": zeros_F}
    expected |= {"live.hidden": model.live.hidden, "live.code": model.live.code}
    names = {name for name in tensors if not name.startswith("ticks.")}
    if names != set(expected):
        raise CheckpointError(f"world model: other parts than expected: {sorted(names ^ set(expected))[:3]}")
    for name, like in expected.items():
        given = tensors[name]
        if given.shape != like.shape or given.dtype != like.dtype:
            raise CheckpointError(f"world model: {name} is {given.dtype} {tuple(given.shape)}")
        if given.is_floating_point() and not bool(torch.isfinite(given).all()):
            raise CheckpointError(f"world model: {name} holds a number that is not finite")
    counts = tensors["counts"].tolist()
    if counts[0] != SCHEMA or min(counts) < 0:
        raise CheckpointError(f"world model: schema {counts[0]}, this version reads {SCHEMA}")
    if not bool((tensors["normaliser.squares"] >= 0.0).all()):
        raise CheckpointError("world model: a variance below zero")
