"""One run of one arm: same start for all, true costs, the referee's time counted for nobody."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from common.bus import EntryId
from common.clock import FakeClock, SystemClock
from common.config import load_settings
from common.messages import Message, RunStarted
from common.settings import RunSettings
from predictor_node.node import in_memory_predictor
from trainer_node.assembly import build_loop, prepare_task
from trainer_node.links import NoDecisions
from trainer_node.race.arms import ARMS, Pairs, run_settings
from trainer_node.race.run_arm import run_arm, run_task
from trainer_node.race.run_result import RunKey, RunResult, from_json_line, to_json_line
from trainer_node.tasks import Task

STEPS = 48
BASE = load_settings(
    preset="race-digits",
    overrides=[
        "trainer.statistics_steps=6",
        "trainer.window_steps=6",
        "trainer.probation_steps=4",
        "trainer.model.channels=4",
        "trainer.batch.sequences=16",
        "trainer.batch.accumulation=2",
        "trainer.basis.sample_size=64",
        "trainer.basis.average_steps=4",
        "trainer.schedule.warmup_steps=4",
        "predictor.rest_windows=0",
    ],
)
FIXED_OURS: Pairs = (("predictor.policy", "fixed"),)


def key_of(arm: str, *, steps: int = STEPS, seed: int = 0, config: Pairs = ()) -> RunKey:
    return RunKey(task="digits", arm=arm, config=config, planned_steps=steps, seed=seed, purpose="race")


def settings_of(key: RunKey) -> RunSettings:
    return run_settings(ARMS[key.arm], BASE, key.config, steps=key.planned_steps, seed=key.seed)


def run(
    key: RunKey,
    *,
    change: Callable[[Task], Task] = lambda task: task,
    clock: FakeClock | None = None,
    every_steps: int | None = None,
) -> RunResult:
    settings = settings_of(key)
    return run_task(
        key,
        settings,
        change(prepare_task(settings.trainer)),
        eval_every_steps=every_steps,
        predictor=in_memory_predictor,
        clock=clock or SystemClock(),
    )


class Listener:
    """The task's loss, with the training losses and weights of the run written down."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[torch.Tensor] = []

    def __call__(self, task: Task) -> Task:
        def loss(batch: object) -> torch.Tensor:
            value = task.loss(batch)
            if task.model.training:
                self.losses.append(float(value.detach()))
            return value

        self.weights = list(task.model.parameters())
        return replace(task, loss=loss)


def first_losses(arm: str, seed: int) -> tuple[float, ...]:
    listener = Listener()
    config = FIXED_OURS if ARMS[arm].is_ours else ()
    result = run(key_of(arm, steps=2, seed=seed, config=config), change=listener, every_steps=2)
    return (result.curve[0].loss, *listener.losses[:2])  # before any update, both micro-batches


def test_every_arm_starts_from_the_same_weights_and_sees_the_same_batches() -> None:
    expected = first_losses("adamw-constant", seed=5)
    assert {arm: first_losses(arm, seed=5) for arm in ARMS} == dict.fromkeys(ARMS, expected)
    assert not set(first_losses("adamw-decay", seed=6)) & set(expected)


def test_the_plain_arm_is_the_phase_loop_without_prediction_bit_for_bit() -> None:
    listener, key = Listener(), key_of("adamw-decay")
    run(key, change=listener)
    settings = settings_of(key)
    task = prepare_task(settings.trainer)
    loop = build_loop(
        task,
        settings,
        links=NoDecisions(),
        emit=lambda _: None,
        housekeeping=lambda _: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    loop.run()
    assert all(torch.equal(a, b) for a, b in zip(listener.weights, task.model.parameters(), strict=True))


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if not arm.is_ours])
def test_no_arm_of_others_takes_extra_passes(arm: str) -> None:
    listener = Listener()
    result = run(key_of(arm), change=listener)
    assert result.final.backward_passes == len(listener.losses) == 2 * STEPS
    assert result.final.passes == 3 * 2 * STEPS
    assert result.final.predictor_seconds == 0.0


def test_ours_pays_for_checks_and_for_steps_that_were_undone() -> None:
    listener, checks = Listener(), []
    config = (*FIXED_OURS, ("trainer.verify.tolerance", 0.0))

    def counted(task: Task) -> Task:
        guard = task.train.guard

        def count_guard(index: int) -> object:
            checks.append(index)
            return guard(index)

        task.train.guard = count_guard
        return listener(task)

    result = run(key_of("ours-fixed", steps=96, config=config), change=counted)
    verdicts = dict(result.verdicts)
    assert verdicts.get("accepted", 0)
    assert verdicts.get("refused", 0)
    assert result.final.steps == 96
    assert result.final.backward_passes == len(listener.losses) > 2 * 96
    assert result.final.passes == 3 * result.final.backward_passes + len(checks)


class Timed:
    """A clock that only work moves: 1 s per training pass, 100 s per reading, 7 s per message."""

    def __init__(self) -> None:
        self.clock = FakeClock()

    def __call__(self, task: Task) -> Task:
        def loss(batch: object) -> torch.Tensor:
            self.clock.advance(1.0 if task.model.training else 100.0)
            return task.loss(batch)

        return replace(task, loss=loss)

    def predictor(self) -> SlowPredictor:
        return SlowPredictor(self.clock)


class SlowPredictor:
    def __init__(self, clock: FakeClock) -> None:
        self._clock, self.seen = clock, []

    def handle(self, message: Message, entry_id: EntryId) -> list[Message]:
        self._clock.advance(7.0)
        self.seen.append((message, entry_id))
        return []


