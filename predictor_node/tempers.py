"""How much the learned policy may risk: three ready-made answers, after the original's three presets.

The original's numbers (docs/parity.md, row 64: warm-up 200 / 100 / 50 steps, longest PREDICT 25 / 40 / 80)
are kept where they have a meaning here, to the nearest of our horizons; budget and trust region are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.trying import EXPLORATION_SHARES


@dataclass(frozen=True, kw_only=True, slots=True)
class Temper:
    first_step: int  # no proposal before this step, or a tenth of the run where that is less
    first_share: float  # nor before this share of the steps before the decay: early gains are gone at the end
    max_horizon_steps: int  # of a proposal, before confidence shortens it
    max_refusal: float  # forecast probability of a refusal above which an arm is not tried
    exploration_share: float  # of the run's forward-equivalents that trying may cost on balance
    optimism: float  # alpha of LinUCB
    trust_norm: float  # norm of a delta over the norm of the weights, at most


TEMPERS = {
    "conservative": Temper(
        first_step=200,
        first_share=0.5,
        max_horizon_steps=25,
        max_refusal=0.25,
        exploration_share=EXPLORATION_SHARES["conservative"],
        optimism=0.25,
        trust_norm=0.01,
    ),
    "balanced": Temper(
        first_step=100,
        first_share=0.5,
        max_horizon_steps=64,
        max_refusal=0.5,
        exploration_share=EXPLORATION_SHARES["balanced"],
        optimism=0.5,
        trust_norm=0.03,
    ),
    "aggressive": Temper(
        first_step=50,
        first_share=0.1,
        max_horizon_steps=128,
        max_refusal=0.75,
        exploration_share=EXPLORATION_SHARES["aggressive"],
        optimism=1.0,
        trust_norm=0.1,
    ),
}
