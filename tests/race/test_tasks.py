"""Race tasks: every one is a preset that can be raced, or says in one line what it needs."""

from __future__ import annotations

import pytest

from common.config import preset_names
from common.errors import SettingsError
from trainer_node.race.arms import ARMS
from trainer_node.race.rules import RULES
from trainer_node.race.tasks import CPU_TASKS, NEEDS_DATA, TASKS, race_settings


def settings_of(task: str):
    return race_settings(task, "some.txt" if task in NEEDS_DATA else "")


def test_every_race_preset_is_a_task_and_the_other_way_round() -> None:
    presets = {name.removeprefix("race-") for name in preset_names() if name.startswith("race-")}
    assert presets == set(TASKS)


@pytest.mark.parametrize("task", CPU_TASKS)
def test_cpu_tasks_are_deterministic_and_use_one_thread(task: str) -> None:
    trainer = settings_of(task).trainer
    assert (trainer.threads, trainer.decision_mode, trainer.optimizer.name) == (1, "lockstep", "adamw")
    assert trainer.schedule.name in ("wsd", "linear")
    longest_share = 0.22 if task == "digits" else 0.15  # 32 steps of 150: fewer were not tried there
    assert 0.05 <= trainer.schedule.warmup_steps / trainer.steps <= longest_share
    # Room for jumps between warm-up and the decay tail.
    stable = trainer.steps * (1 - trainer.schedule.decay_share) - trainer.statistics_steps
    cycles = 2 if task == "digits" else 3  # longer runs of digits are past their best length
    assert stable > cycles * (trainer.window_steps + trainer.probation_steps)


def test_the_large_batch_differs_from_python_in_batch_and_length() -> None:
    small, large = race_settings("python").trainer, race_settings("large-batch").trainer
    assert small.model == large.model
    assert 4 <= large.batch.sequences / small.batch.sequences <= 8


@pytest.mark.parametrize("task", sorted(NEEDS_DATA))
def test_a_task_without_text_names_the_option(task: str) -> None:
    with pytest.raises(SettingsError, match="--data FILE") as caught:
        race_settings(task)
    assert "\n" not in str(caught.value)
    assert race_settings(task, "my.txt").trainer.data.path == "my.txt"
    assert race_settings(task, overrides=["trainer.data.path=my.txt"]).trainer.data.path == "my.txt"


@pytest.mark.parametrize("task", ["digits", "regression"])
def test_a_task_with_data_of_its_own_takes_no_other(task: str) -> None:
    with pytest.raises(SettingsError, match="leave out --data"):
        race_settings(task, "my.txt")


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean digits"):
        race_settings("digit")


def test_overrides_win() -> None:
    assert race_settings("digits", overrides=["trainer.steps=123"]).trainer.steps == 123


def test_targets_come_from_plain_arms_of_their_rule() -> None:
    for rule, target in RULES.items():
        assert target.name == rule
        for name in target.plain_arms:
            assert not ARMS[name].is_ours
            assert ARMS[name].rule == ("constant" if rule == "constant" else "decayed")
