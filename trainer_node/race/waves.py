"""Which runs come next: a pure function of the plan and the runs that are there, so a race can stop anywhere.

    tune     every arm's trials at T0 with the tuning seed; first the arms that are wrapped
    target   the best plain arm with all seeds at T0: the target is its median end; and at two thirds of T0,
             to see that more steps still help (where they do not, a time to target means nothing)
    race     every arm at T0 with all seeds; decayed arms at the lengths that their search asks for,
             arms of constant rate once at the longest length, to be read while they go on
    time     every arm once more at T0 with all seeds: only these runs are timed (timing.py). All arms of
             a seed at the same time: where one came later, the others are timed again with it

A wave is a list of runs that do not depend on each other, ordered by seed and then by arm: a slow drift
of the machine hits all arms alike. Protocol: reference/speedup.md, section 3. Makes no runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from trainer_node.race.arms import ARMS, Arm
from trainer_node.race.crossing_search import Ask, Found, Missed, bracket, search
from trainer_node.race.plan import TUNING_SEED, Config, RacePlan
from trainer_node.race.run_result import RunKey, RunResult
from trainer_node.race.space import trial_config

SHORTER_SHARE = 2 / 3
LENGTHS_EXPECTED = 5  # visited by a search, as a guess for the time left


@dataclass(frozen=True, kw_only=True, slots=True)
class Wave:
    phase: str  # "tune", "target", "race", "time"
    keys: tuple[RunKey, ...]  # not there yet, or timed without an arm that is there now


@dataclass(frozen=True)
class Standing:
    """A plan and what is known so far. A failed run counts as an infinite loss until it is made again."""

    plan: RacePlan
    results: Mapping[str, RunResult]
    failed: AbstractSet[str] = frozenset()

    def next_wave(self) -> Wave | None:
        """None when every run of the race is there (or has failed)."""
        for phase, keys in (
            ("tune", self._tuning_keys(wrapping=False)),
            ("tune", self._tuning_keys(wrapping=True)),
            ("target", self._target_keys()),
            ("target", self._shorter_keys()),
            ("race", self._race_keys()),
            ("time", self._timing_keys()),
        ):
            missing = {key.identity: key for key in keys if not self._is_known(key)}
            if missing and phase == "time":
                seeds = {key.seed for key in missing.values()}
                missing = {key.identity: key for key in keys if key.seed in seeds}
            if missing:
                order = list(ARMS)
                return Wave(phase=phase, keys=tuple(sorted(missing.values(), key=lambda k: _turn(k, order))))
        return None

    def tuned(self, arm: Arm) -> Config | None:
        """The best config of the arm's trials; None while some are missing."""
        inner = self._inner(arm)
        if inner is None:
            return None
        if not self.plan.needs_trials(arm):
            return trial_config(arm, self.plan.base, 0, inner)
        keys = [self._tuning_key(arm, trial, inner) for trial in range(self.plan.own_trials(arm))]
        if not all(map(self._is_known, keys)):
            return None
        return min(keys, key=self._final_loss).config  # the first of equals

    def reference_arm(self) -> Arm | None:
        """The plain arm whose tuned config ended best at T0; None while tuning goes on."""
        if len(self.plan.plain_arms) == 1:
            arm = ARMS[self.plan.plain_arms[0]]
            return arm if self.tuned(arm) is not None else None
        best: tuple[float, Arm] | None = None
        for name in self.plan.plain_arms:
            config = self.tuned(ARMS[name])
            if config is None:
                return None
            loss = self._final_loss(self._key(ARMS[name], config, self.plan.base_steps, TUNING_SEED, "tune"))
            if best is None or loss < best[0]:
                best = (loss, ARMS[name])
        return best[1] if best is not None else None

    def target(self) -> float | None:
        """Held-out loss to reach: the median end of the reference arm at T0 over all seeds.

        None while runs are missing, and where half of them failed or diverged: then there is no race.
        """
        keys = self._target_keys()
        if not keys or not all(map(self._is_known, keys)):
            return None
        target = statistics.median(map(self._final_loss, keys))
        return target if math.isfinite(target) else None

    def crossing(self, arm: Arm) -> Ask | Found | Missed | None:
        """State of the search over planned lengths of a decayed arm; None before there is a target."""
        target, config = self.target(), self.tuned(arm)
        if target is None or config is None:
            return None
        lattice = self.plan.lattice
        passes: dict[int, bool] = {}
        while isinstance(state := search(passes, lattice.low, lattice.high), Ask):
            keys = self._seed_keys(arm, config, lattice.steps(state.k), "race")
            if not all(map(self._is_known, keys)):
                return state
            passes[state.k] = statistics.fmean(map(self._final_loss, keys)) <= target
        return state

    def missing_of(self, arm: Arm) -> bool:
        """Whether runs are still to be made, or failed, for this arm: of the race, or to be timed."""
        keys, config = self._arm_keys(arm), self.tuned(arm)
        if config is not None:
            keys = keys + self._seed_keys(arm, config, self.plan.base_steps, "time")
        return not keys or any(key.identity not in self.results for key in keys)

    def steps_ahead(self) -> int:
        """Planned steps of the runs still to come: exact for the present wave, a guess beyond it."""
        plan = self.plan
        trials = sum(plan.own_trials(arm) for arm in plan.tuned_arms if plan.needs_trials(arm))
        expected = trials * plan.base_steps
        lengths = [
            LENGTHS_EXPECTED if ARMS[name].rule != "constant" else 1 + plan.lattice.longest
            for name in plan.arms
        ]
        expected += round(sum(lengths) * len(plan.seeds) * plan.base_steps)
        done = sum(result.key.planned_steps for result in self.results.values())
        wave = self.next_wave()
        present = sum(key.planned_steps for key in wave.keys) if wave is not None else 0
        return max(present, expected - done) if present else 0

    def _tuning_keys(self, *, wrapping: bool) -> list[RunKey]:
        keys = []
        for arm in filter(self.plan.needs_trials, self.plan.tuned_arms):
            inner = self._inner(arm)
            if bool(arm.wraps) is wrapping and inner is not None:
                keys += [self._tuning_key(arm, trial, inner) for trial in range(self.plan.own_trials(arm))]
        return keys

    def _inner(self, arm: Arm) -> Config | None:
        """The settings that a wrapping arm takes over, so that it differs from the plain one in nothing
        else; () for the others."""
        return self.tuned(ARMS[arm.wraps]) if arm.wraps else ()

    def _timing_keys(self) -> list[RunKey]:
        keys = []
        for name in self.plan.arms:
            config = self.tuned(ARMS[name])
            if config is not None:
                keys += self._seed_keys(ARMS[name], config, self.plan.base_steps, "time")
        return keys

    def _target_keys(self) -> list[RunKey]:
        arm = self.reference_arm()
        config = self.tuned(arm) if arm is not None else None
        if arm is None or config is None:
            return []
        return self._seed_keys(arm, config, self.plan.base_steps, "target")

    def _shorter_keys(self) -> list[RunKey]:
        """The reference's, made with the target. None at a constant rate: the same run is read earlier."""
        arm = self.reference_arm()
        config = self.tuned(arm) if arm is not None else None
        if arm is None or config is None or arm.rule == "constant" or self.target() is None:
            return []
        return self._seed_keys(arm, config, self._shorter_steps, "race")

    @property
    def _shorter_steps(self) -> int:
        """A length of the lattice. Every arm of a decayed rule is run at it: a crossing below the planned
        length is interpolated from there, and an arm without it would be counted as reaching it later."""
        lattice = self.plan.lattice
        two_thirds = round(math.log(SHORTER_SHARE) / math.log(lattice.ratio))
        return lattice.steps(max(lattice.low, two_thirds))

    def _race_keys(self) -> list[RunKey]:
        return [key for name in self.plan.arms for key in self._arm_keys(ARMS[name])]

    def _arm_keys(self, arm: Arm) -> list[RunKey]:
        """Runs of the race asked for so far: all there when the arm has finished."""
        plan, config = self.plan, self.tuned(arm)
        if config is None:
            return []
        keys = self._seed_keys(arm, config, plan.base_steps, "race")
        if arm.rule == "constant":
            return keys + self._seed_keys(arm, config, plan.lattice.longest_steps, "race")
        keys += self._seed_keys(arm, config, self._shorter_steps, "race")
        state = self.crossing(arm)
        if isinstance(state, Found):
            state = self._around(arm, config, state) or state
        if state is None:
            return []
        length = plan.lattice.high if isinstance(state, Missed) else state.k
        return keys + self._seed_keys(arm, config, plan.lattice.steps(length), "race")

    def _around(self, arm: Arm, config: Config, found: Found) -> Ask | None:
        """A further length that single seeds need around the crossing of the mean."""
        lattice, target, passing = self.plan.lattice, self.target(), {}
        for k in range(lattice.low, lattice.high + 1):
            keys = self._seed_keys(arm, config, lattice.steps(k), "race")
            if all(map(self._is_known, keys)):
                passing[k] = {key.seed for key in keys if self._final_loss(key) <= target}
        reach = self.plan.bracket
        low, high = max(lattice.low, found.k - reach), min(lattice.high, found.k + reach)
        return bracket(passing, set(self.plan.seeds), found.k, low, high)

    def _seed_keys(self, arm: Arm, config: Config, steps: int, purpose: str) -> list[RunKey]:
        return [self._key(arm, config, steps, seed, purpose) for seed in self.plan.seeds]

    def _tuning_key(self, arm: Arm, trial: int, inner: Config) -> RunKey:
        config = trial_config(arm, self.plan.base, trial, inner)
        return self._key(arm, config, self.plan.base_steps, TUNING_SEED, "tune")

    def _key(self, arm: Arm, config: Config, steps: int, seed: int, purpose: str) -> RunKey:
        return RunKey(
            task=self.plan.task, arm=arm.name, config=config, planned_steps=steps, seed=seed, purpose=purpose
        )

    def _is_known(self, key: RunKey) -> bool:
        return key.identity in self.results or key.identity in self.failed

    def _final_loss(self, key: RunKey) -> float:
        result = self.results.get(key.identity)
        if result is None or result.diverged or not math.isfinite(result.final.read_loss):
            return math.inf
        return result.final.read_loss


def _turn(key: RunKey, arms: list[str]) -> tuple[int, int, str, int]:
    return key.seed, arms.index(key.arm), key.config_hash, key.planned_steps
