"""Which planned length to try next: the smallest one whose mean end passes the target. Pure; no runs.

With a decayed rate a run crosses the target only at its end, so the search is over planned lengths
T0 * ratio^k on a lattice, the same lengths for every arm. A gallop from k = 0 brackets the crossing and
bisection closes in: about 2 log2 |k| lengths instead of all. The answer follows from the verdicts alone,
so a stopped search goes on from the results that are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

LATTICE_RATIO = 1.05
LONGEST = 2.5  # planned lengths above this multiple of T0 are a miss
SHORTEST = 0.1


@dataclass(frozen=True, slots=True)
class Lattice:
    """Planned lengths by index k; strictly rising, `low` <= k <= `high`."""

    base_steps: int
    ratio: float = LATTICE_RATIO
    longest: float = LONGEST
    shortest: float = SHORTEST

    @property
    def low(self) -> int:
        """The smallest k whose length is above that of k - 1 all the way up: no length appears twice."""
        k = 0
        floor = max(1.0, self.shortest * self.base_steps)
        while self.steps(k - 1) >= floor and self.steps(k - 1) < self.steps(k):
            k -= 1
        return k

    @property
    def high(self) -> int:
        return math.floor(math.log(self.longest) / math.log(self.ratio) + 1e-9)

    def steps(self, k: int) -> int:
        return max(1, round(self.base_steps * self.ratio**k))

    @property
    def longest_steps(self) -> int:
        """Length of runs that are read while they go on (constant rate)."""
        return round(self.longest * self.base_steps)


@dataclass(frozen=True, slots=True)
class Ask:
    k: int  # its verdict is needed


@dataclass(frozen=True, slots=True)
class Found:
    k: int  # passes, and k - 1 does not (or is below the lattice)


@dataclass(frozen=True, slots=True)
class Missed:
    """The longest length does not pass."""


def search(passes: Mapping[int, bool], low: int, high: int) -> Ask | Found | Missed:
    """The next step of the search, given the verdicts so far (k -> passes); others are left alone.

    Where the verdicts are monotone, Found is the smallest passing k of the lattice. Where noise makes
    them jump, it lies between the smallest passing k and the smallest k from which all longer ones pass.
    """
    k, stride = 0, 1
    failed: int | None = None  # the longest known failure below `passed`
    passed: int | None = None
    while k in passes:
        if passes[k]:
            passed = k
        else:
            failed = k
        if failed is not None and passed is not None:
            if passed - failed == 1:
                return Found(passed)
            k = (failed + passed) // 2
        elif passed is None:
            if k == high:
                return Missed()
            k, stride = min(high, k + stride), 2 * stride
        else:
            if k == low:
                return Found(low)
            k, stride = max(low, k - stride), 2 * stride
    return Ask(k)


def bracket(
    passing: Mapping[int, AbstractSet[int]], seeds: AbstractSet[int], found: int, low: int, high: int
) -> Ask | None:
    """The next length so that single seeds can be placed around a found crossing; None when they can.

    `passing`: the seeds that pass, for every length that was run. About half of the seeds end above the
    target where the mean passes it, so lengths further out are added (always for all seeds) until every
    seed passes somewhere and fails at the shortest length, or `low` or `high` is reached.
    """
    k, stride = found, 1
    while not seeds <= set().union(*passing.values()) and k < high:
        k, stride = min(high, k + stride), 2 * stride
        if k not in passing:
            return Ask(k)
    k, stride = found, 1
    while passing[min(passing)] and k > low:
        k, stride = max(low, k - stride), 2 * stride
        if k not in passing:
            return Ask(k)
    return None
