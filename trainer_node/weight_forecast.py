"""phi, the per-weight forecaster: a small network that maps a weight's own past to its displacement.

A forecaster comes as safetensors bytes from the predictor (PhaseDecision.forecaster), made for one
decision point: horizon, progress, learning rates and all that is known of a group are already in its
biases, so what is left depends on one weight alone. This file validates and applies; it learns nothing.
docs/messages.md has the table; predictor_node/phi_net.py is the same forward pass with gradients.

G groups, J = c - 1 displacements (newest first), H hidden units, I = J + 1 odd inputs. For one weight:

    v_j   = spacing_j d_j                     displacement per mean window
    s     = sqrt(mean_j v_j^2 + (0.1 a_g)^2)  its own scale; a_g = group_scale, never zero
    x     = (v_1 / s, ..., v_J / s, asinh(w / r_g))          odd inputs; r_g = group_size
    sign  = the sign of v_1: a weight and its mirror image have mirrored fates
    u     = relu(bias_g + W_in (sign x, log(s / a_g) clipped to +-6));  u = relu(b + W_hidden u)
    y     = skip_g . x + sign (head . u)
    delta = gain s limit tanh(y / limit)

`pull_back` (G) is for the basis: that share of the way from the weights to their average is added, so
that with 1 the weights land on the forecast average. With head = 0 and a limit far above y it is a linear
combination of the displacements, one row per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from common.errors import SENSELESS

MAX_BYTES = 128 << 10
CHUNK_WEIGHTS = 1 << 16  # bounds the memory of the hidden units: 32 MiB at 64 units, with temporaries
SCALE_FLOOR = 0.1
LOG_SCALE_LIMIT = 6.0


@dataclass(frozen=True)
class WeightForecaster:
    skip_GI: Tensor
    bias_GH: Tensor
    inner_HF: Tensor  # W_in; F = I + 1
    hidden_HH: Tensor
    hidden_bias_H: Tensor
    head_H: Tensor
    spacing_J: Tensor
    group_scale_G: Tensor
    group_size_G: Tensor
    pull_back_G: Tensor
    gain: float
    limit: float

    @torch.no_grad()
    def displacement(self, group: int, weights: Tensor, differences: Sequence[Tensor]) -> Tensor:
        """Forecast displacement of one parameter, shaped and typed like it. Elementwise, in chunks.

        `weights` are the averaged ones; `differences` their J displacements, newest first.
        """
        flat_N = weights.reshape(-1)
        flats = [d.reshape(-1) for d in differences]
        out_N = torch.empty_like(flat_N)
        for start in range(0, len(flat_N), CHUNK_WEIGHTS):
            part = slice(start, start + CHUNK_WEIGHTS)
            past_JN = torch.stack([flat[part].float() for flat in flats])
            out_N[part] = self._of_chunk(group, flat_N[part].float(), past_JN)
        return out_N.reshape(weights.shape)

    def to(self, device: torch.device) -> WeightForecaster:
        moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in vars(self).items()}
        return WeightForecaster(**moved)

    def _of_chunk(self, group: int, weights_N: Tensor, past_JN: Tensor) -> Tensor:
        floor, size = self.group_scale_G[group], self.group_size_G[group]
        velocity_JN = past_JN * self.spacing_J[:, None]
        scale_N = (velocity_JN.square().mean(dim=0) + (SCALE_FLOOR * floor).square()).sqrt()
        odd_IN = torch.cat([velocity_JN / scale_N, torch.asinh(weights_N / size)[None]])
        sign_N = torch.where(velocity_JN[0] < 0, -1.0, 1.0)
        log_scale_N = (scale_N / floor).log().clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)
        inputs_FN = torch.cat([odd_IN * sign_N, log_scale_N[None]])
        units_HN = torch.addmm(self.bias_GH[group][:, None], self.inner_HF, inputs_FN).relu_()
        units_HN = torch.addmm(self.hidden_bias_H[:, None], self.hidden_HH, units_HN).relu_()
        out_N = self.skip_GI[group] @ odd_IN + sign_N * (self.head_H @ units_HN)
        return (out_N / self.limit).tanh_() * (self.limit * self.gain) * scale_N


def read_forecaster(content: bytes, *, num_groups: int, num_differences: int) -> WeightForecaster:
    """Raises ValueError for whatever this trainer cannot apply: size, names, dtype, shapes, non-finite."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"a forecaster of {len(content)} bytes, more than {MAX_BYTES}")
    try:
        tensors = load(content)
    except (SafetensorError, *SENSELESS) as error:
        raise ValueError(f"not a forecaster: {type(error).__name__}") from None
    hidden_units = tensors["head"].numel() if "head" in tensors else 0
    shapes = forecaster_shapes(num_groups, num_differences, hidden_units)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if hidden_units == 0 or found != shapes:
        raise ValueError(f"a forecaster of shapes {found}; this basis needs {shapes}")
    if any(t.dtype != torch.float32 or not bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError("a forecaster must be finite float32")
    if any(bool((tensors[name] <= 0).any()) for name in ("group_scale", "group_size", "limit", "spacing")):
        raise ValueError("scales, sizes, spacings and limit of a forecaster must be positive")
    return WeightForecaster(
        skip_GI=tensors["skip"],
        bias_GH=tensors["bias"],
        inner_HF=tensors["inner"],
        hidden_HH=tensors["hidden"],
        hidden_bias_H=tensors["hidden_bias"],
        head_H=tensors["head"],
        spacing_J=tensors["spacing"],
        group_scale_G=tensors["group_scale"],
        group_size_G=tensors["group_size"],
        pull_back_G=tensors["pull_back"],
        gain=float(tensors["gain"]),
        limit=float(tensors["limit"]),
    )


def forecaster_shapes(num_groups: int, num_differences: int, hidden_units: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that is in a forecaster, all float32."""
    groups, hidden, inputs = num_groups, hidden_units, num_differences + 1
    return {
        "skip": (groups, inputs),
        "bias": (groups, hidden),
        "inner": (hidden, inputs + 1),
        "hidden": (hidden, hidden),
        "hidden_bias": (hidden,),
        "head": (hidden,),
        "spacing": (num_differences,),
        "group_scale": (groups,),
        "group_size": (groups,),
        "pull_back": (groups,),
        "gain": (),
        "limit": (),
    }
