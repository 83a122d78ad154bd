"""Which controls the trainer has in force, and the nominal step that follows from them. Pure values.

Owns the list of changes that were kept, each with the step that it started from and the step at whose end it
was judged. A run that goes back to before the judgement has the controls of before (they travel in the
trainer's checkpoints); what was kept earlier stays. Proposes nothing.

    nominal step = micro-batches kept / configured accumulation = sum of the batch factors of the steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common import features
from common.control_rules import NEUTRAL
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

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(change) for change in self.changes]


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
    values = observation.features
    share = values[_CONTEXT]
    context_tokens = round(share * settings.model.context_tokens) if 0.0 < share < 1.0 else 0
    controls = Controls(
        rate_factor=_factor(values[_RATE]),
        batch_factor=_factor(values[_BATCH]),
        context_tokens=context_tokens,
        decay_start=believed.decay_start,
        decay_steps=believed.decay_steps,
        read_out=believed.read_out,
    )
    is_neutral = controls.batch_factor == 1.0 or not 0.0 < values[_PROGRESS] <= 1.0
    clock = float(observation.step) if is_neutral else values[_PROGRESS] * settings.steps
    return InForce((Change(observation.step, observation.step, clock, controls),))


def _factor(log2: float) -> float:
    """Exact where it is a power of two, as all that we propose are."""
    near = round(log2) if abs(log2) < 64.0 else 0.0
    return float(2.0 ** (near if abs(log2 - near) < 1e-6 else log2)) if abs(log2) < 64.0 else 1.0
