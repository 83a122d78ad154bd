"""A run of 200 hybrid steps that any number of ranks can take, and what is kept of it for comparison.

Decisions come from a script that reads what rank 0 told: jumps along the drift, one in four along momentum
and drift in parts, one far back that must be refused. No bus, no run folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.clock import SystemClock
from common.config import load_settings
from common.messages import Controls, Observation, Outcome, Phase, PhaseDecision
from common.settings import RunSettings
from tests.trainer.tiny import ScriptedLinks
from trainer_node.assembly import build_loop, prepare_task
from trainer_node.loop import Loop
from trainer_node.parallel import on_ranks
from trainer_node.ranks import Ranks
from trainer_node.shared_decisions import SharedDecisions

HYBRID = (
    "trainer.task=regression",
    "trainer.steps=200",
    "trainer.statistics_steps=16",
    "trainer.window_steps=8",
    "trainer.probation_steps=8",
    "trainer.batch.sequences=32",
    "trainer.model.width=16",
    "trainer.model.layers=3",
    "trainer.schedule.warmup_steps=10",
    "trainer.basis.sample_size=64",
    "trainer.decision_mode=lockstep",
)


def hybrid_settings(*overrides: str) -> RunSettings:
    return load_settings(preset="digits", overrides=[*HYBRID, *overrides])


@dataclass
class Script:
    """Answers each decision point; the same wherever the same points were told."""

    asked: int = 0

    def __call__(self, observation: Observation) -> PhaseDecision | None:
        assert observation.decision_point is not None
        self.asked += 1
        groups = len(observation.gradient_norms)
        row = (0.0, 0.3, 0.0, 0.1)
        decision = PhaseDecision(
            decision_id=f"{observation.step}.{observation.attempt}",
            phase=Phase.PREDICT,
            horizon_steps=4,
            num_groups=groups,
            num_directions=4,
            coefficients=row * groups,
            controls=Controls(),
            forecast=None,
            base_generation=1,
            base_step=observation.step,
            base_attempt=observation.attempt,
            base_fingerprint=observation.decision_point.fingerprint,
            valid_until_step=observation.step,
            reason="test",
        )
        if self.asked % 4 == 0:
            return replace(decision, coefficients=(1.5, 0.2, 0.1, 0.0) * groups, chunks=2)
        if self.asked % 4 == 2:
            return replace(decision, correction_share=0.5)
        if self.asked == 5:
            return replace(decision, coefficients=(0.0, -3.0, 0.0, 0.0) * groups)
        return decision


CONTROLS = (
    "trainer.controls.rate=true",
    "trainer.controls.batch=true",
    "trainer.controls.trial_steps=8",
    "trainer.optimizer.rate=0.0025",  # a fourth of a good one: higher ones beat their twins by far
    "trainer.batch.accumulation=2",
    "trainer.batch.sequences=16",
    "trainer.steps=100",
)


def change_controls(observation: Observation) -> PhaseDecision | None:
    """A higher rate in half the batch, a still higher one, the whole batch: each by the step when it is due.

    Whichever is kept, both sizes of batch are trained with, on trial or beside one.
    """
    wanted = {
        24: Controls(rate_factor=4.0, batch_factor=0.5),
        40: Controls(rate_factor=16.0, batch_factor=0.5),
        56: Controls(rate_factor=16.0, batch_factor=1.0),
        72: Controls(rate_factor=4.0, batch_factor=0.5),
    }.get(observation.step)
    if wanted is None:
        return None
    decision = Script()(observation)
    assert decision is not None
    return replace(decision, horizon_steps=0, coefficients=(), controls=wanted)


def hybrid_loop(settings: RunSettings, ranks: Ranks, links: ScriptedLinks | None = None) -> Loop:
    """`links` are those of rank 0; default: the script."""
    links = links or ScriptedLinks(answer=Script())
    task = on_ranks(prepare_task(settings.trainer), settings.trainer, ranks)
    is_first = ranks.rank == 0
    shared = SharedDecisions(links if is_first else None, ranks, is_told_to_stop=lambda: False)
    loop = build_loop(
        task,
        settings,
        links=links if ranks.size == 1 else shared,
        emit=links.emit,
        housekeeping=lambda _: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    loop.said = links.said
    return loop


def whole_weights(loop: Loop) -> dict[str, Tensor]:
    """By name, each whole on every rank. A collective where they are cut."""
    return {
        name: (p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()).clone()
        for name, p in loop.task.model.named_parameters()
    }


def verdicts(loop: Loop) -> list[str]:
    said = loop.said
    return [message.verdict.value for message in said if isinstance(message, Outcome)]


def relative_distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Of all weights, in L2."""
    square = sum(float((left[n].double() - right[n].double()).square().sum()) for n in right)
    return (square / sum(float(t.double().square().sum()) for t in right.values())) ** 0.5


def take(settings: RunSettings, ranks: Ranks, links: ScriptedLinks | None = None) -> Loop:
    torch.set_num_threads(1)
    loop = hybrid_loop(settings, ranks, links)
    loop.run()
    return loop
