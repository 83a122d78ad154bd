"""Parameter groups: which weights share one row of coefficients.

By default one group per module kind (embedding, attention, mlp, norm, head, conv, other) and depth
third (early, middle, late), read off the parameter names. Frozen parameters belong to no group;
tied ones appear once. Decides nothing about learning rates: that is optim/build.py.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.messages import GroupSpec, ParameterSpec

_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|\bln_|\bbn\d*\b")),
    ("head", re.compile(r"(^|\.)(lm_head|head|classifier|output_layer)(\.|$)")),
    ("embedding", re.compile(r"embed|\bwte\b|\bwpe\b")),
    ("attention", re.compile(r"attn|attention|query|key|value|qkv")),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|(^|\.)fc\d*(\.|$)|linear")),
    ("conv", re.compile(r"conv")),
)
_BLOCK_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
# About 107 bytes each with long names, and a message has 256 KiB (common/codec.py).
MAX_TOLD_TENSORS = 1500
_THIRDS = ("early", "middle", "late")


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    name: str
    parameter_names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    def spec(self) -> GroupSpec:
        return GroupSpec(
            name=self.name,
            parameters=tuple(
                ParameterSpec(name=name, shape=tuple(p.shape), dtype=dtype_name(p.dtype))
                for name, p in zip(self.parameter_names, self.parameters, strict=True)
            ),
        )


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """Groups in order of first appearance; every trainable parameter is in exactly one."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    indices = [index for name, _ in named if (index := _block_index(name)) is not None]
    num_blocks = max(indices) + 1 if indices else 0
    members: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        members.setdefault(_group_name(name, num_blocks), []).append((name, parameter))
    return [
        ParameterGroup(group, tuple(n for n, _ in items), tuple(p for _, p in items))
        for group, items in members.items()
    ]


def told_groups(groups: Sequence[ParameterGroup]) -> tuple[GroupSpec, ...]:
    """For RunStarted. Of a model of very many tensors, one entry for all of a group that share a dtype."""
    if sum(len(group.parameters) for group in groups) <= MAX_TOLD_TENSORS:
        return tuple(group.spec() for group in groups)
    return tuple(_in_short(group) for group in groups)


def _in_short(group: ParameterGroup) -> GroupSpec:
    weights: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for parameter in group.parameters:
        weights[dtype_name(parameter.dtype)] += parameter.numel()
        tensors[dtype_name(parameter.dtype)] += 1
    told = [
        ParameterSpec(name=f"{tensors[dtype]} tensors", shape=(count,), dtype=dtype)
        for dtype, count in weights.items()
    ]
    return GroupSpec(name=group.name, parameters=tuple(told))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _block_index(name: str) -> int | None:
    match = _BLOCK_INDEX.search(name)
    return int(match.group(1)) if match else None


def _group_name(name: str, num_blocks: int) -> str:
    kind = next((kind for kind, pattern in _KINDS if pattern.search(name.lower())), "other")
    index = _block_index(name)
    if index is None or num_blocks < len(_THIRDS):
        return kind
    return f"{kind}.{_THIRDS[index * len(_THIRDS) // num_blocks]}"
