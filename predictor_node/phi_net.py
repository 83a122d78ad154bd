"""phi as a network: the forward pass with gradients, and its export for one decision point.

The same function as trainer_node/weight_forecast.py, which has the formula and the table of an exported
forecaster (tests/predictor/test_phi.py holds the two equal). Here the biases still depend on context:

    skip_g = skip + skip_group_g + skip_context z_g      bias_g = bias + bias_group_g + bias_context z_g

with z_g (C) what is known at a decision point: horizon, progress, rates, pace and straightness of a group's
past. Starts as the zero forecast. Owns no data, no history and no optimizer.

P pairs (a base and a later end), J displacements newest first, G groups, N weights, I = J + 1 odd inputs,
F = I + 1 inputs, H hidden units, C context numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor, nn

SCALE_FLOOR = 0.1
LOG_SCALE_LIMIT = 6.0
LIMIT = 10.0  # soft, in units of scale times gain: a run of a straight line over 100 windows
CONTEXT = ("log2_horizon", "progress", "rate", "log_rate_ratio", "log10_pace", "straightness")
TINY = 1e-12
MIN_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Past:
    """What is known of P bases, before a horizon is chosen. Padding is zero."""

    velocity_PJGN: Tensor  # displacement per mean window, newest first
    weights_PGN: Tensor
    valid_GN: Tensor  # bool; False is padding
    spacing_PJ: Tensor  # mean window steps / steps of that window
    rate_P: Tensor  # learning-rate factor of the newest window
    progress_P: Tensor  # share of the run's steps done


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """The horizons of P forecasts."""

    windows_P: Tensor  # of the base's mean length, > 0
    rate_P: Tensor  # mean learning-rate factor until then


class PhiNet(nn.Module):
    def __init__(self, *, num_groups: int, num_differences: int, hidden_units: int, seed: int) -> None:
        super().__init__()
        odd, units, context = num_differences + 1, hidden_units, len(CONTEXT)
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=random) * math.sqrt(2.0 / inputs))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        self.skip, self.skip_group, self.skip_context = (
            zeros(odd),
            zeros(num_groups, odd),
            zeros(odd, context),
        )
        self.bias, self.bias_group = zeros(units), zeros(num_groups, units)
        self.bias_context = normal(units, context, inputs=2 * context)
        self.inner = normal(units, odd + 1, inputs=odd + 1)
        self.hidden, self.hidden_bias = normal(units, units, inputs=units), zeros(units)
        self.head = zeros(units)

    def forward(self, past: Past, ahead: Ahead) -> Tensor:
        """(P, G, N) displacements in units of `scale_of(past)` times `gain_of(past, ahead)`."""
        floor_PG, size_PG = group_scale_of(past), group_size_of(past)
        scale_PGN = scale_of(past)
        value_PGN = torch.asinh(past.weights_PGN / size_PG[..., None])
        odd_PIGN = torch.cat([past.velocity_PJGN / scale_PGN[:, None], value_PGN[:, None]], dim=1)
        sign_PGN = torch.where(past.velocity_PJGN[:, 0] < 0, -1.0, 1.0)
        log_scale_PGN = (scale_PGN / floor_PG[..., None]).log().clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)
        inputs_PFGN = torch.cat([odd_PIGN * sign_PGN[:, None], log_scale_PGN[:, None]], dim=1)
        skip_PGI, bias_PGH = self.folded(past, ahead)
        units_PGNH = torch.einsum("hf,pfgn->pgnh", self.inner, inputs_PFGN) + bias_PGH[:, :, None]
        units_PGNH = torch.relu(torch.relu(units_PGNH) @ self.hidden.T + self.hidden_bias)
        out_PGN = torch.einsum("pgi,pign->pgn", skip_PGI, odd_PIGN) + sign_PGN * (units_PGNH @ self.head)
        return LIMIT * (out_PGN / LIMIT).tanh()

    def folded(self, past: Past, ahead: Ahead) -> tuple[Tensor, Tensor]:
        """What the context makes of skip (P, G, I) and bias (P, G, H)."""
        context_PGC = context_of(past, ahead)
        skip_PGI = self.skip + self.skip_group + context_PGC @ self.skip_context.T
        return skip_PGI, self.bias + self.bias_group + context_PGC @ self.bias_context.T

    @torch.no_grad()
    def displacement(self, past: Past, ahead: Ahead) -> Tensor:
        """(P, G, N) forecast displacements; zero where there is padding."""
        unit_PGN = scale_of(past) * gain_of(past, ahead)[:, None, None]
        return self(past, ahead) * unit_PGN * past.valid_GN

    @torch.no_grad()
    def export(self, past: Past, ahead: Ahead, *, pull_back: float) -> bytes:
        """The forecaster for one base and one horizon (P = 1), as the trainer reads it."""
        skip_PGI, bias_PGH = self.folded(past, ahead)
        tensors = {
            "skip": skip_PGI[0],
            "bias": bias_PGH[0],
            "inner": self.inner,
            "hidden": self.hidden,
            "hidden_bias": self.hidden_bias,
            "head": self.head,
            "spacing": past.spacing_PJ[0],
            "group_scale": group_scale_of(past)[0],
            "group_size": group_size_of(past)[0],
            "pull_back": torch.full((self.skip_group.shape[0],), pull_back),
            "gain": gain_of(past, ahead)[0],
            "limit": torch.tensor(LIMIT),
        }
        return save({name: t.detach().float().contiguous().clone() for name, t in tensors.items()})


def group_scale_of(past: Past) -> Tensor:
    """(P, G) root mean square of all velocities of a group."""
    return _mean_over_group(past, past.velocity_PJGN.square().mean(dim=1)).sqrt().clamp(min=TINY)


def group_size_of(past: Past) -> Tensor:
    """(P, G) root mean square of a group's weights."""
    return _mean_over_group(past, past.weights_PGN.square()).sqrt().clamp(min=TINY)


