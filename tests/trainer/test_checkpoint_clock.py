"""The interval of checkpoints: the cheapest one there is, within the overhead that was promised."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_clock import (
    MAX_OVERHEAD_SHARE,
    CheckpointClock,
    interval_seconds,
    interval_steps,
)
from trainer_node.housekeeping import Housekeeping

COSTS, FAILURES = st.floats(1e-3, 1e3), st.floats(60.0, 1e7)


@settings(deadline=None)
@given(COSTS, FAILURES, st.floats(1e-4, 1e3))
def test_checkpoints_never_cost_more_than_promised(cost: float, failure: float, step_seconds: float) -> None:
    steps = interval_steps(cost, failure, step_seconds=step_seconds)
    assert steps >= 1
    assert cost / (steps * step_seconds) <= MAX_OVERHEAD_SHARE * (1 + 1e-9)


@settings(deadline=None)
@given(COSTS, FAILURES, st.floats(0.2, 5.0))
def test_no_other_interval_loses_less_unless_it_breaks_the_bound(
    cost: float, failure: float, other: float
) -> None:
    """Lost share of time: saving, and on average half an interval at each failure (Young 1974)."""

    def lost(interval: float) -> float:
        return cost / interval + interval / (2 * failure)

    ours = interval_seconds(cost, failure)
    if cost / (other * ours) <= MAX_OVERHEAD_SHARE:
        assert lost(ours) <= lost(other * ours) * (1 + 1e-9)


def test_a_simulated_run_with_failures_agrees() -> None:
    """A slow twin: work of ten thousand hours, failures as a Poisson process, no formula."""

    def seconds_needed(interval: float, cost: float, failure: float) -> float:
        rng, work, wall = random.Random(0), 3.6e7, 0.0
        next_failure = rng.expovariate(1 / failure)
        while work > 0:
            wall += interval + cost
            if wall > next_failure:  # the interval is lost; the run goes on from the checkpoint
                next_failure = wall + rng.expovariate(1 / failure)
                continue
            work -= interval
        return wall

    cost, failure = 30.0, 8 * 3600.0
    ours = interval_seconds(cost, failure)
    needed = {factor: seconds_needed(factor * ours, cost, failure) for factor in (0.3, 1.0, 3.0)}
    assert needed[1.0] == min(needed.values())


def test_a_cost_is_forgotten_by_halves() -> None:
    clock = CheckpointClock()
    assert clock.cost_seconds is None
    for seconds, expected in ((4.0, 4.0), (8.0, 6.0), (6.0, 6.0)):
        clock.measured(seconds)
        assert clock.cost_seconds == expected


def intervals(tmp_path, *overrides: str) -> list[int]:
    """Steps between the checkpoints of a run that costs 2 s each to save, in steps of 50 ms."""
    links = ScriptedLinks()
    checkpoints = Checkpoints(tmp_path, keep=1, on_failure=pytest.fail)
    housekeeping = Housekeeping(links.emit, checkpoints)
    settings = tiny_settings("predictor.enabled=false", "trainer.checkpoint.every_steps=7", *overrides)
    loop = tiny_loop(links, settings)
    loop.progress.features.seconds.values = [0.05] * 9
    housekeeping._clock.measured(2.0)
    steps = housekeeping._checkpoint_steps(loop)
    housekeeping._clock.cost_seconds = None
    first = housekeeping._checkpoint_steps(loop)
    checkpoints.close()
    return [first, steps]


def test_the_clock_is_off_unless_asked_for_and_in_lockstep(tmp_path) -> None:
    assert intervals(tmp_path, "trainer.decision_mode=live") == [7, 7]
    assert intervals(tmp_path, "trainer.checkpoint.hours_between_failures=24.0") == [7, 7]


def test_the_clock_takes_over_once_a_checkpoint_was_measured(tmp_path) -> None:
    live = ("trainer.decision_mode=live", "trainer.checkpoint.hours_between_failures=24.0")
    assert intervals(tmp_path, *live) == [7, math.ceil(math.sqrt(2 * 2.0 * 86400) / 0.05)]
    assert intervals(tmp_path, *live, "trainer.checkpoint.every_steps=0") == [50, 11758]
