"""The world model as a policy uses it: record ticks, learn, keep a latent, imagine arms, save.

Owns the network, its optimizer, the ticks, the normaliser, one random generator and the live latent.
Everything is a function of the calls made and the seed: learning is clocked by `learn`, never by time.
Decides nothing. Bytes: world_model_file.py. The network: rssm.py. The ticks: episodes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common import features
from predictor_node.episodes import NUM_ACTIONS, Episodes, Normaliser, Tick, bags
from predictor_node.rssm import JUMP_OFFSET, ROLLOUT_TICKS, Batch, Latent, Rssm, Sizes
from predictor_node.world_model_file import load_world_model, world_model_to_bytes

PROJECTION_SEED = 20  # the same for all models: the context of a bandit keeps its meaning


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldModelSettings:
    batch: int = 8  # windows of one update
    window_ticks: int = 16
    capacity_ticks: int = 4096
    rate: float = 3e-3
    weight_decay: float = 1e-2
    clip_norm: float = 3.0  # of the whole gradient
    context: int = 16  # numbers in `latent()`

    def __post_init__(self) -> None:
        if self.window_ticks < JUMP_OFFSET + ROLLOUT_TICKS:
            raise ValueError(f"window_ticks must be at least {JUMP_OFFSET + ROLLOUT_TICKS}")


DEFAULTS = WorldModelSettings()


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnReport:
    num_updates: int  # made; fewer than asked for while there are not enough ticks
    skipped: int  # of these, without effect because a gradient was not finite
    losses: Mapping[str, float]  # means over the updates that had an effect; see Rssm.loss


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmForecast:
    """At the last imagined tick of one arm."""

    loss_change: float  # nats, expected, from the reference loss (`WorldModel.reference_loss`)
    spread: float  # one standard deviation of one tick's loss there, nats; disagreement included
    disagreement: float  # of that, what the members do not agree on: shrinks with data
    drift: tuple[float, ...]  # (K) coefficients of the window that ends there
    drift_spread: tuple[float, ...]  # (K) standard deviation over the members
    refusal: float  # probability in [0, 1]


class WorldModel:
    def __init__(
        self,
        num_directions: int,
        seed: int,
        settings: WorldModelSettings = DEFAULTS,
        num_features: int = len(features.NAMES),
    ) -> None:
        """Two models with equal arguments are equal, and stay so under equal calls."""
        self.settings = settings
        self.sizes = Sizes(features=num_features, actions=NUM_ACTIONS, directions=num_directions)
        self._seed = seed
        self.normaliser = Normaliser(num_features)
        self.episodes = Episodes(settings.capacity_ticks, num_features, num_directions)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.live = self.sizes.initial(1)
        self.observed = 0  # ticks that `live` has seen or passed over
        self.updates = 0  # learned since the beginning
        width = self.sizes.hidden + self.sizes.code
        drawn = torch.randn(width, settings.context, generator=torch.Generator().manual_seed(PROJECTION_SEED))
        self._projection = drawn / width**0.5

    @cached_property
    def rssm(self) -> Rssm:
        """Made when first asked for (5 to 9 ms): in a short run of a small job the world model sleeps."""
        with torch.inference_mode(False):  # who asks first may only be looking; learning needs plain tensors
            return Rssm(self.sizes, self._seed)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.rssm.parameters(), lr=self.settings.rate, weight_decay=self.settings.weight_decay, fused=True
        )

    @property
    def reference_loss(self) -> float:
        """Running mean of the loss in nats: what `ArmForecast.loss_change` is counted from."""
        return self.episodes.loss_scale.reference

    @property
    def flops_per_tick(self) -> int:
        """Of `observe_latest` for one tick; a multiplication with its addition counts as two."""
        sizes = self.sizes
        recur = (sizes.actions + sizes.code + sizes.hidden) * 3 * sizes.hidden
        see = sizes.embedding * (sizes.features + sizes.embedding + sizes.hidden + sizes.code)
        return 2 * (recur + see)

    @property
    def flops_per_update(self) -> int:
        """Of one update of `learn`, forward and backward (taken as twice the forward)."""
        sizes, settings = self.sizes, self.settings
        both = sizes.hidden + sizes.code
        prior = sizes.embedding * both
        decode = sizes.embedding * (both + sizes.features)
        recur = (sizes.code + sizes.hidden) * 3 * sizes.hidden
        heads = sizes.members * sizes.member_width * (both + sizes.outputs)
        starts = len(self.sizes.rollout_starts(settings.window_ticks))
        seen = settings.batch * settings.window_ticks * (self.flops_per_tick // 2 + prior + decode)
        imagined = settings.batch * starts * sizes.rollout_ticks * (recur + prior + decode + heads)
        return 6 * (seen + imagined)

    def record(self, tick: Tick) -> None:
        """Keep a tick. A first one makes the live latent forget; only `observe_latest` moves it on."""
        self.normaliser.update(self.episodes.append(tick))
        if self.episodes.newest("is_first"):
            self.live = self.sizes.initial(1)

    def encode(self, encoded_F: np.ndarray) -> Tensor:
        """(F) symlog features -> (1, E): normalise and embed."""
        return self.rssm.encode(torch.tensor(self.normaliser(encoded_F)).unsqueeze(0))

    @torch.inference_mode()
    def observe_latest(self) -> None:
        """Move the live latent on to the newest tick: one GRU step. Without a new tick, nothing.

        Ticks recorded meanwhile without a call are passed over: they are learned from, not remembered.
        """
        if self.observed == self.episodes.appended:
            return
        going_on = torch.full((1, 1, 1), float(not self.episodes.newest("is_first")))
        action = torch.tensor(self.episodes.newest("action")).view(1, 1, -1)
        seen = self.encode(self.episodes.newest("features"))
        evidence = self.rssm.posterior_embed(seen).unsqueeze(0)
        latents, _ = self.rssm.observe(self.live, self.rssm.acted(action, going_on), evidence, going_on)
        self.live = Latent(latents.hidden[0], latents.code[0])
        self.observed = self.episodes.appended

    def learn(self, num_updates: int) -> LearnReport:
        """Updates on replayed windows. Nothing before there are `window_ticks` ticks."""
        if len(self.episodes) < self.settings.window_ticks:
            return LearnReport(num_updates=0, skipped=0, losses={})
        sums: dict[str, float] = {}
        skipped = 0
        for _ in range(num_updates):
            parts = self._update()
            skipped += parts is None
            for name, value in (parts or {}).items():
                sums[name] = sums.get(name, 0.0) + value
        self.updates += num_updates
        made = max(1, num_updates - skipped)
        means = {name: total / made for name, total in sums.items()}
        return LearnReport(num_updates=num_updates, skipped=skipped, losses=means)

    @torch.inference_mode()
    def imagine(self, actions_NTA: np.ndarray) -> tuple[ArmForecast, ...]:
        """One forecast per arm for the end of its T actions, all arms in one batch, from the live latent.

        `actions_NTA`: what is done before each of the T ticks to come; see episodes.ACTION_NAMES.
        """
        num_arms = len(actions_NTA)
        actions_TNA = torch.tensor(actions_NTA, dtype=torch.float32).transpose(0, 1).contiguous()
        start = Latent(*(part.expand(num_arms, -1) for part in self.live))
        imagined = self.rssm.imagine(start, self.rssm.act(actions_TNA))
        return self.read_arms(Latent(imagined.hidden[-1], imagined.code[-1]))

    @torch.inference_mode()
    def read_arms(self, end: Latent) -> tuple[ArmForecast, ...]:
        """Forecasts for the latents (N, ...) at the ends of the arms, counted from the live latent."""
        said = self.rssm.read_out(Latent(*(part.expand(len(end.hidden), -1) for part in self.live)), end)
        scale = self.episodes.loss_scale.scale
        chances_NMb = said.loss_logits.softmax(-1)
        mean_NM = self.rssm.two_hot.mean(chances_NMb)
        disagreement_N = mean_NM.var(-1, correction=0)
        spread_N = (self.rssm.two_hot.variance(chances_NMb).mean(-1) + disagreement_N).sqrt()
        columns = (mean_NM.mean(-1) * scale, spread_N * scale, disagreement_N.sqrt() * scale)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        drift, drift_spread = said.drift.mean(-2).tolist(), said.drift.std(-2, correction=0).tolist()
        refusal = said.refusal_logit.sigmoid().mean(-1).tolist()
        return tuple(
            ArmForecast(
                loss_change=change,
                spread=spread,
                disagreement=disagreement,
                drift=tuple(drift[arm]),
                drift_spread=tuple(drift_spread[arm]),
                refusal=refusal[arm],
            )
            for arm, (change, spread, disagreement) in enumerate(rows)
        )

    @torch.inference_mode()
    def latent(self, *, full: bool = False) -> np.ndarray:
        """float32: (context) fixed random projection of the live latent, or (H + Z) all of it."""
        whole = torch.cat(self.live, -1)
        return (whole if full else whole @ self._projection)[0].numpy().copy()

    def to_bytes(self) -> bytes:
        """safetensors with all that later calls depend on; equal models give equal bytes."""
        return world_model_to_bytes(self)

    @classmethod
    def from_bytes(
        cls,
        content: bytes,
        num_directions: int,
        settings: WorldModelSettings = DEFAULTS,
        num_features: int = len(features.NAMES),
    ) -> WorldModel:
        """Goes on bit for bit. Raises CheckpointError when damaged or made with other sizes."""
        model = cls(num_directions, 0, settings, num_features)
        load_world_model(model, content)
        return model

    def _update(self) -> dict[str, float] | None:
        """One step of the optimizer; the parts of the loss before it, or None when it could not be made."""
        batch, noise = self._draw()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.rssm.loss(batch, noise)
        parts["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.rssm.parameters(), self.settings.clip_norm)
        if not torch.isfinite(norm):
            return None
        self.optimizer.step()
        return dict(zip(parts, torch.stack(tuple(parts.values())).tolist(), strict=True))

    def _draw(self) -> tuple[Batch, Tensor]:
        """Windows and the noise of their codes. torch.tensor copies: aligned memory gives equal bits."""
        count, length = self.settings.batch, self.settings.window_ticks
        uniform = torch.rand(2, count, dtype=torch.float64, generator=self.generator)
        starts_B = self.episodes.starts(uniform.numpy(), length, JUMP_OFFSET)
        columns = self.episodes.windows(starts_B, length)
        is_first_TB = columns["is_first"]
        is_first_TB[0] = True
        noise = torch.empty(length, count, self.sizes.code).exponential_(generator=self.generator)
        batch = Batch(
            features=torch.tensor(self.normaliser(columns["features"])),
            actions=torch.tensor(columns["action"]),
            going_on=torch.tensor(~is_first_TB, dtype=torch.float32).unsqueeze(-1),
            loss=torch.tensor(columns["loss"]),
            reference=torch.tensor(columns["reference"]),
            scale=torch.tensor(columns["scale"]),
            drift=torch.tensor(columns["drift"]),
            refused=torch.tensor(columns["refused"]),
            bags=torch.tensor(bags(columns["serial"], self.sizes.members)),
        )
        return batch, noise
