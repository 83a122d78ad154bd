"""The recurrent state-space model of a training run: what follows from an action, and with what spread.

After DreamerV3 (Hafner et al., arXiv 2301.04104), small: a GRU of 256, 8 categorical codes of 8 classes with
1 % uniform mix, KL balance 0.5 / 0.1, free bits. One transition (`_advance`) serves observe, imagine and
loss. Owns the network and its loss; data, normalising, optimizer and state belong to world_model.py.

Differences from the paper, on purpose: codes are drawn in training only; live and imagined codes are expected
values, so that arms are compared without sampling noise and an imagined run is differentiable. Free bits are
0.1 nat, not 1: 8x8 codes hold at most 16.6 nats where the paper's 32x32 hold 111.
Shapes: T ticks, B sequences, N arms or rollouts, H hidden, Z codes, M members, K directions, O outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from predictor_node.shared_product import SharedProduct
from predictor_node.symlog import TwoHot

UNIFORM_SHARE = 0.01
DYNAMICS_WEIGHT, REPRESENTATION_WEIGHT, FREE_NATS = 0.5, 0.1, 0.1
FEATURE_WEIGHT = 0.1  # of squared errors summed over the features; keeps 64 of them from drowning the loss
BIN_LIMIT = 7.0  # symlog of a loss change in units of the run's noise: +-1096 of them
BELL_WIDTH = 1.5  # symlog units
ROLLOUT_TICKS = 8  # forecasts are trained to reach this far ahead
ROLLOUT_STRIDE = 4  # an open-loop rollout begins at every fourth tick of a window
JUMP_OFFSET = ROLLOUT_STRIDE  # position of a window's tick that is the first imagined one


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """`features`, `actions` and `directions` come from the data, the rest is a choice."""

    features: int
    actions: int
    directions: int
    hidden: int = 256
    codes: int = 8
    classes: int = 8
    embedding: int = 128
    members: int = 5
    member_width: int = 32
    bins: int = 41
    rollout_ticks: int = ROLLOUT_TICKS

    @property
    def code(self) -> int:
        return self.codes * self.classes

    @property
    def outputs(self) -> int:
        """Of one member: bins of the loss change, drift coefficients, refusal logit."""
        return self.bins + self.directions + 1

    def rollout_starts(self, window_ticks: int) -> range:
        """Ticks of a window from which it is imagined open loop."""
        return range(ROLLOUT_STRIDE - 1, window_ticks - self.rollout_ticks, ROLLOUT_STRIDE)

    def initial(self, count: int) -> Latent:
        """Before the first tick."""
        return Latent(torch.zeros(count, self.hidden), torch.zeros(count, self.code))


class Latent(NamedTuple):
    hidden: Tensor  # (..., H) float32 in [-1, 1]
    code: Tensor  # (..., Z) float32, one-hot or probabilities per code


class Batch(NamedTuple):
    """Windows of ticks, (T, B) each, with trailing sizes where named; float32."""

    features: Tensor  # (T, B, F) normalised
    actions: Tensor  # (T, B, A)
    going_on: Tensor  # (T, B, 1) 0 where a tick is a first one, else 1
    loss: Tensor  # nats, float64 as the next two; NaN = unknown
    reference: Tensor  # nats
    scale: Tensor  # nats
    drift: Tensor  # (T, B, K); NaN = unknown
    refused: Tensor  # NaN = unknown
    bags: Tensor  # (T, B, M) weight of the tick for each member


class ReadOut(NamedTuple):
    """What the members say about the way from one latent to another."""

    loss_logits: Tensor  # (..., M, bins) change of the loss, in scales of the first tick
    drift: Tensor  # (..., M, K)
    refusal_logit: Tensor  # (..., M)


class Affine(nn.Module):
    """x @ weight + bias, drawn from a given generator: the global one is left alone."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = _drawn((inputs, outputs), generator)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return torch.addmm(self.bias, x, self.weight)
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[-2]))