def scale_of(past: Past) -> Tensor:
    """(P, G, N) the scale of each weight's past."""
    floor_PG1 = SCALE_FLOOR * group_scale_of(past)[..., None]
    return (past.velocity_PJGN.square().mean(dim=1) + floor_PG1.square()).sqrt()


def gain_of(past: Past, ahead: Ahead) -> Tensor:
    """(P) how displacements grow with the horizon: between a walk (root) and a line, times the rates' ratio.

    A first guess that spares the network a range of magnitudes; the rest it learns from the context.
    """
    return ahead.windows_P.sqrt() * _log_rate_ratio(past, ahead).exp()


def context_of(past: Past, ahead: Ahead) -> Tensor:
    """(P, G, C) see CONTEXT; all of order one."""
    scale_PG = group_scale_of(past)
    pace_PG = (scale_PG / group_size_of(past)).clamp(min=1e-6).log10() / 3.0
    mean_PGN = past.velocity_PJGN.mean(dim=1)
    straight_PG = _mean_over_group(past, mean_PGN.square()).sqrt() / scale_PG
    per_pair = (
        ahead.windows_P.log2() / 4.0,
        past.progress_P,
        past.rate_P,
        _log_rate_ratio(past, ahead),
    )
    shared_PGC = torch.stack(per_pair, dim=1)[:, None].expand(-1, scale_PG.shape[1], -1)
    return torch.cat([shared_PGC, pace_PG[..., None], straight_PG[..., None]], dim=2)


def _log_rate_ratio(past: Past, ahead: Ahead) -> Tensor:
    ratio_P = ahead.rate_P.clamp(min=MIN_RATE) / past.rate_P.clamp(min=MIN_RATE)
    return ratio_P.log().clamp(-3.0, 3.0)


def _mean_over_group(past: Past, values_PGN: Tensor) -> Tensor:
    return values_PGN.sum(dim=2) / past.valid_GN.sum(dim=1)
