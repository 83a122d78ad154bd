"""A fingerprint of tensors: equal bits give equal text; a changed bit changes it.

Per tensor x, read as signed words w_0..w_{n-1}: S1 = sum w_i and S2 = sum (2i+1) w_i, both
modulo 2^64. Odd multipliers are invertible modulo 2^64, so any change of one element is seen for
certain; changes of several cancel in both sums with probability of about 2^-64. Integer sums do
not depend on order, so the result is the same on CPU and GPU and costs two passes and one copy
of 16 bytes per tensor. Not a cryptographic digest: files use SHA-256.
"""

import hashlib
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor

_CHUNK_WORDS = 1 << 18  # bounds the temporary int64 copies to 2 MiB each
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# On the host, for words of up to 32 bits: a product in float64 takes a third of the time of int64, and is
# exact: both sums over a block stay below 2^31 * 1024^2 = 2^51. numpy's, since torch waits for its threads.
_BLOCK_WORDS = 1 << 10
_CHUNK_BLOCKS = 1 << 5  # 256 KiB in float64: stays in the core's own cache


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hex digits over the bits of all tensors, in order. One device synchronisation."""
    by_device: dict[torch.device, list[Tensor]] = {}
    order: list[tuple[torch.device, int]] = []
    for tensor in tensors:
        sums = by_device.setdefault(tensor.device, [])
        order.append((tensor.device, len(sums)))
        sums.append(_sums(tensor.detach()))
    host = {device: torch.stack(sums).cpu().numpy() for device, sums in by_device.items()}
    digest = hashlib.blake2b(digest_size=8)
    for device, position in order:
        digest.update(host[device][position].tobytes())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> Tensor:
    """(2,) int64, where the tensor is."""
    words = tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
    if tensor.device.type == "cpu" and tensor.element_size() < 8:
        return torch.from_numpy(_host_sums(words.numpy()))
    return _word_sums(words)


def _host_sums(words: np.ndarray) -> np.ndarray:
    """(2,) int64 of words of at most 32 bits."""
    whole = words.size // _BLOCK_WORDS * _BLOCK_WORDS
    blocks, factors = words[:whole].reshape(-1, _BLOCK_WORDS), _factors()
    sums = [
        blocks[start : start + _CHUNK_BLOCKS].astype(np.float64) @ factors
        for start in range(0, len(blocks), _CHUNK_BLOCKS)
    ]
    rest = words[whole:]
    sums.append((rest.astype(np.float64) @ factors[: rest.size])[None])
    first, second = np.concatenate(sums).astype(np.int64).T
    # 2 (start + j) + 1 = (2 j + 1) + 2 start: one table of odd numbers serves all blocks.
    starts = np.arange(first.size, dtype=np.int64) * _BLOCK_WORDS
    return np.array([first.sum(), (second + 2 * starts * first).sum()])


def _word_sums(words: Tensor) -> Tensor:
    """(2,) int64 of integers."""
    firsts, seconds = [], []
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64)
        first = chunk.sum()
        firsts.append(first)
        seconds.append((chunk * _odd_numbers(words.device)[: chunk.numel()]).sum() + 2 * start * first)
    if len(firsts) == 1:
        return torch.stack([firsts[0], seconds[0]])
    if not firsts:
        return torch.zeros(2, dtype=torch.int64, device=words.device)
    return torch.stack([torch.stack(firsts).sum(), torch.stack(seconds).sum()])


@cache
def _odd_numbers(device: torch.device) -> Tensor:
    """1, 3, 5, ...: 2 MiB per device."""
    return torch.arange(1, 2 * _CHUNK_WORDS, 2, dtype=torch.int64, device=device)


@cache
def _factors() -> np.ndarray:
    """(block, 2): ones, and 1, 3, 5, ..."""
    odd = np.arange(1, 2 * _BLOCK_WORDS, 2, dtype=np.float64)
    return np.stack([np.ones_like(odd), odd], axis=1)
