"""Tiny real models, data for them, and what a run with prediction left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

# The fixed policy keeps directions in a run of any length, and here it rests: all works, nothing jumps.
RESTING = ("predictor.policy=fixed", "predictor.rest_windows=1000")
QUICK = ("trainer.statistics_steps=16", "trainer.window_steps=8", "trainer.probation_steps=8", *RESTING)
FIXED = (*QUICK, "predictor.rest_windows=0", "predictor.horizon_steps=[8]")
VOCABULARY, CONTEXT, BATCH = 17, 12, 4


def options(folder: Path, settings: tuple[str, ...], **others: Any) -> dict[str, Any]:
    return {"redis": "memory://", "runs_dir": folder / "runs", "settings": settings, **others}


class Counting(Dataset):
    """Sequences that count on modulo VOCABULARY: a next token that can be learned."""

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        start = int(torch.randint(VOCABULARY, (), generator=generator))
        step = int(torch.randint(1, 4, (), generator=generator))
        tokens = (start + step * torch.arange(CONTEXT)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def llama(*, seed: int = 0, **changed: Any) -> nn.Module:
    """Two layers, random weights from a seed, attention dropout: nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        **{**sizes, "num_key_value_heads": 2, "attention_dropout": 0.1, "use_cache": False, **changed},
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def hooks_of(model: nn.Module) -> int:
    kinds = (
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
        "_state_dict_hooks", "_state_dict_pre_hooks",
    )  # fmt: skip
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def hooks_of_optimizer(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(value) for key, value in vars(optimizer).items() if "hooks" in key)


def said(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Messages of one kind in the metrics of all runs of `folder`."""
    lines = [
        json.loads(line)
        for path in sorted((folder / "runs").glob("*/metrics.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line["kind"] == kind]


def verdicts(folder: Path) -> set[str]:
    return {line["verdict"] for line in said(folder, "Outcome")}
