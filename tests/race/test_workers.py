"""Workers: every order is answered once; a worker that dies or raises costs its run alone."""

from __future__ import annotations

import pytest

from common.config import load_settings
from common.errors import SettingsError
from tests.race.fake_race import (
    fake_result,
    run_fake,
    run_or_die,
    run_or_raise,
    run_telling_threads,
    run_users_mistake,
)
from trainer_node.race.run_result import RunKey, RunResult
from trainer_node.race.workers import Answer, Failed, Runner, RunOrder, Workers, attempt

BASE = load_settings(preset="digits")


def order_of(seed: int) -> RunOrder:
    key = RunKey(task="digits", arm="ours", config=(), planned_steps=50, seed=seed, purpose="race")
    return RunOrder(key=key, base=BASE, eval_every_steps=10)


def answers_of(count: int, runner: Runner, seeds: range, budget: int = 100) -> dict[int, Answer]:
    """By seed. `budget`: after so many answers no run may start."""
    answers: dict[int, Answer] = {}
    with Workers(count, runner) as workers:
        for order, answer in workers.run(map(order_of, seeds), may_start=lambda: len(answers) < budget):
            assert order.key.seed not in answers
            answers[order.key.seed] = answer
    return answers


def test_results_do_not_depend_on_the_worker_process() -> None:
    answers = answers_of(2, run_fake, range(5))
    assert answers == {seed: fake_result(order_of(seed).key) for seed in range(5)}


def test_runs_that_must_be_alone_are_made_one_after_the_other() -> None:
    with Workers(2, run_fake) as workers:
        list(workers.run(map(order_of, range(2))))  # both workers are there
        seeds = []
        for order, _ in workers.run(map(order_of, range(6)), one_at_a_time=True):
            assert all(worker.order is None for worker in workers._workers)
            seeds.append(order.key.seed)
    assert seeds == list(range(6))


def test_a_dead_worker_costs_its_run_and_is_replaced() -> None:
    answers = answers_of(2, run_or_die, range(4))
    assert {seed: isinstance(answer, Failed) for seed, answer in answers.items()} == {
        0: False, 1: True, 2: False, 3: True,
    }  # fmt: skip
    assert answers[1] == Failed("its worker died (exit code 7)")


def test_an_error_in_a_run_is_one_line_with_its_trace_kept_apart() -> None:
    answer = attempt(run_or_raise, order_of(1))
    assert isinstance(answer, Failed)
    assert answer.reason.startswith("ZeroDivisionError: two lines (fake_race.py:")
    assert "Traceback" in answer.details
    assert isinstance(attempt(run_or_raise, order_of(2)), RunResult)


def test_a_mistake_of_the_user_ends_the_race() -> None:
    with pytest.raises(SettingsError, match="install the extra"):
        answers_of(1, run_users_mistake, range(3))


def test_a_worker_has_one_thread_before_torch_is_loaded() -> None:
    (answer,) = answers_of(1, run_telling_threads, range(1)).values()
    assert isinstance(answer, RunResult)
    assert answer.machine == "OMP 1, torch False"


def test_no_run_starts_after_the_time_is_up() -> None:
    assert set(answers_of(1, run_fake, range(5), budget=2)) == {0, 1}
