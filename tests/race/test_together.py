"""Taking turns changes what a run costs on the clock of the wall, and nothing else."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from common.config import load_settings
from trainer_node.race.race import _by_seed
from trainer_node.race.run_arm import run_arm
from trainer_node.race.run_result import RunKey, RunResult
from trainer_node.race.together import TURN_STEPS, ThreadClock, run_together
from trainer_node.race.workers import RunOrder

BASE = load_settings(
    preset="race-digits",
    overrides=[
        "trainer.model.channels=4", "trainer.statistics_steps=8", "trainer.window_steps=6",
        "trainer.probation_steps=6", "trainer.schedule.warmup_steps=4",
    ],
)  # fmt: skip
ARMS = ("adamw-decay", "ours-random", "ours-fixed")


def made(arm: str, after_step=lambda: None) -> RunResult:
    key = RunKey(task="digits", arm=arm, config=(), planned_steps=80, seed=1, purpose="time")
    return run_arm(key, BASE, clock=ThreadClock(), after_step=after_step)


def ends(result: RunResult) -> tuple[object, ...]:
    return [(p.steps, p.passes, p.loss) for p in result.curve], result.verdicts, result.cosines


def test_runs_that_take_turns_end_as_they_do_alone() -> None:
    together = run_together([lambda after, arm=arm: made(arm, after) for arm in ARMS])
    assert [ends(result) for result in together] == [ends(made(arm)) for arm in ARMS]
    assert any(dict(result.verdicts) for result in together), "no jump: the random state was not at stake"


def test_each_run_is_charged_for_its_own_work_only() -> None:
    """Seconds of a thread's core, which no other work on the machine can lengthen."""
    clock, turns = ThreadClock(), 3

    def run(work_seconds: float):
        def go(after_step) -> float:
            started_seconds = clock.monotonic()
            for turn in range(1, turns + 1):
                while clock.monotonic() - started_seconds < turn * work_seconds:
                    pass
                for _ in range(TURN_STEPS):
                    after_step()
            return clock.monotonic() - started_seconds

        return go

    idle_seconds, busy_seconds = run_together([run(0.0), run(0.1)])
    assert busy_seconds >= turns * 0.1
    assert idle_seconds < busy_seconds / 2


def test_turns_go_round_and_those_who_have_ended_are_left_out() -> None:
    order: list[str] = []

    def run(name: str, turns: int):
        def go(after_step) -> str:
            for _ in range(turns):
                order.append(name)
                for _ in range(TURN_STEPS):
                    after_step()
            return name

        return go

    assert run_together([run("a", 2), run("b", 4), run("c", 1)]) == ["a", "b", "c"]
    assert "".join(order) == "abcabbb"


def test_a_run_that_fails_does_not_stop_the_others_and_is_raised_at_the_end() -> None:
    ended = []

    def fails(after_step) -> None:
        raise ValueError("no data")

    def works(after_step) -> None:
        for _ in range(3 * TURN_STEPS):
            after_step()
        ended.append(threading.current_thread())

    with pytest.raises(ValueError, match="no data"):
        run_together([works, fails, works])
    assert len(ended) == 2


def test_the_random_state_of_a_run_is_its_own() -> None:
    def draws(seed: int):
        def go(after_step) -> list[float]:
            torch.manual_seed(seed)
            found = []
            for _ in range(4 * TURN_STEPS):
                found.append(torch.rand(()).item())
                after_step()
            return found

        return go

    alone = [draws(seed)(lambda: None) for seed in (1, 2)]
    assert run_together([draws(1), draws(2)]) == alone


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not let a thread choose")
def test_all_runs_keep_to_one_core_and_the_caller_gets_its_cores_back() -> None:
    before = os.sched_getaffinity(0)
    cores = run_together([lambda after: os.sched_getaffinity(0)] * 3)
    assert len(cores[0]) == 1
    assert cores[0] <= before
    assert cores == [cores[0]] * 3
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match="no data"):
        run_together([_fails])
    assert os.sched_getaffinity(0) == before


def _fails(after_step) -> None:
    raise ValueError("no data")


def test_every_arm_of_a_race_is_first_in_the_round_equally_often() -> None:
    keys = [
        RunKey(task="digits", arm=arm, config=(), planned_steps=80, seed=seed, purpose="time")
        for seed in range(6)
        for arm in ARMS
    ]
    rounds = _by_seed([RunOrder(key=key, base=BASE, eval_every_steps=None) for key in keys])
    assert [order.key.arm for order in rounds] == [*ARMS, *ARMS]
    for order in rounds:
        everyone = [order, *order.together]
        assert {each.key.seed for each in everyone} == {order.key.seed}
        assert sorted(each.key.arm for each in everyone) == sorted(ARMS)
