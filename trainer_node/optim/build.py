"""Optimizers from settings: which one, which parameters it gets, and their rates.

Routing: with `muon`, every hidden matrix (2-D, in no embedding and no head group) goes to
torch.optim.Muon; all the rest goes to AdamW, convolutions included, since Muon in torch takes matrices only.
Any other optimizer takes all parameters. Weight decay acts on tensors of two and more dimensions and is
decoupled, but for SGD, where it is L2. Every group carries `peak_rate`; `set_rates` multiplies it with the
schedule's factor. Lion is pytorch_optimizer's and 8-bit AdamW is bitsandbytes': both optional.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import SettingsError
from common.settings import OptimizerSettings
from trainer_node.groups import parameter_groups

# Keller Jordan's scaling: rate * sqrt(max(1, rows / columns)); the settings' muon_rate is meant for it.
MUON_SCALING = "original"
LIBRARIES: Mapping[str, str] = {"adamw8bit": "bitsandbytes", "lion": "pytorch_optimizer"}
_NOT_HIDDEN = ("embedding", "head")


def check_library(settings: OptimizerSettings) -> None:
    """Imports nothing. Raises SettingsError when the optimizer's library is not installed."""
    library = LIBRARIES.get(settings.name)
    if library is not None and find_spec(library) is None:
        raise _missing(settings.name, library)


def build_optimizers(
    model: nn.Module, settings: OptimizerSettings, device: torch.device
) -> list[torch.optim.Optimizer]:
    """One or two optimizers; each trainable parameter is in exactly one group of one of them.

    Raises SettingsError when the optimizer's library is not installed.
    """
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for group in parameter_groups(model):
        is_hidden = group.name.split(".")[0] not in _NOT_HIDDEN
        for parameter in group.parameters:
            if settings.name == "muon" and is_hidden and parameter.ndim == 2:
                hidden.append(parameter)
            else:
                (decayed if parameter.ndim >= 2 else plain).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(_muon(hidden, settings))
    if decayed or plain:
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay, "peak_rate": settings.rate},
            {"params": plain, "weight_decay": 0.0, "peak_rate": settings.rate},
        ]
        make = _MAKERS[settings.name]
        optimizers.append(make([group for group in groups if group["params"]], settings, device))
    return optimizers


def set_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Learning rate = peak rate x factor, in every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["peak_rate"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # a compiled or captured step has this very tensor
            else:
                group["lr"] = rate


Groups = list[dict[str, Any]]


def _muon(hidden: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Muon:
    optimizer = torch.optim.Muon(
        hidden,
        lr=settings.muon_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
        nesterov=True,
        adjust_lr_fn=MUON_SCALING,
    )
    for group in optimizer.param_groups:
        group["peak_rate"] = settings.muon_rate
    return optimizer


def _adamw(groups: Groups, settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    betas, fused = (settings.beta1, settings.beta2), device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=settings.rate, betas=betas, fused=fused)


def _sgd(groups: Groups, settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups,
        lr=settings.rate,
        momentum=settings.beta1,
        nesterov=settings.nesterov and settings.beta1 > 0.0,  # which torch refuses without momentum
        # Not on a CPU: its bf16 directions were once not equal to themselves there (NaN), never seen again.
        fused=device.type == "cuda",
    )


def _lion(groups: Groups, settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    betas = (settings.beta1, settings.beta2)
    made: torch.optim.Optimizer = _library("lion").Lion(groups, lr=settings.rate, betas=betas)
    return made


def _adamw_8bit(groups: Groups, settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    # Its import warns, on CPUs with AVX-512, of a kernel for 4-bit inference: of no use here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    betas = (settings.beta1, settings.beta2)
    made: torch.optim.Optimizer = _library("adamw8bit").AdamW8bit(groups, lr=settings.rate, betas=betas)
    return made


_MAKERS: Mapping[str, Callable[[Groups, OptimizerSettings, torch.device], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw_8bit,
    "lion": _lion,
    "muon": _adamw,  # of what Muon leaves
    "sgd": _sgd,
}


def _library(name: str) -> ModuleType:
    try:
        if name == "lion":
            import pytorch_optimizer

            return pytorch_optimizer
        import bitsandbytes.optim

        return bitsandbytes.optim
    except ImportError:
        raise _missing(name, LIBRARIES[name]) from None


def _missing(name: str, library: str) -> SettingsError:
    return SettingsError(
        f"trainer.optimizer.name = {name} needs the library {library}:"
        " pip install 'hybrid-predict-trainer[optimizers]'"
    )
