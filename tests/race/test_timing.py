"""Seconds come from the timed run of the same arm and seed; steps, passes and losses from the run itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.race.fake_race import fake_result
from trainer_node.race.run_result import RunKey, RunResult
from trainer_node.race.timing import retimed


def result(purpose: str, *, steps: int, slower: float = 1.0) -> RunResult:
    key = RunKey(task="digits", arm="ours", config=(), planned_steps=steps, seed=3, purpose=purpose)
    made = fake_result(key)
    curve = [
        replace(point, trainer_seconds=slower * 0.01 * point.passes, predictor_seconds=0.001 * point.passes)
        for point in made.curve
    ]
    return replace(made, curve=tuple(curve))


def test_a_run_on_a_busy_machine_gets_the_seconds_of_the_timed_one() -> None:
    busy, timed = result("race", steps=200, slower=5.0), result("time", steps=100)
    (run,) = retimed([busy, timed])
    assert run.final.trainer_seconds == pytest.approx(0.01 * busy.final.passes)
    assert run.final.predictor_seconds == pytest.approx(0.001 * busy.final.passes)
    assert (run.final.loss, run.final.steps, run.final.passes) == (
        busy.final.loss, busy.final.steps, busy.final.passes,
    )  # fmt: skip


def test_without_a_timed_run_of_the_same_arm_and_seed_nothing_changes() -> None:
    busy, timed = result("race", steps=200, slower=5.0), result("time", steps=100)
    other = replace(timed, key=replace(timed.key, seed=4))
    assert retimed([busy, other]) == [busy]


def test_a_timed_run_never_stands_in_for_one_of_the_race() -> None:
    assert result("time", steps=100).key.identity != result("race", steps=100).key.identity
    assert retimed([result("time", steps=100)]) == []
