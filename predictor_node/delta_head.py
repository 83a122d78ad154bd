"""The delta head: coefficients G x K for the next proposal, learned from what happened after each window.

For every direction k one ridge regression with forgetting, shared by all groups. Target y[g, k]: the least-
squares coefficient of the window that followed, per reference window, over drifts per reference window.
Inputs x[g, k]: the running mean of y (shrunk to zero while there is little of it), the last y, the
direction's relative norm, the unexplained share, and the latent state through a fixed random projection.
The prior is "the running mean goes on": 20 windows are enough for it, and nothing else is believed before
it has paid. Zero history gives zeros. All that is proposed is inside the trust region. Knows no world model
and no bandit.

G groups, K directions, L inputs, D latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import CheckpointError
from common.messages import DIRECTIONS

FORGETTING = 0.98  # per window: about the last 50 count
MEAN_FORGETTING = 0.95
MEAN_PRIOR = 2.0  # windows of zeros that the running mean starts with
RIDGE, LATENT_RIDGE = 4.0, 20.0  # windows times groups of doubt against anything but the running mean
PROJECTED = 8
PULL_BACK = DIRECTIONS.index("pull_back")
DRIFTS = [DIRECTIONS.index("drift"), DIRECTIONS.index("slow_drift")]  # as long as the window that made them


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """What no proposal leaves. Bounds of a coefficient per window of horizon; pull-back: in all."""

    bound_K: tuple[float, ...] = (16.0, 1.0, 1.0, 1.0)
    norm_share: float = 0.1  # L2 of a group's delta over that of its weights


@dataclass(frozen=True, kw_only=True)
class HeadInput:
    """A decision point as the head sees it."""

    latent_D: np.ndarray
    gram_GKK: np.ndarray
    parameter_norms_G: np.ndarray
    happened_GK: np.ndarray  # of the window that ends here, over the directions of the point before
    unexplained_G: np.ndarray
    window_steps: int


@dataclass(frozen=True, kw_only=True)
class HeadProposal:
    coefficients_GK: np.ndarray
    spread_GK: np.ndarray  # one standard deviation of what will have happened, before any clipping


class DeltaHead:
    def __init__(
        self,
        *,
        num_groups: int,
        latent_size: int,
        window_steps: int,
        seed: int,
        trust: TrustRegion | None = None,
    ) -> None:
        """`window_steps` is the reference that coefficients are scaled to."""
        self.trust = trust or TrustRegion()
        self._bound_K = np.array(self.trust.bound_K, dtype=np.float64)
        self._num_groups, self._window_steps = num_groups, window_steps
        num_directions, num_inputs = len(self._bound_K), 4 + PROJECTED
        rng = np.random.default_rng([seed, 0xDE17A])
        self._projection_DR = rng.standard_normal((latent_size, PROJECTED)) / max(1, latent_size) ** 0.5
        ridge_L = np.full(num_inputs, RIDGE)
        ridge_L[4:] = LATENT_RIDGE
        self._ridge_LL = np.diag(ridge_L)
        self._prior_L = np.eye(num_inputs)[0]
        zeros = np.zeros
        self._state = {
            "squares_KLL": zeros((num_directions, num_inputs, num_inputs)),
            "products_KL": zeros((num_directions, num_inputs)),
            "errors_K2": np.tile([0.0, 1.0], (num_directions, 1)),  # decayed squares, decayed count
            "mean_GK": zeros((num_groups, num_directions)),
            "mean_count": np.array([MEAN_PRIOR]),
            "inputs_GKL": zeros((num_groups, num_directions, num_inputs)),
            "has_inputs": np.zeros(1),
            "former_steps": np.array([float(window_steps)]),  # length of the window that the basis is from
        }
        self._state["errors_K2"][:, 0] = self._bound_K**2  # one window of full doubt

    def observe(self, point: HeadInput, *, weight: float = 1.0) -> None:
        """Learn what happened in the window that ends here; remember the point for the next.

        `weight` is the share that this window counts.
        """
        state, target_GK = self._state, self._target(point)
        if state["has_inputs"][0]:
            explained_G = np.clip(1.0 - np.nan_to_num(point.unexplained_G, nan=1.0), 0.0, 1.0)
            weight_G = weight * explained_G * np.isfinite(point.happened_GK).all(axis=1)
            self._learn(target_GK, weight_G)
            keep = MEAN_FORGETTING
            count = keep * state["mean_count"][0] + weight
            state["mean_GK"] += (target_GK - state["mean_GK"]) * (weight_G / max(count, weight, 1e-12))[
                :, None
            ]
            state["mean_count"][0] = count
        state["inputs_GKL"] = self._inputs(point, target_GK)
        state["has_inputs"][0] = 1.0
        state["former_steps"][0] = point.window_steps

    def propose(self, point: HeadInput, *, horizon_steps: int) -> HeadProposal:
        """For the point last observed. Coefficients are per proposal, not per step: a drift that a long
        window made is that much longer, and gets that much less of a coefficient."""
        windows = horizon_steps / self._window_steps
        reach_K = np.full(len(self._bound_K), windows)
        reach_K[DRIFTS] *= self._window_steps / point.window_steps
        reach_K[PULL_BACK] = min(1.0, windows)  # an average that is reached is not passed
        inputs_GKL = self._state["inputs_GKL"]
        weights_KL, inverse_KLL = self._solve()
        mean_GK = np.einsum("gkl,kl->gk", inputs_GKL, weights_KL)
        leverage_GK = np.einsum("gkl,klm,gkm->gk", inputs_GKL, inverse_KLL, inputs_GKL)
        errors_K2 = self._state["errors_K2"]
        spread_GK = np.sqrt(errors_K2[:, 0] / errors_K2[:, 1] * (1.0 + leverage_GK)) * reach_K
        return HeadProposal(
            coefficients_GK=self.trusted(mean_GK * reach_K, point, reach_K), spread_GK=spread_GK
        )

    def trusted(self, wanted_GK: np.ndarray, point: HeadInput, reach_K: np.ndarray) -> np.ndarray:
        """(G, K) inside the trust region; zeros for a group whose directions are not finite."""
        gram_GKK = np.asarray(point.gram_GKK, dtype=np.float64)
        usable_G = np.isfinite(gram_GKK).all(axis=(1, 2)) & np.isfinite(point.parameter_norms_G)
        gram_GKK = np.where(usable_G[:, None, None], gram_GKK, 0.0)
        bound_K = self._bound_K * reach_K
        chosen_GK = np.clip(np.nan_to_num(wanted_GK, posinf=0.0, neginf=0.0), -bound_K, bound_K)
        chosen_GK = chosen_GK * (np.einsum("gkk->gk", gram_GKK) > 0)
        norm_G = np.sqrt(np.einsum("gk,gkl,gl->g", chosen_GK, gram_GKK, chosen_GK).clip(min=0.0))
        room_G = self.trust.norm_share * np.where(usable_G, point.parameter_norms_G, 0.0)
        scale_G = np.where(norm_G > room_G, room_G / np.where(norm_G > 0, norm_G, 1.0), 1.0)
        return chosen_GK * scale_G[:, None]

    def to_bytes(self) -> bytes:
        """Exact; equal heads give equal bytes (safetensors, float64)."""
        return save({name: np.ascontiguousarray(value) for name, value in self._state.items()})

    def load(self, content: bytes) -> None:
        """The reverse of `to_bytes`. Raises CheckpointError when the state is of another basis or damaged."""
        try:
            found = load(content)
        except SafetensorError as error:
            raise CheckpointError(f"damaged state of the delta head: {error}") from None
        shapes = {name: value.shape for name, value in self._state.items()}
        if {name: value.shape for name, value in found.items()} != shapes:
            raise CheckpointError("the delta head was saved with another basis; start without its state")
        self._state = {name: value.copy() for name, value in found.items()}

    def _target(self, point: HeadInput) -> np.ndarray:
        """(G, K) what happened per reference window, within bounds: two nearly equal directions can get
        huge coefficients of opposite signs."""
        per_window_K = np.full(len(self._bound_K), self._window_steps / point.window_steps)
        per_window_K[DRIFTS] *= self._state["former_steps"][0] / self._window_steps
        return np.clip(np.nan_to_num(point.happened_GK) * per_window_K, -self._bound_K, self._bound_K)

    def _inputs(self, point: HeadInput, target_GK: np.ndarray) -> np.ndarray:
        norms_GK = np.sqrt(np.nan_to_num(np.einsum("gkk->gk", point.gram_GKK), posinf=0.0).clip(min=0.0))
        sizes_G1 = np.nan_to_num(point.parameter_norms_G, posinf=0.0)[:, None]
        relative_GK = np.log10((norms_GK + 1e-9) / (sizes_G1 + 1e-6)).clip(-6.0, 2.0) / 3.0 + 1.0
        latent_R = np.tanh(np.nan_to_num(point.latent_D) @ self._projection_DR)
        known = (
            self._state["mean_GK"] / self._bound_K,
            target_GK / self._bound_K,
            relative_GK,
            np.broadcast_to(np.nan_to_num(point.unexplained_G, nan=1.0)[:, None], target_GK.shape),
        )
        latent_GKR = np.broadcast_to(latent_R, (*target_GK.shape, PROJECTED))
        return np.concatenate([np.stack(known, axis=2), latent_GKR], axis=2)

    def _learn(self, target_GK: np.ndarray, weight_G: np.ndarray) -> None:
        state, inputs_GKL = self._state, self._state["inputs_GKL"]
        scaled_GK = target_GK / self._bound_K
        weights_KL, _ = self._solve(scaled=True)
        errors_GK = (scaled_GK - np.einsum("gkl,kl->gk", inputs_GKL, weights_KL)) * self._bound_K
        squares_K = np.einsum("g,gk->k", weight_G, errors_GK**2)
        state["errors_K2"] = FORGETTING * state["errors_K2"] + np.stack(
            [squares_K, np.full_like(squares_K, weight_G.sum())], axis=1
        )
        state["squares_KLL"] = FORGETTING * state["squares_KLL"] + np.einsum(
            "g,gkl,gkm->klm", weight_G, inputs_GKL, inputs_GKL
        )
        state["products_KL"] = FORGETTING * state["products_KL"] + np.einsum(
            "g,gkl,gk->kl", weight_G, inputs_GKL, scaled_GK
        )

    def _solve(self, *, scaled: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Weights (K, L) of the inputs and the inverse information (K, L, L).

        `scaled` gives coefficients as shares of their bound.
        """
        squares_KLL = self._state["squares_KLL"]
        inverse_KLL = np.linalg.inv(squares_KLL + self._ridge_LL)
        excess_KL = self._state["products_KL"] - squares_KLL @ self._prior_L
        weights_KL = self._prior_L + np.einsum("klm,km->kl", inverse_KLL, excess_KL)
        return (weights_KL if scaled else weights_KL * self._bound_K[:, None]), inverse_KLL
