"""How much of a run may be spent on jumps that do not pay: a conservative exploration budget.

After Conservative Bandits (Wu, Shariff, Lattimore & Szepesvari 2016, arXiv 1602.04282): the default
arm, never jumping, is known, and all exploring together may cost at most a share of what it would
have brought. Owns the sums; what a jump cost and gained is reward.py's.
All amounts in one unit, forward-equivalents ("passes": a training step of one micro-batch is 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError
from common.trying import WORST_FACTOR


class ExplorationBudget:
    """Allowance = share * max(passes of the run so far, planned passes of the whole run).

    A proposal is allowed when both hold:

        max(net, expected so far) + expected cost <= allowance
        net + worst cost                          <= worst_factor * allowance

    net = what all proposals really cost less what they gained. Laws: (1) the net loss is never above
    worst_factor * allowance, if no jump costs more than its stated worst; (2) its expectation is never
    above the allowance, if stated costs are right on average, because the net minus the expected costs
    is a martingale, and those are bounded on every path. A proposal that is expected to gain
    (negative cost) passes the first test unless the net has shown such expectations to be wrong.
    With `planned_passes` the allowance of the whole run can be spent early, where learning pays most;
    a run that is stopped early may then have lost more than its share.
    """

    def __init__(
        self, share: float, *, planned_passes: float = 0.0, worst_factor: float = WORST_FACTOR
    ) -> None:
        """Raises ValueError unless share >= 0, planned_passes >= 0, worst_factor >= 1, all finite."""
        finite = all(map(math.isfinite, (share, planned_passes, worst_factor)))
        if not finite or share < 0.0 or planned_passes < 0.0 or worst_factor < 1.0:
            raise ValueError(f"out of range: {share=}, {planned_passes=}, {worst_factor=}")
        self.share, self.planned_passes, self.worst_factor = share, planned_passes, worst_factor
        self.spent_passes = 0.0  # of the run so far
        self.net_passes = 0.0  # proposals: cost - gain; negative = they paid
        self.expected_passes = 0.0  # the same as it was expected

    @property
    def allowance_passes(self) -> float:
        return self.share * max(self.spent_passes, self.planned_passes)

    @property
    def most_passes(self) -> float:
        """The net loss that is never exceeded, as far as is known now."""
        return self.worst_factor * self.allowance_passes

    @property
    def left_passes(self) -> float:
        """The highest expected cost that would be allowed now, its worst aside."""
        return self.allowance_passes - max(self.net_passes, self.expected_passes)

    def allows(self, expected_cost: float, worst_cost: float) -> bool:
        """In passes: mean of cost minus gain (may be negative), and the most that a refusal costs."""
        if not (math.isfinite(expected_cost) and math.isfinite(worst_cost)):
            return False
        worst_room = self.most_passes - self.net_passes
        return expected_cost <= self.left_passes and worst_cost <= worst_room

    def ran(self, passes: float) -> bool:
        """The run went on by that much. False, and nothing changes, if it is negative or not finite."""
        if not math.isfinite(passes) or passes < 0.0:
            return False
        self.spent_passes += passes
        return True

    def settle(self, expected_cost: float, cost: float, gain: float) -> bool:
        """One applied proposal is over.

        gain: passes that it replaced; a lower bound is best, since the accepted are the lucky ones.
        False, and nothing changes, if a number is not finite or the cost negative.
        """
        if not all(map(math.isfinite, (expected_cost, cost, gain))) or cost < 0.0:
            return False
        self.expected_passes += expected_cost
        self.net_passes += cost - gain
        return True

    def state(self) -> dict[str, float]:
        return {
            "share": self.share,
            "planned_passes": self.planned_passes,
            "worst_factor": self.worst_factor,
            "spent_passes": self.spent_passes,
            "net_passes": self.net_passes,
            "expected_passes": self.expected_passes,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the sums; the limits stay this budget's own. Raises CheckpointError."""
        try:
            sums = [float(state[name]) for name in ("spent_passes", "net_passes", "expected_passes")]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged state of the exploration budget: {error!r}") from None
        if not all(map(math.isfinite, sums)) or sums[0] < 0.0:
            raise CheckpointError(f"damaged state of the exploration budget: {sums}")
        self.spent_passes, self.net_passes, self.expected_passes = sums
