"""The learned parts that know how the run moves: world model, delta head, per-weight forecaster.

Owns when they learn: the world model's work of learning is counted in floating-point operations and may be
at most `predictor.learn_share` of the trainer's, so a small job gets a small predictor and none slows down:
where that would not pay for MIN_UPDATES in the whole run, the world model sleeps unless it was fitted
before. What the trainer does in a step is taken as 6 x weights x units (forward 2, backward 4; Kaplan et
al. 2020, arXiv 2001.08361, eq. 2.2), which is too little for convolutions: then less is learned. Decides
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common import features
from common.errors import CheckpointError
from common.messages import DecisionPoint, Observation
from common.schedule import rate_factor
from common.settings import RunSettings
from predictor_node.delta_head import DeltaHead, HeadInput, TrustRegion
from predictor_node.episodes import NUM_ACTIONS, Tick
from predictor_node.phi import PhiLearner, PhiShape
from predictor_node.phi_runs import WindowSample, window_sample
from predictor_node.policy import DecisionInput
from predictor_node.proposals import Imagined, Proposal
from predictor_node.state import RunFacts
from predictor_node.tempers import TEMPERS
from predictor_node.world_model import WorldModel

MIN_UPDATES = 100  # before that the world model's forecasts are not asked for
MIN_REFUSAL_UPDATES = 400  # the refusal head learns more slowly (measured on a toy: docs/lab-log.md)
MIN_JUMPS = 5  # seen to their end; before that it cannot know what a jump does
MIN_EXPLAINED = 0.05  # share of the displacement that phi must explain before it is an arm
MAX_UPDATES_AT_ONCE = 2  # spreads the work: a decision must not wait for a long lesson
FLOPS_PER_WEIGHT_AND_UNIT = 6.0
_UNITS = features.INDEX["log10_units_per_step"]
_RATE = features.INDEX["rate_over_peak"]


class Models:
    def __init__(self, settings: RunSettings, facts: RunFacts) -> None:
        trainer = settings.trainer
        self._settings, self._num_groups = settings, facts.num_groups
        self._num_weights = sum(facts.group_sizes)
        num_directions = len(facts.directions)
        self.world = WorldModel(num_directions, trainer.seed)
        self.head = DeltaHead(
            num_groups=facts.num_groups,
            latent_size=self.world.settings.context,
            window_steps=trainer.window_steps,
            seed=trainer.seed,
            trust=TrustRegion(norm_share=TEMPERS[settings.predictor.temper].trust_norm),
        )
        self.phi: PhiLearner | None = None
        if trainer.basis.history_snapshots and facts.group_sizes:
            self.phi = PhiLearner(
                PhiShape(group_sizes=facts.group_sizes, num_snapshots=trainer.basis.history_snapshots),
                total_steps=trainer.steps,
                mean_rate=self._mean_rate,
                seed=trainer.seed,
                updates_per_window=1,
            )
        self.keeps_samples = False  # `fit` wants them all; beside a trainer they would grow with the run
        self.samples: list[WindowSample] = []  # of this run
        self._credit_flops = 0.0
        self._is_warm = False
        self.is_awake = False
        self._jumps_seen = 0

    # ---- learning ----------------------------------------------------------------------------

    def step_taken(self, observation: Observation) -> None:
        """The trainer worked: that much more may be learned."""
        units = 10.0 ** observation.features[_UNITS]
        allowed_flops = (
            self._settings.predictor.learn_share * FLOPS_PER_WEIGHT_AND_UNIT * self._num_weights * units
        )
        planned_updates = allowed_flops * self._settings.trainer.steps / self.world.flops_per_update
        self.is_awake = self._is_warm or planned_updates >= MIN_UPDATES
        if not self.is_awake:
            return
        self._credit_flops += allowed_flops
        if observation.decision_point is not None:
            return  # the trainer is waiting for an answer
        for _ in range(MAX_UPDATES_AT_ONCE):
            if self._credit_flops < self.world.flops_per_update:
                break
            self._credit_flops -= self.world.flops_per_update
            self.world.learn(1)

    def record(self, tick: Tick) -> None:
        if not self.is_awake:
            return
        self.world.record(tick)
        self._jumps_seen += tick.refused == tick.refused
        if self._credit_flops >= self.world.flops_per_tick:
            self._credit_flops -= self.world.flops_per_tick
            self.world.observe_latest()

    def window_ended(self, observation: Observation, point: DecisionPoint) -> None:
        if not self._fits(point):
            return  # the decision says why it rests
        self.head.observe(self._head_input(point))
        if self.phi is None:
            return
        sample = window_sample(
            point,
            num_groups=self._num_groups,
            window_steps=self._settings.trainer.window_steps,
            steps_done=observation.step,
            rate=observation.features[_RATE],
        )
        if sample is not None:
            self.phi.observe(sample)
            if self.keeps_samples:
                self.samples.append(sample)

    def fit(self, runs: Sequence[Sequence[WindowSample]], updates: int) -> str:
        """Offline: many updates on what was recorded, whatever they cost. Returns a line about it."""
        report = self.world.learn(updates)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in sorted(report.losses.items()))
        line = f"world model: {report.num_updates} updates, {losses}"
        if self.phi is None or not any(runs):
            return line
        self.phi.fit(runs, total_steps=self._settings.trainer.steps, updates=updates)
        return f"{line}; forecaster: {updates} updates on {sum(map(len, runs))} windows"

    # ---- answers -----------------------------------------------------------------------------

    def latent(self) -> np.ndarray:
        return self.world.latent()

    @property
    def forecaster_explains(self) -> float:
        """Share of the displacement one window ahead that phi explained so far; 0 before it is known."""
        share = self.phi.explained_share(1) if self.phi is not None else math.nan
        return share if math.isfinite(share) else 0.0

    def head_coefficients(self, point: DecisionInput, horizon_steps: int) -> np.ndarray:
        proposal = self.head.propose(self._head_input(point.point), horizon_steps=horizon_steps)
        return proposal.coefficients_GK

    def forecaster(self, horizon_steps: int) -> bytes:
        if self.phi is None or self.forecaster_explains < MIN_EXPLAINED:
            return b""
        return self.phi.export(horizon_steps, pull_back=1.0)

    def imagine(self, proposals: Sequence[Proposal], ticks: int) -> list[Imagined | None]:
        """What each proposal would lead to after `ticks` ticks of probation, against no jump at all."""
        if not proposals or self.world.updates < MIN_UPDATES or self._jumps_seen < MIN_JUMPS:
            return [None] * len(proposals)
        actions_NTA = np.zeros((len(proposals) + 1, ticks, NUM_ACTIONS))
        for row, proposal in enumerate(proposals, start=1):
            actions_NTA[row, 0] = proposal.action()
        resting, *arms = self.world.imagine(actions_NTA)
        return [
            Imagined(
                change_by_jump=arm.loss_change - resting.loss_change,
                spread=math.hypot(arm.disagreement, resting.disagreement),
                refusal=arm.refusal if self.world.updates >= MIN_REFUSAL_UPDATES else None,
            )
            for arm in arms
        ]

    # ---- state -------------------------------------------------------------------------------

    def new_run(self, *, is_warm: bool) -> None:
        """What was learned stays; where the former run stood does not. A warm model never sleeps."""
        self._credit_flops, self._is_warm = 0.0, is_warm

    def values(self) -> dict[str, Any]:
        return {
            "credit_flops": self._credit_flops,
            "jumps_seen": self._jumps_seen,
            "is_warm": self._is_warm,
        }

    def tensors(self) -> bytes:
        parts = {"world": self.world.to_bytes(), "head": self.head.to_bytes()}
        if self.phi is not None:
            parts["phi"] = self.phi.to_bytes()
        return save({name: np.frombuffer(content, dtype=np.uint8) for name, content in parts.items()})

    def load(self, values: Mapping[str, Any], tensors: bytes, *, same_run: bool = True) -> None:
        """Raises CheckpointError. `same_run` false: of another run, whose shapes may differ in part."""
        try:
            parts = {name: part.tobytes() for name, part in load(tensors).items()}
            self._jumps_seen, self._is_warm = int(values["jumps_seen"]), bool(values["is_warm"])
            self._credit_flops = float(values["credit_flops"])
            self.world = WorldModel.from_bytes(parts["world"], self.world.sizes.directions)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged models: {error!r}") from None
        if same_run:
            self.head.load(parts["head"])
        if self.phi is not None and "phi" in parts:
            self.phi.load(parts["phi"], same_run=same_run)

    def _fits(self, point: DecisionPoint) -> bool:
        table = self._num_groups * self.world.sizes.directions
        sizes = len(point.gram), len(point.happened), len(point.parameter_norms), len(point.unexplained_share)
        expected = table * self.world.sizes.directions, table, self._num_groups, self._num_groups
        return sizes == expected and all(map(math.isfinite, point.gram))

    def _head_input(self, point: DecisionPoint) -> HeadInput:
        shape = (self._num_groups, self.world.sizes.directions)
        return HeadInput(
            latent_D=self.world.latent(),
            gram_GKK=np.asarray(point.gram, dtype=np.float64).reshape(*shape, shape[1]),
            parameter_norms_G=np.asarray(point.parameter_norms, dtype=np.float64),
            happened_GK=np.asarray(point.happened, dtype=np.float64).reshape(shape),
            unexplained_G=np.asarray(point.unexplained_share, dtype=np.float64),
            window_steps=point.window_steps or self._settings.trainer.window_steps,
        )

    def _mean_rate(self, steps_done: int, horizon_steps: int) -> float:
        """Mean factor of the scheduled rate over the steps to come."""
        trainer = self._settings.trainer
        last = max(steps_done + 1, min(steps_done + horizon_steps, trainer.steps))
        factors = [rate_factor(step, trainer.steps, trainer.schedule) for step in range(steps_done, last)]
        return math.fsum(factors) / len(factors)
