"""How large a batch pays: seconds per step against steps to a loss, from what was seen. Decides nothing.

    seconds of a step    a + b B                 B in configured batches; least squares over the factors seen
    steps to a loss      ~ 1 + Bn / B            McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11
    time to a loss       (a + b B)(1 + Bn / B)   least at B* = sqrt(a Bn / b)

With one factor seen, a is a guess: FIXED_SHARE of the time, and nothing in lockstep, where a step costs
what its micro-batches cost; there B* = 0 and the law asks for less as long as that saves anything. The
formula takes the rate to be the best one for each batch, which the batch rule only approximates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import CheckpointError
from common.messages import Controls

FIXED_SHARE = 0.5  # of a step's time, before two batches were seen: either half may be the larger one
FORGOTTEN_AFTER = 256.0  # steps: machines change


@dataclass(frozen=True, slots=True)
class StepTime:
    """seconds = fixed + per_batch * batch factor."""

    fixed: float
    per_batch: float

    def seconds(self, batch_factor: float) -> float:
        return self.fixed + self.per_batch * batch_factor


class StepTimes:
    """Mean log10 seconds of a step by batch factor and context."""

    def __init__(self, *, is_lockstep: bool) -> None:
        self._fixed_share = 0.0 if is_lockstep else FIXED_SHARE
        self._means: dict[str, tuple[float, float]] = {}  # key -> steps, mean of log10 seconds

    def observe(self, controls: Controls, log10_seconds: float) -> None:
        if not math.isfinite(log10_seconds):
            return
        key = _key(controls)
        count, mean = self._means.get(key, (0.0, 0.0))
        count = min(count + 1.0, FORGOTTEN_AFTER)
        self._means[key] = count, mean + (log10_seconds - mean) / count

    def seconds(self, controls: Controls) -> float:
        """NaN before such a step was seen."""
        known = self._means.get(_key(controls))
        return 10.0 ** known[1] if known else math.nan

    def fit(self, controls: Controls) -> StepTime | None:
        """For the context in force; None before a step was seen."""
        context = _key(controls).split(":")[1]
        points = [
            (2.0 ** float(key.split(":")[0]), 10.0**mean)
            for key, (_, mean) in sorted(self._means.items())
            if key.split(":")[1] == context
        ]
        if not points:
            return None
        if len(points) == 1:
            factor, seconds = points[0]
            return StepTime(self._fixed_share * seconds, (1.0 - self._fixed_share) * seconds / factor)
        mean_x = math.fsum(x for x, _ in points) / len(points)
        mean_y = math.fsum(y for _, y in points) / len(points)
        squares = math.fsum((x - mean_x) ** 2 for x, _ in points)
        per_batch = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / squares
        per_batch = min(max(per_batch, 0.0), mean_y / mean_x)  # neither part is below nothing
        return StepTime(mean_y - per_batch * mean_x, per_batch)

    def state(self) -> dict[str, list[float]]:
        return {key: list(values) for key, values in self._means.items()}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Raises CheckpointError."""
        try:
            self._means = {str(key): (float(count), float(mean)) for key, (count, mean) in state.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged step times: {error!r}") from None


def gain_of(time: StepTime, *, noise_scale: float, now: float, then: float) -> float:
    """By which share progress per second rises from batch factor `now` to `then`."""
    return _time_to_loss(time, noise_scale, now) / _time_to_loss(time, noise_scale, then) - 1.0


def _time_to_loss(time: StepTime, noise_scale: float, batch_factor: float) -> float:
    return time.seconds(batch_factor) * (1.0 + noise_scale / batch_factor)


def _key(controls: Controls) -> str:
    return f"{math.log2(controls.batch_factor):g}:{controls.context_tokens}"
