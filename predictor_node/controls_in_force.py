"""Which controls the trainer has in force, and the nominal step that follows from them. Pure values.

Owns the list of changes that were kept, each with the step that it started from and the step at whose end it
was judged. A run that goes back to before the judgement has the controls of before (they travel in the
trainer's checkpoints); what was kept earlier stays. What a step was taken with overrules all of it (told_by).
Proposes nothing.

    nominal step = micro-batches kept / configured accumulation = sum of the batch factors of the steps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import features
from common.control_rules import NEUTRAL, schedule_of, still_allowed
from common.messages import Controls, Observation
from common.settings import TrainerSettings

_RATE, _BATCH = features.INDEX["log2_rate_factor"], features.INDEX["log2_batch_factor"]
_CONTEXT, _PROGRESS = features.INDEX["context_share"], features.INDEX["progress"]


@dataclass(frozen=True, slots=True)
class Change:
    base_step: int  # real step after which these controls were in force
    kept_step: int  # last step of the probation: from here on they stay
    clock: float  # nominal step at `base_step`
    controls: Controls


@dataclass(frozen=True, slots=True)
class InForce:
    changes: tuple[Change, ...] = (Change(0, 0, 0.0, NEUTRAL),)  # oldest first, never empty

    @property
    def controls(self) -> Controls:
        return self.changes[-1].controls

    @property
    def since_step(self) -> int:
        """Real step from which on the present controls were in force."""
        return self.changes[-1].base_step

    @property
    def is_lowered(self) -> bool:
        """The rate: by the newest change, or below its schedule."""
        rates = [change.controls.rate_factor for change in self.changes[-2:]]
        return rates[-1] < max(1.0, rates[0])

    def clock_at(self, step: int) -> float:
        """Nominal step after real step `step`, which is not before the newest change."""
        last = self.changes[-1]
        return last.clock + (step - last.base_step) * last.controls.batch_factor

    def kept(self, controls: Controls, *, base_step: int, kept_step: int) -> InForce:
        change = Change(base_step, kept_step, self.clock_at(base_step), controls)
        return InForce((*self.changes, change))

    def set_back(self, step: int) -> InForce:
        """The run goes on behind `step`."""
        kept = [change for change in self.changes[1:] if change.kept_step <= step]
        return InForce((self.changes[0], *kept))

    def under(self, settings: TrainerSettings, *, step: int) -> InForce:
        """For a run that goes on behind `step` with these settings: see control_rules.still_allowed.

        What is over keeps its batch factor: the clock was counted with it.
        """
        changes = tuple(
            replace(
                change,
                controls=replace(
                    still_allowed(change.controls, settings), batch_factor=change.controls.batch_factor
                ),
            )
            for change in self.changes
        )
        kept, now = InForce(changes), still_allowed(self.controls, settings)
        return kept if self.controls == now else kept.kept(now, base_step=step, kept_step=step)

    def with_tail_of(self, tried: Controls, observation: Observation, settings: TrainerSettings) -> InForce:
        """Of a trial whose verdict was never told: the progress that a step tells is a share of its end."""
        end_steps = schedule_of(tried, settings)[0]
        clock, told = self.clock_at(observation.step), observation.features[_PROGRESS] * end_steps
        if end_steps == schedule_of(self.controls, settings)[0] or abs(told - clock) > 1.0 / 128.0:
            return self
        tail = replace(self.controls, decay_start=tried.decay_start, decay_steps=tried.decay_steps)
        return self.kept(tail, base_step=observation.step, kept_step=observation.step)

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(change) for change in self.changes]


def begun_with(controls: Controls) -> InForce:
    """From the first step on."""
    return InForce((Change(0, 0, 0.0, controls),))


def in_force_from_json(values: Sequence[dict[str, Any]]) -> InForce:
    """Raises TypeError or ValueError for what is no such list."""
    changes = tuple(Change(**{**value, "controls": Controls(**value["controls"])}) for value in values)
    if not changes:
        raise ValueError("no controls are in force")
    return InForce(changes)


def told_by(observation: Observation, settings: TrainerSettings, believed: Controls) -> InForce:
    """What the features of a step say is in force: for a predictor that was not told, or missed a verdict.

    The tail and the read-out are not in the features: they stay as believed.
    """
    controls = told_controls(observation, settings, believed)
    progress, end_steps = observation.features[_PROGRESS], schedule_of(controls, settings)[0]
    # Batch factors are powers of two, at least 1/64, so every clock is a multiple of 1/64.
    is_told = 0.0 < progress <= 1.0
    clock = round(64.0 * progress * end_steps) / 64.0 if is_told else float(observation.step)
    return InForce((Change(observation.step, observation.step, clock, controls),))


def told_controls(observation: Observation, settings: TrainerSettings, believed: Controls) -> Controls:
    """Those that the step was taken with; tail and read-out as believed."""
    values = observation.features
    share = values[_CONTEXT]
    return replace(
        believed,
        rate_factor=_factor(values[_RATE]),
        batch_factor=_factor(values[_BATCH]),
        context_tokens=round(share * settings.model.context_tokens) if 0.0 < share < 1.0 else 0,
    )


def agree(one: Controls, other: Controls) -> bool:
    """But for what a factor loses on its way through a logarithm."""
    rates_agree = math.isclose(one.rate_factor, other.rate_factor, rel_tol=1e-6)
    return rates_agree and replace(one, rate_factor=other.rate_factor) == other


def _factor(log2: float) -> float:
    """Exact where it is a power of two, as all that we propose are."""
    near = round(log2) if abs(log2) < 64.0 else 0.0
    return float(2.0 ** (near if abs(log2 - near) < 1e-6 else log2)) if abs(log2) < 64.0 else 1.0