class Rssm(nn.Module):
    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.sizes = sizes
        self.two_hot = TwoHot(sizes.bins, BIN_LIMIT)
        self._floor = torch.tensor(UNIFORM_SHARE / sizes.classes)
        hidden, code, wide = sizes.hidden, sizes.code, sizes.embedding
        self.embed = Affine(sizes.features, wide, generator)
        self.act = Affine(sizes.actions, 3 * hidden, generator)
        self.recur = _drawn((code + hidden, 3 * hidden), generator)
        self.prior_in = Affine(hidden, wide, generator)
        self.prior_out = Affine(wide, code, generator)
        self.posterior_in = _drawn((hidden, wide), generator)
        self.posterior_embed = Affine(wide, wide, generator)
        self.posterior_out = Affine(wide, code, generator)
        self.decode_in = Affine(hidden + code, wide, generator)
        self.decode_out = Affine(wide, sizes.features, generator)
        members = sizes.members * sizes.member_width
        self.head_start = Affine(hidden + code, members, generator)
        self.head_end = Affine(hidden + code, members, generator)
        self.head_weight = _drawn((sizes.members, sizes.member_width, sizes.outputs), generator)
        self.head_bias = nn.Parameter(torch.zeros(sizes.members, 1, sizes.outputs))
        with torch.no_grad():
            self.act.bias[hidden : 2 * hidden] = -1.0  # at first a memory is kept
            self.head_bias[:, :, : sizes.bins] = self.two_hot.bell(BELL_WIDTH)

    def _advance(self, latent: Latent, tick: int, recur: SharedProduct) -> Tensor:
        """The transition: hidden (B, H) of this tick from the latent of the one before.

        A GRU with its reset gate on the candidate's sum and one matrix for code and memory, as DreamerV3's.
        """
        sums = recur(tick, torch.cat((latent.code, latent.hidden), 1))
        reset, update, candidate = sums.split(self.sizes.hidden, 1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(latent.hidden, candidate, torch.sigmoid(update))

    def _probabilities(self, logits: Tensor) -> Tensor:
        """(..., Z) logits -> (..., Z) probabilities, none below UNIFORM_SHARE / classes.

        Z is classes x codes: a softmax along the outer axis is 2.5 times as fast as along the inner.
        """
        shaped = logits.unflatten(-1, (self.sizes.classes, self.sizes.codes))
        return torch.add(self._floor, torch.softmax(shaped, -2), alpha=1.0 - UNIFORM_SHARE).flatten(-2)

    def prior(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., Z): what the code will be, before the tick is seen."""
        return self._probabilities(self.prior_out(F.silu(self.prior_in(hidden))))

    def acted(self, actions: Tensor, going_on: Tensor) -> Tensor:
        """(..., A), (..., 1) -> (..., 3H). What led to a first tick belongs to what was before."""
        return self.act(actions * going_on)

    def encode(self, features: Tensor) -> Tensor:
        """(..., F) normalised -> (..., E)."""
        return F.silu(self.embed(features))

    def evidence(self, features: Tensor) -> Tensor:
        """(..., F) normalised -> (..., E): the part of the posterior that needs no memory."""
        return self.posterior_embed(self.encode(features))

    def draw(self, probabilities: Tensor, noise: Tensor) -> Tensor:
        """One-hot codes; gradients go to the probabilities (straight through). `noise` (..., Z) ~ Exp(1).

        The smallest noise / probability of a code is a draw from it (exponential race).
        """
        shape = (self.sizes.classes, self.sizes.codes)
        race = (probabilities.detach() / noise).unflatten(-1, shape)
        one_hot = (race == race.amax(-2, keepdim=True)).to(race.dtype).flatten(-2)
        return probabilities + (one_hot - probabilities).detach()

    def observe(
        self, latent: Latent, acted: Tensor, evidence: Tensor, going_on: Tensor, noise: Tensor | None = None
    ) -> tuple[Latent, Tensor]:
        """Latents (T, B, ...) and posteriors (T, B, Z) of T ticks that are seen.

        `acted` (T, B, 3H), `evidence` (T, B, E), `going_on` (T, B, 1): a 0 forgets all that was before.
        Codes are drawn with `noise` (T, B, Z), or expected values without.
        """
        recur, weigh = SharedProduct(acted, self.recur), SharedProduct(evidence, self.posterior_in)
        latents, posteriors = [], []
        breaks = (going_on.amin((1, 2)) == 0.0).tolist()
        for tick, has_break in enumerate(breaks):
            if has_break:
                latent = Latent(latent.hidden * going_on[tick], latent.code * going_on[tick])
            hidden = self._advance(latent, tick, recur)
            posterior = self._probabilities(self.posterior_out(F.silu(weigh(tick, hidden))))
            latent = Latent(hidden, posterior if noise is None else self.draw(posterior, noise[tick]))
            latents.append(latent)
            posteriors.append(posterior)
        return Latent(*map(torch.stack, zip(*latents, strict=True))), torch.stack(posteriors)

    def imagine(self, latent: Latent, acted: Tensor) -> Latent:
        """Latents (T, N, ...) of T ticks that nobody saw, from expected priors. `acted` (T, N, 3H)."""
        recur = SharedProduct(acted, self.recur)
        latents = []
        for tick in range(len(acted)):
            hidden = self._advance(latent, tick, recur)
            latent = Latent(hidden, self.prior(hidden))
            latents.append(latent)
        return Latent(*map(torch.stack, zip(*latents, strict=True)))

    def decode(self, latent: Latent) -> Tensor:
        """(..., F) expected normalised features."""
        return self.decode_out(F.silu(self.decode_in(torch.cat(latent, -1))))

    def read_out(self, start: Latent, end: Latent) -> ReadOut:
        """What the members expect of the way from `start` (N, ...) to `end` (..., N, ...)."""
        sizes = self.sizes
        inner = F.silu(self.head_end(torch.cat(end, -1)) + self.head_start(torch.cat(start, -1)))
        by_member = inner.view(-1, sizes.members, sizes.member_width).transpose(0, 1)
        outputs = torch.baddbmm(self.head_bias, by_member, self.head_weight).transpose(0, 1)
        outputs = outputs.unflatten(0, end.hidden.shape[:-1])
        bins, drift, refusal = outputs.split((sizes.bins, sizes.directions, 1), -1)
        return ReadOut(bins, drift, refusal.squeeze(-1))

    def loss(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        """Scalars by name; "total" is what to minimise. `noise` (T, B, Z) ~ Exp(1)."""
        acted = self.acted(batch.actions, batch.going_on)
        start = self.sizes.initial(batch.features.shape[1])
        latents, posterior = self.observe(start, acted, self.evidence(batch.features), batch.going_on, noise)
        prior = self.prior(latents.hidden)
        error = (self.decode(latents) - batch.features).square().sum(-1)
        parts = {
            "dynamics": kl_nats(posterior.detach(), prior).clamp(min=FREE_NATS).mean(),
            "representation": kl_nats(posterior, prior.detach()).clamp(min=FREE_NATS).mean(),
            "features": error.mean(),
            **self._open_loop(batch, latents, acted),
        }
        parts["total"] = (
            DYNAMICS_WEIGHT * parts["dynamics"]
            + REPRESENTATION_WEIGHT * parts["representation"]
            + FEATURE_WEIGHT * (parts["features"] + parts["open_features"])
            + parts["loss_change"]
            + parts["drift"]
            + parts["refusal"]
        )
        return parts

    def _open_loop(self, batch: Batch, latents: Latent, acted: Tensor) -> dict[str, Tensor]:
        """Forecasts 1 to `rollout_ticks` ticks ahead; gradients go through the whole rollout and beyond."""
        ticks = self.sizes.rollout_ticks
        starts_S = torch.tensor(self.sizes.rollout_starts(len(acted)), dtype=torch.int64)
        ahead_CS = starts_S + torch.arange(1, ticks + 1).unsqueeze(1)  # C ticks ahead, S starts

        def laid(x_TB: Tensor) -> Tensor:
            return x_TB[ahead_CS].flatten(1, 2)  # (C, N, ...) with N = S * B

        start = Latent(*(part[starts_S].flatten(0, 1) for part in latents))
        imagined = self.imagine(start, laid(acted))
        said = self.read_out(start, imagined)
        alive = laid(batch.going_on).squeeze(-1).cumprod(0)
        weights = laid(batch.bags) * alive.unsqueeze(-1)
        scale, reference = (x[starts_S].flatten() for x in (batch.scale, batch.reference))
        change = ((laid(batch.loss) - reference) / scale).to(torch.float32)
        code = self.two_hot.encode(change.nan_to_num()).unsqueeze(-2)
        surprise = -(code * said.loss_logits.log_softmax(-1)).sum(-1)
        drift, refused = laid(batch.drift), laid(batch.refused)
        off = F.smooth_l1_loss(
            said.drift, drift.nan_to_num().unsqueeze(-2).expand_as(said.drift), reduction="none"
        )
        wrong = F.binary_cross_entropy_with_logits(
            said.refusal_logit,
            refused.nan_to_num().unsqueeze(-1).expand_as(said.refusal_logit),
            reduction="none",
        )
        error = (self.decode(imagined) - laid(batch.features)).square().sum(-1)
        return {
            "open_features": weighted_mean(error, alive),
            "loss_change": weighted_mean(surprise, weights * change.isfinite().unsqueeze(-1)),
            "drift": weighted_mean(off.sum(-1), weights * drift.isfinite().all(-1, keepdim=True)),
            "refusal": weighted_mean(wrong, weights * refused.isfinite().unsqueeze(-1)),
        }


def kl_nats(p: Tensor, q: Tensor) -> Tensor:
    """(..., Z), (..., Z) -> (...): divergence of q from p, summed over the codes."""
    return (p * (p.log() - q.log())).sum(-1)


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """0 where nothing has weight."""
    return (x * weights).sum() / weights.sum().clamp(min=1e-6)
