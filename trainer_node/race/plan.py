"""What a race is (RacePlan), what it has found (RaceRecord). Data and the choices that follow from it.

Runs nothing and reads no files. Which runs come next: waves.py. The numbers of a report: statistics.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import SettingsError
from common.settings import RunSettings
from trainer_node.race.arm_table import ARMS, GROUPS, Arm
from trainer_node.race.arms import arm_named
from trainer_node.race.crossing_search import LATTICE_RATIO, Lattice
from trainer_node.race.rules import RULES

TUNING_SEED = 1_000_000  # never a race seed
EARLIER_SEEDS = 2_000_000  # of the runs that a fitted predictor has seen
MAX_SEEDS = 1_000
BRACKET = 7  # lattice steps around the crossing of the mean within which single seeds are placed
COARSE_RATIO = (
    1.1  # for small machines: a third of the runs; seeds more than 10 % off the mean count as misses
)
QUICK_RATIO = 1.25  # a coarse lattice: the same steps of the protocol with fewer lengths
QUICK_SHARE = 4  # T0 of a quick race is this part of the task's steps

Config = tuple[tuple[str, Any], ...]  # sorted (setting, value): RunKey.config


@dataclass(frozen=True, kw_only=True)
class RaceRecord:
    """Everything a report says about a race besides its runs. Grows as the race goes on."""

    task: str
    rule: str  # a name in rules.RULES
    target: float | None  # held-out loss in nats to be reached; None while unknown
    base_steps: int  # T0: planned steps of the equal-budget comparison
    seeds: tuple[int, ...]
    trials: int  # of tuning, per level: an arm that wraps another spends as many on top of that one's
    arms: tuple[str, ...]
    tuned: Mapping[str, Config]  # the chosen config of each arm whose tuning is finished
    reference_arm: str  # plain arm that set the target; "" while unknown
    machine: str
    date: str  # ISO, day of the report
    command: str  # line that runs this race again
    crossings: Mapping[str, int | None] = field(default_factory=dict)  # planned steps; None = a miss
    incomplete: tuple[str, ...] = ()  # arms that still have runs to do
    notes: tuple[str, ...] = ()  # failed runs and the like, one line each
    total_trials: int = 0  # of a plain arm; one around it takes over its choice and has `trials` of its own
    in_distribution: tuple[str, ...] = ()  # arms whose predictor was fitted on earlier runs of this task
    fitted_on: int = 0  # how many runs these were
    remarks: tuple[str, ...] = ()  # what else a reader must know, a sentence each


@dataclass(frozen=True, kw_only=True)
class RacePlan:
    """All choices of a race. Equal plans make the same runs in the same order."""

    task: str
    rule: str
    base: RunSettings
    arms: tuple[str, ...]  # in the order of the table of arms, plain arms of the rule among them
    seeds: tuple[int, ...]
    trials: int
    lattice_ratio: float = LATTICE_RATIO
    bracket: int = BRACKET

    @property
    def base_steps(self) -> int:
        return self.base.trainer.steps

    @property
    def lattice(self) -> Lattice:
        return Lattice(self.base_steps, ratio=self.lattice_ratio)

    @property
    def plain_arms(self) -> tuple[str, ...]:
        """Those of the race that may set the target."""
        return tuple(name for name in RULES[self.rule].plain_arms if name in self.arms)

    @property
    def tuned_arms(self) -> tuple[Arm, ...]:
        """The arms of the race and those that they wrap, in the order of the table."""
        needed = set(self.arms)
        for name in self.arms:
            needed.update(_wrapped(name))
        return tuple(arm for arm in ARMS.values() if arm.name in needed)

    @property
    def levels(self) -> int:
        """1 + how deeply arms of this race wrap others and tune: so many times `trials` does a plain arm
        spend."""
        tuning = [_tuned_under(arm) for arm in self.tuned_arms if arm.tuned]
        return 1 + max(tuning, default=0) if RULES[self.rule].tunes else 1

    def own_trials(self, arm: Arm) -> int:
        """Trials of the arm itself. A wrapping arm spends `trials` on its own settings, on top of the choice
        of the arm that it wraps, which is given as many more. One = there is nothing to choose."""
        if not arm.tuned or not RULES[self.rule].tunes:
            return 1
        return self.trials * (self.levels - _tuned_under(arm))

    def needs_trials(self, arm: Arm) -> bool:
        """False where one config is all there is, and nobody asks how well it does."""
        is_rival = arm.name in self.plain_arms and len(self.plain_arms) > 1
        return is_rival or self.own_trials(arm) > 1

    def eval_every_steps(self, purpose: str) -> int | None:
        """Of a tuning or timed run only the end counts; None = run_arm's own choice."""
        return self.base_steps if purpose in ("tune", "time") else None


def chosen_arms(rule: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The arms to race, with a plain arm that can set the target. Raises SettingsError.

    No names: those of the rule. The name of a group stands for its arms.
    """
    if rule not in RULES:
        raise SettingsError(f"unknown rule '{rule}'; rules: {', '.join(RULES)}")
    named = [arm for name in names or RULES[rule].arms for arm in GROUPS.get(name, (name,))]
    wanted = {arm_named(name).name for name in named}
    plain = RULES[rule].plain_arms
    if not wanted.intersection(plain):
        wanted.add(plain[0])
    return tuple(name for name in ARMS if name in wanted)


def _wrapped(name: str) -> list[str]:
    """The arms under this one, nearest first."""
    under = []
    while name := ARMS[name].wraps:
        under.append(name)
    return under


def _tuned_under(arm: Arm) -> int:
    return sum(bool(ARMS[name].tuned) for name in _wrapped(arm.name))
