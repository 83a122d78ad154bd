"""When the next checkpoint is due: the interval at which saving and losing work cost least together. Pure.

    interval = max(sqrt(2 C M), C / 0.035)      C: seconds of training that a checkpoint costs
                                                M: mean seconds between failures

Young 1974 (CACM 17, 530); Daly 2006 (FGCS 22, 303) adds terms of order C, which for C < M / 100 change
the interval by less than a tenth, and the cost by far less. The second bound keeps the overhead at or below
3.5 %, as CheckFreq does (Mohan et al., FAST 2021). Measures nothing: housekeeping.py does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_OVERHEAD_SHARE = 0.035
FIRST_STEPS = 50  # to the first checkpoint, whose cost is not known yet, where no interval is configured
_NEWEST_WEIGHT = 0.5  # a disk that grows slow must be noticed within a few checkpoints


@dataclass(slots=True)
class CheckpointClock:
    cost_seconds: float | None = None  # None before one was measured

    def measured(self, seconds: float) -> None:
        """Training stood still for so long."""
        before = self.cost_seconds if self.cost_seconds is not None else seconds
        self.cost_seconds = before + _NEWEST_WEIGHT * (seconds - before)


def interval_seconds(cost_seconds: float, failure_seconds: float) -> float:
    """Between two checkpoints."""
    young = math.sqrt(2.0 * cost_seconds * failure_seconds)
    return max(young, cost_seconds / MAX_OVERHEAD_SHARE)


def interval_steps(cost_seconds: float, failure_seconds: float, *, step_seconds: float) -> int:
    """The same in steps of `step_seconds`, rounded up, so that the overhead stays within its bound."""
    return max(1, math.ceil(interval_seconds(cost_seconds, failure_seconds) / max(step_seconds, 1e-9)))
