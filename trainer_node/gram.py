"""Inner products of directions, group by group, and least squares from them. G groups, K directions.

Owns the arithmetic only: which directions there are, and what the results mean, is basis.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FLUSH_WEIGHTS = 1 << 20  # rows waiting for their product; bounds the extra memory to 16 (K + 1) MiB
RELATIVE_RANK = 1e-6  # of normalised directions; a smaller singular value is noise


class GroupGram:
    """(G, K, K) sums of row products, one matrix product per group instead of K*K/2 dots per parameter."""

    def __init__(self, num_groups: int, num_rows: int, device: torch.device) -> None:
        self._gram_GKK = torch.zeros(num_groups, num_rows, num_rows, device=device)
        self._waiting: dict[int, list[Tensor]] = {}
        self._waiting_weights = 0

    def add(self, group: int, flats: Sequence[Tensor]) -> None:
        """One flat float32 tensor per row: the part of the rows that one parameter makes up."""
        for start in range(0, len(flats[0]), FLUSH_WEIGHTS):
            rows_KN = torch.stack([flat[start : start + FLUSH_WEIGHTS] for flat in flats])
            self._waiting.setdefault(group, []).append(rows_KN)
            self._waiting_weights += rows_KN.shape[1]
            if self._waiting_weights >= FLUSH_WEIGHTS:
                self._flush()

    def result(self) -> Tensor:
        """(G, K, K) float32, symmetric to the bit."""
        self._flush()
        lower_GKK = self._gram_GKK.tril()
        return lower_GKK + lower_GKK.tril(-1).transpose(1, 2)

    def _flush(self) -> None:
        for group, parts in self._waiting.items():
            rows_KN = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            self._gram_GKK[group].addmm_(rows_KN, rows_KN.T)
        self._waiting, self._waiting_weights = {}, 0


def least_squares(basis_GKm: Tensor, target_Gm: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (G, K) of the target over the basis, and the unexplained share (G) in [0, 1].

    basis (G, K, m) and target (G, m) of one device and dtype; results are float64.
    A group whose target is zero, or with anything non-finite, gets zeros and explains nothing. By the
    normal equations of normalised directions in float64: four columns need no decomposition of m rows.
    """
    num_groups, num_directions, _ = basis_GKm.shape
    coefficients_GK, unexplained_G = np.zeros((num_groups, num_directions)), np.ones(num_groups)
    rows_GLm = torch.cat([basis_GKm, target_Gm[:, None]], dim=1).double()
    products_GLL = torch.bmm(rows_GLm, rows_GLm.transpose(1, 2)).cpu().numpy()
    usable = np.isfinite(products_GLL).all(axis=(1, 2)) & (products_GLL[:, -1, -1] > 0)
    if not usable.any():
        return coefficients_GK, unexplained_G
    norms_UK = np.sqrt(np.einsum("ukk->uk", products_GLL[usable, :-1, :-1]))
    scale_UK = np.where(norms_UK > 0, norms_UK, 1.0)
    gram_UKK = products_GLL[usable, :-1, :-1] / (scale_UK[:, :, None] * scale_UK[:, None, :])
    values_UK, vectors_UKK = np.linalg.eigh(gram_UKK)
    kept_UK = values_UK > np.maximum(values_UK[:, -1:], 0.0) * RELATIVE_RANK**2
    inverse_UK = np.where(kept_UK, 1.0 / np.where(kept_UK, values_UK, 1.0), 0.0)
    along_UK = products_GLL[usable, :-1, -1] / scale_UK
    solution_UK = np.einsum("uki,ui,uji,uj->uk", vectors_UKK, inverse_UK, vectors_UKK, along_UK)
    total_U = products_GLL[usable, -1, -1]
    explained_U = np.einsum("uk,uk->u", solution_UK, along_UK)
    coefficients_GK[usable] = solution_UK / scale_UK
    unexplained_G[usable] = np.clip(1.0 - explained_U / total_U, 0.0, 1.0)
    return coefficients_GK, unexplained_G
