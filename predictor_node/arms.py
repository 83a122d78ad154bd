"""What the bandit can choose: arms by name, and what each one stands for.

    rest            a FULL window
    slow:1.0        the slow drift once more: what several windows had in common
    head:25         delta head (delta_head.py) with a horizon of 25 steps
    pull_back:0.5   half of the way back to the averaged weights; stands for no steps
    forecaster:2w   the per-weight forecaster (phi.py), 2 windows ahead

Horizons are those of the original, {0, 5, 10, 15, 25, 50, 75} steps, and multiples of the window, since
useful jumps were that long (docs/how-it-works.md). Equal horizons appear once.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from common.settings import RunSettings
from predictor_node.bandit import REST

HORIZON_STEPS = (5, 10, 15, 25, 50, 75)
HORIZON_WINDOWS = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4), Fraction(8))
PULL_BACK_SHARES = (0.5, 1.0)
FORECASTER_WINDOWS = (1, 2, 4, 8)

SLOW_SHARES = (1.0, 0.5)  # the best of all rows in the anatomy of jumps (docs/lab-log.md), so tried first

SLOW, HEAD, PULL_BACK, FORECASTER = "slow", "head", "pull_back", "forecaster"


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    kind: str  # REST, SLOW, HEAD, PULL_BACK, FORECASTER
    horizon_steps: int  # virtual steps; 1 where a jump stands for none (a proposal must have some)
    horizon_windows: float
    share: float = 0.0  # of the slow drift, or of the way back


def arms_of(settings: RunSettings) -> tuple[Arm, ...]:
    """All arms of a run, rest first, in an order that depends on the settings alone."""
    window_steps = settings.trainer.window_steps
    horizons = {*HORIZON_STEPS, *(max(1, round(window_steps * share)) for share in HORIZON_WINDOWS)}
    arms = [Arm(REST, REST, 0, 0.0)]
    arms += [Arm(f"{SLOW}:{s}", SLOW, max(1, round(s * window_steps)), s, s) for s in SLOW_SHARES]
    arms += [Arm(f"{HEAD}:{h}", HEAD, h, h / window_steps) for h in sorted(horizons)]
    arms += [Arm(f"{PULL_BACK}:{share}", PULL_BACK, 1, 0.0, share) for share in PULL_BACK_SHARES]
    if settings.trainer.basis.history_snapshots:
        arms += [
            Arm(f"{FORECASTER}:{n}w", FORECASTER, n * window_steps, float(n)) for n in FORECASTER_WINDOWS
        ]
    return tuple(arms)