def test_seconds_leave_out_every_reading_but_not_the_choice_between_weights_and_average() -> None:
    """The choice is in the passes too (two guard batches): once, as at a run's end, however often read."""
    for arm in ("adamw-constant", "adamw-decay-ema"):
        timed = Timed()
        result = run(key_of(arm), change=timed, clock=timed.clock)
        assert [p.trainer_seconds for p in result.curve] == [2.0 * p.steps for p in result.curve]
    for every_steps in (6, STEPS):
        timed, key = Timed(), key_of("ours-constant", config=(("trainer.read_out", "average"),))
        settings = settings_of(key)
        task = timed(prepare_task(settings.trainer))
        result = run_task(
            key,
            settings,
            task,
            eval_every_steps=every_steps,
            predictor=timed.predictor,
            clock=timed.clock,
            span_clock=timed.clock,
        )
        assert result.final.trainer_seconds == 2.0 * STEPS + 2 * 100.0


def test_the_predictor_is_timed_apart_from_the_trainer() -> None:
    timed, key = Timed(), key_of("ours-constant")
    settings, predictors = settings_of(key), []

    def make() -> SlowPredictor:
        predictors.append(timed.predictor())
        return predictors[-1]

    task = timed(prepare_task(settings.trainer))
    result = run_task(key, settings, task, predictor=make, clock=timed.clock, span_clock=timed.clock)
    (predictor,) = predictors
    assert result.final.trainer_seconds == 2.0 * STEPS + 2 * 100.0  # the choice of the weights handed out
    assert result.final.predictor_seconds == 7.0 * len(predictor.seen)
    assert isinstance(predictor.seen[0][0], RunStarted)
    assert [entry.sequence for _, entry in predictor.seen] == list(range(1, len(predictor.seen) + 1))
    assert dict(result.verdicts) == {"missing": 6}


class AskedClock(FakeClock):
    def __init__(self) -> None:
        super().__init__()
        self.times_asked = 0

    def monotonic(self) -> float:
        self.times_asked += 1
        return super().monotonic()


@pytest.mark.parametrize("arm", ["adamw-constant", "ours-constant"])
def test_the_clock_of_a_run_is_asked_at_readings_only(arm: str) -> None:
    """A core's clock is slow to ask behind a step: an arm that asked it in every step would pay for it."""
    clock = AskedClock()
    result = run(key_of(arm), clock=clock)
    each = 4 if arm == "ours-constant" else 2  # before and after a reading, and the choice of weights in it
    assert clock.times_asked == 2 + each * len(result.curve)  # made, started


@pytest.mark.parametrize(("arm", "points"), [("adamw-constant", 41), ("adamw-decay", 11), ("snoo", 11)])
def test_constant_arms_are_read_every_fortieth_of_the_run_and_decayed_ones_every_tenth(
    arm: str, points: int
) -> None:
    curve = run(key_of(arm, steps=80)).curve
    assert len(curve) == points
    assert (curve[0].steps, curve[-1].steps) == (0, 80)
    assert all(a.steps < b.steps for a, b in pairwise(curve))


def test_a_wished_grid_is_kept() -> None:
    assert [p.steps for p in run(key_of("adamw-decay"), every_steps=20).curve] == [0, 20, 40, STEPS]


@pytest.mark.parametrize("arm", ["adamw-constant", "ours-fixed"])
def test_a_run_whose_loss_is_lost_ends_and_counts_as_a_miss(arm: str) -> None:
    def poisoned(task: Task) -> Task:
        taken = []

        def loss(batch: object) -> torch.Tensor:
            taken.append(task.model.training)
            return task.loss(batch) * (math.nan if sum(taken) > 20 else 1.0)

        return replace(task, loss=loss)

    result = run(key_of(arm, steps=400), change=poisoned, every_steps=400)
    assert result.diverged
    assert result.final.steps <= 16
    assert result.final.loss == result.final.read_loss == math.inf
    assert from_json_line(to_json_line(result)) == result
    assert not run(key_of(arm)).diverged


def test_averaged_arms_read_other_weights_than_the_raw_ones_and_train_on_unchanged() -> None:
    plain, averaged = run(key_of("adamw-decay")), run(key_of("adamw-decay-ema"))
    assert [p.loss for p in averaged.curve] == [p.loss for p in plain.curve]
    assert [p.read_loss for p in plain.curve] == [p.loss for p in plain.curve]
    assert averaged.final.read_loss != averaged.final.loss


def test_ours_with_an_average_is_charged_for_one_choice_of_weights_and_not_for_every_reading() -> None:
    key = key_of("ours-constant", config=(*FIXED_OURS, ("trainer.read_out", "average")))
    often, once = run(key, every_steps=6), run(key, every_steps=STEPS)
    assert any(p.read_loss != p.loss for p in often.curve)
    assert (often.final.passes, often.final.loss) == (once.final.passes, once.final.loss)
    raw = key_of("ours-constant", config=(*FIXED_OURS, ("trainer.read_out", "weights")))
    plain = run(raw)
    assert plain.final.passes == once.final.passes - 2
    assert all(p.read_loss == p.loss for p in plain.curve)


def test_equal_keys_give_equal_runs() -> None:
    key = key_of("ours-fixed", config=FIXED_OURS)

    def without_seconds(result: RunResult) -> list[tuple[object, ...]]:
        assert result.phases
        return [(p.steps, p.passes, p.backward_passes, p.loss, p.read_loss) for p in result.curve]

    assert without_seconds(run(key)) == without_seconds(run(key))


def test_run_arm_builds_the_task_itself_and_its_line_survives_the_results_file() -> None:
    result = run_arm(key_of("adamw-decay", steps=10), BASE, data=None, eval_every_steps=5)
    assert [p.steps for p in result.curve] == [0, 5, 10]
    assert f"torch {torch.__version__}" in result.machine
    assert result.peak_bytes > 2**20
    assert from_json_line(to_json_line(result)) == result
