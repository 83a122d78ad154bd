"""The table of arms: settings that hold together, tuned ones that exist, wrapping that fits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from common.config import load_settings, setting_rows
from common.errors import SettingsError
from common.schedule import rate_factor
from tests.trainer.small_job import DRIFT, small_job
from trainer_node.race.arms import ARMS, KNOB, arm_named, knobs_of, run_settings
from trainer_node.race.optimizers import METHODS
from trainer_node.race.rules import RULES

BASE = load_settings(preset="race-digits")
KNOWN = {key for key, _, _ in setting_rows()}


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_every_arm_names_settings_knobs_method_and_inner_arm_that_exist(arm) -> None:
    knobs = {key for key, _ in arm.knobs}
    assert set(arm.tuned) <= KNOWN | knobs
    assert all(key.startswith(KNOB) for key in knobs)
    raced_untuned = [name for rule in RULES.values() for name in rule.arms if not rule.tunes]
    is_choice_of_another = bool(ARMS[arm.wraps].tuned) if arm.wraps else False
    assert arm.tuned or arm.name in raced_untuned or is_choice_of_another, "it has no share of the trials"
    assert {key for key, _ in arm.off_by} <= set(ARMS[arm.wraps].tuned) if arm.off_by else True
    assert arm.method in METHODS
    assert "\n" not in arm.meaning
    if arm.wraps:
        inner = ARMS[arm.wraps]
        assert (inner.wraps, inner.base_optimizer, inner.rule) == ("", arm.base_optimizer, arm.rule)


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
@pytest.mark.parametrize("steps", [20, 100, 4000])
def test_schedule_and_warm_up_follow_the_planned_length(arm, steps: int) -> None:
    trainer = run_settings(arm, BASE, (), steps=steps, seed=7).trainer
    assert (trainer.steps, trainer.seed, trainer.decision_mode) == (steps, 7, "lockstep")
    factors = [rate_factor(step, steps, trainer.schedule) for step in range(steps)]
    assert factors[-1] == (1.0 if arm.rule == "constant" else 0.0)
    assert factors.index(1.0) <= steps // 4
    assert trainer.schedule.warmup_steps == min(BASE.trainer.schedule.warmup_steps, steps // 4)


def test_only_ours_asks_a_predictor() -> None:
    enabled = {
        name: run_settings(arm, BASE, (), steps=50, seed=0).predictor.enabled for name, arm in ARMS.items()
    }
    assert enabled == {name: arm.is_ours for name, arm in ARMS.items()}


def test_arms_that_show_what_a_part_is_worth_differ_from_ours_in_that_part_alone() -> None:
    ours = run_settings(ARMS["ours-aggressive"], BASE, (), steps=50, seed=0)
    parts = {
        "ours": ("predictor", "temper", "balanced"),
        "ours-conservative": ("predictor", "temper", "conservative"),
        "ours-unguarded": ("trainer", "verify", dataclasses.replace(ours.trainer.verify, enabled=False)),
        "ours-random": ("trainer", "basis", dataclasses.replace(ours.trainer.basis, ablation="random")),
        "ours-phi": ("trainer", "basis", dataclasses.replace(ours.trainer.basis, history_snapshots=5)),
    }
    for name, (table, field, value) in parts.items():
        changed = dataclasses.replace(getattr(ours, table), **{field: value})
        expected = dataclasses.replace(ours, **{table: changed})
        assert run_settings(ARMS[name], BASE, (), steps=50, seed=0) == expected


def test_tuned_settings_win_over_those_of_the_arm_and_knobs_stay_out_of_the_settings() -> None:
    config = (("arm.outer_rate", 0.9), ("predictor.horizon_steps", (3, 4)), ("trainer.optimizer.rate", 0.25))
    settings = run_settings(ARMS["snoo"], BASE, config, steps=50, seed=0)
    assert settings.trainer.optimizer.rate == 0.25
    assert settings.predictor.horizon_steps == (3, 4)
    knobs = knobs_of(ARMS["snoo"], config)
    assert knobs == {"inner_steps": 20, "outer_rate": 0.9, "outer_momentum": 0.5}


def test_data_and_predictor_state_reach_the_run() -> None:
    settings = run_settings(ARMS["ours"], BASE, (), steps=50, seed=0, data="a.txt", state="folder")
    assert (settings.trainer.data.path, settings.predictor.state) == ("a.txt", "folder")
    assert run_settings(ARMS["snoo"], BASE, (), steps=50, seed=0, state="folder").predictor.state == ""


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: arm_named("shnoo"), "did you mean snoo"),
        (lambda: arm_named("zzz"), "race --list"),
        (lambda: arm_named("ours-hand-free"), "did you mean ours-hands-free"),
        (lambda: knobs_of(ARMS["snoo"], (("arm.push_steps", 1.0),)), "arm.outer_rate"),
        (lambda: run_settings(ARMS["ours"], BASE, (("trainer.rates", 1),), steps=9, seed=0), "trainer.rates"),
    ],
)
def test_mistakes_are_one_line_that_names_the_cure(call, hint: str) -> None:
    with pytest.raises(SettingsError, match=hint) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_line_fit_follows_the_line_through_the_ends_of_each_weights_window() -> None:
    settings = run_settings(ARMS["line-fit"], BASE, (), steps=50, seed=0)
    assert settings.predictor.drift_gain == 1.0
    job = small_job(average_steps=settings.trainer.basis.average_steps)
    job.step()
    before = [p.detach().clone() for p in job.model.parameters()]
    job.window(5)
    moved = dict(zip(job.model.parameters(), before, strict=True))
    for index, directions in job.basis.directions():
        parameter = job.basis.parameters[index]
        torch.testing.assert_close(directions[DRIFT], parameter.detach() - moved[parameter])
