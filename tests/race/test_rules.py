"""Every rule: arms that exist and build, the reference that was agreed, trials only where allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import SettingsError
from common.settings import OptimizerSettings, RunSettings
from tests.race.fake_race import run_fake
from tests.race.synthetic_race import record, run
from trainer_node.race import evidence
from trainer_node.race.arm_table import ARMS, BATCH_FACTOR, GROUPS
from trainer_node.race.arms import run_settings
from trainer_node.race.figures import race_figures
from trainer_node.race.look import DASHES, colour_of
from trainer_node.race.options import RaceOptions, plan_of
from trainer_node.race.plan import TUNING_SEED, RacePlan, chosen_arms
from trainer_node.race.race import race
from trainer_node.race.results import FILE_NAME, read_results
from trainer_node.race.rules import RULES, headline_arm
from trainer_node.race.run_result import RunKey
from trainer_node.race.show import list_lines
from trainer_node.race.space import trial_config
from trainer_node.race.tasks import CPU_TASKS, NEEDS_DATA
from trainer_node.race.waves import Standing
from trainer_node.race.words import headline

RATE = "trainer.optimizer.rate"
REFERENCES = {
    "whole-stack": ("adamw-cosine",),
    "untuned": ("adamw-3e-4-cosine", "adamw-1e-3-cosine"),
    "hands-free": ("adamw-swept",),
    "ramp": ("adamw-swept",),
    "controls": ("adamw-decay",),
}
UNTUNED = [name for name, rule in RULES.items() if not rule.tunes]


def plan_for(task: str, rule: str, **more: object) -> RacePlan:
    data = "book.txt" if task in NEEDS_DATA else None
    return plan_of(RaceOptions(task=task, rule=rule, data=data, **more))  # type: ignore[arg-type]


def settings_at_defaults(plan: RacePlan, name: str) -> RunSettings:
    arm = ARMS[name]
    inner = trial_config(ARMS[arm.wraps], plan.base, 0) if arm.wraps else ()
    config = trial_config(arm, plan.base, 0, inner)
    return run_settings(arm, plan.base, config, steps=plan.base_steps, seed=0)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "fitted"])
@pytest.mark.parametrize("task", CPU_TASKS)
def test_the_default_arms_of_every_rule_exist_and_build_their_settings(task: str, rule: str) -> None:
    plan = plan_for(task, rule)
    assert set(plan.arms) == set(RULES[rule].arms)
    assert set(RULES[rule].quick_arms) <= set(plan.arms)
    assert headline_arm(plan.arms, rule)
    for name in plan.arms:
        settings = settings_at_defaults(plan, name)
        assert settings.trainer.optimizer.name == ARMS[name].base_optimizer


@pytest.mark.parametrize("rule", REFERENCES)
def test_the_reference_is_the_one_that_was_agreed_and_is_raced_whoever_else_is(rule: str) -> None:
    assert RULES[rule].plain_arms == REFERENCES[rule]
    assert REFERENCES[rule][0] in chosen_arms(rule, RULES[rule].headlines)
    assert all(not ARMS[name].is_ours for name in REFERENCES[rule])
    told = {name for part in RULES[rule].parts for name in (part.arm, part.versus)}
    assert told <= set(RULES[rule].arms), "a part that is not raced says nothing"


def test_whole_stack_parts_lead_from_the_reference_to_ours_one_at_a_time() -> None:
    plan = plan_for("python", "whole-stack")
    at = {name: settings_at_defaults(plan, name) for name in plan.arms}
    assert at["adamw-cosine"].trainer.schedule.name == "cosine"
    assert at["adamw-decay"].trainer.schedule.name == "wsd"
    assert at["muon-decay"].trainer.schedule == at["adamw-decay"].trainer.schedule
    assert at["ours-muon"].predictor.enabled
    assert at["ours-muon"].predictor.temper == "balanced"
    assert at["ours-muon"].trainer == at["muon-decay"].trainer
    assert at["ours-cosine"].trainer == at["adamw-cosine"].trainer
    assert at["muon-cosine"].trainer.schedule == at["adamw-cosine"].trainer.schedule
    assert at["adamw-cosine-ema"].trainer == at["adamw-cosine"].trainer


def test_the_tuned_reference_of_the_whole_stack_has_no_fewer_trials_than_ours() -> None:
    """Those of the arm that ours wraps, whose choice it takes; ours has none on top of them."""
    plan = plan_for("python", "whole-stack")
    plain = [
        plan.own_trials(ARMS[name]) for name in ("adamw-cosine", "adamw-decay", "muon-decay", "muon-cosine")
    ]
    assert plain == [2 * plan.trials] * 4
    for name in ("ours-muon", "ours-cosine"):
        assert not plan.needs_trials(ARMS[name])
    few = plan_for("python", "whole-stack", arms="adamw-cosine,muon-decay,ours-muon")
    assert few.own_trials(ARMS["adamw-cosine"]) == few.own_trials(ARMS["muon-decay"]) == few.trials


def test_the_untuned_reference_keeps_its_rate_and_the_batch_of_the_task() -> None:
    for task in CPU_TASKS:
        plan = plan_for(task, "untuned")
        for name, rate in (("adamw-3e-4-cosine", 3e-4), ("adamw-1e-3-cosine", 1e-3)):
            trainer = settings_at_defaults(plan, name).trainer
            assert (trainer.optimizer.rate, trainer.schedule.name) == (rate, "cosine")
            assert trainer.batch == plan.base.trainer.batch
        ours = settings_at_defaults(plan, "ours-muon").trainer.optimizer
        preset = plan.base.trainer.optimizer
        assert (ours.rate, ours.muon_rate) == (preset.rate, preset.muon_rate)


def test_the_untuned_headline_runs_at_the_product_s_defaults_and_not_at_rates_swept_on_the_task() -> None:
    assert RULES["untuned"].headlines == ("ours-muon-defaults",)
    for task in CPU_TASKS:
        plan = plan_for(task, "untuned")
        own = settings_at_defaults(plan, "ours-muon-defaults").trainer
        assert own.optimizer == OptimizerSettings()
        assert own == settings_at_defaults(plan, "muon-defaults").trainer


def test_hands_free_arms_start_four_times_off_what_the_sweep_chose_with_rate_and_batch_controlled() -> None:
    plan = plan_for("python", "hands-free")
    swept = ((BATCH_FACTOR, 1.0), (RATE, 0.004))
    starts = []
    for name in GROUPS["ours-hands-free"]:
        config = dict(trial_config(ARMS[name], plan.base, 0, swept))
        starts.append((config[RATE] / 0.004, config[BATCH_FACTOR]))
        controls = settings_at_defaults(plan, name).trainer.controls
        assert (controls.rate, controls.batch) == (True, True)
        assert {controls.context, controls.decay, controls.read_out} == {False}
    assert sorted(starts) == [(0.25, 1.0), (1.0, 0.25), (1.0, 4.0), (4.0, 1.0)]
    assert dict(trial_config(ARMS["ours-ramp"], plan.base, 0, swept)) == dict(swept)
    assert dict(trial_config(ARMS["ours-rescue"], plan.base, 0, swept))[RATE] == pytest.approx(0.12)


def test_the_sweep_has_sixteen_trials_and_our_arms_none() -> None:
    for rule in ("hands-free", "ramp"):
        plan = plan_for("digits", rule)
        assert plan.own_trials(ARMS["adamw-swept"]) == 16
        assert not any(plan.needs_trials(ARMS[name]) for name in plan.arms if ARMS[name].is_ours)


@pytest.mark.parametrize("rule", REFERENCES)
def test_no_two_arms_of_a_rule_look_the_same_in_its_pictures(rule: str) -> None:
    looks = [(colour_of(name), DASHES.get(name, "-")) for name in RULES[rule].arms]
    assert len(set(looks)) == len(looks), sorted(map(str, looks))


def test_every_control_stands_alone_and_all_of_them_together() -> None:
    plan = plan_for("python", "controls")
    fields = ("rate", "batch", "context", "decay", "read_out")

    def on(name: str) -> set[str]:
        controls = settings_at_defaults(plan, name).trainer.controls
        return {field for field in fields if getattr(controls, field)}

    assert on("ours-controls") == set(fields)
    assert on("ours") == on("adamw-decay") == set()
    for field in fields:
        assert on(f"ours-controls-{field.replace('_', '-')}") == {field}


@pytest.mark.parametrize("rule", UNTUNED)
def test_a_rule_that_tunes_nothing_takes_no_trials(rule: str) -> None:
    with pytest.raises(SettingsError, match="tunes nothing: leave out --trials"):
        plan_for("digits", rule, trials=4)
    plan = plan_for("digits", rule)
    wave = Standing(plan, {}).next_wave()
    assert wave is not None
    rivals = len(RULES[rule].plain_arms) > 1
    assert wave.phase == ("tune" if rivals else "target")
    assert {key.arm for key in wave.keys} == set(RULES[rule].plain_arms), (
        "only rivals are compared beforehand"
    )


def fake_options(out: Path, rule: str, **more: object) -> RaceOptions:
    values = {"task": "digits", "workers": 1, "seeds": 2, "today": "2026-11-22", "coarse": True, **more}
    return RaceOptions(out=out, rule=rule, **values)  # type: ignore[arg-type]


def runs_of(out: Path) -> dict[str, RunKey]:
    return {identity: run.key for identity, run in read_results(out / FILE_NAME)[0].items()}


@pytest.mark.parametrize("rule", REFERENCES)
def test_a_race_of_every_rule_goes_on_where_it_stopped_and_writes_its_evidence(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_node.race.plots.draw_all", lambda out_dir, figures: {})
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert race(fake_options(out, rule, evidence=True), runner=run_fake) == 0
    whole = runs_of(out)
    (path,) = (tmp_path / evidence.FOLDER).glob("*.json")
    assert path.name == f"digits.{rule}.json"
    first = evidence.read(path)
    assert first.reference_arm in REFERENCES[rule]
    assert first.headline_arm == RULES[rule].headlines[0]
    assert first.against(first.reference_arm) is not None
    assert first.missing == ()
    told = {(part.arm, part.versus) for part in RULES[rule].parts}
    assert told <= {(pair.arm, pair.versus) for pair in first.pairs}
    content = (out / FILE_NAME).read_bytes()
    (out / FILE_NAME).write_bytes(content[: len(content) // 2])
    assert race(fake_options(out, rule, evidence=True), runner=run_fake) == 0
    assert runs_of(out).keys() == whole.keys()
    assert evidence.read(path) == first
    if not RULES[rule].tunes:
        tried = {key.arm for key in whole.values() if key.seed == TUNING_SEED}
        assert tried == (set(RULES[rule].plain_arms) if rule == "untuned" else set())


@pytest.mark.parametrize("rule", REFERENCES)
def test_a_quick_race_of_every_rule_has_a_result(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_node.race.plots.draw_all", lambda out_dir, figures: {})
    assert race(fake_options(tmp_path, rule, quick=True), runner=run_fake) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["race"]["incomplete"] == []
    assert report["race"]["reference_arm"] in REFERENCES[rule]


def test_a_race_without_all_arms_of_its_result_says_so_and_names_them() -> None:
    arms = ("adamw-swept", "ours-hands-free-rate-high")
    race = record(arms, rule="hands-free", reference_arm="adamw-swept")
    results = [run(arm, steps, 0) for arm in arms for steps in (200, 400)]
    said = headline(race_figures(race, results, read_mid_run=frozenset()))
    assert said.startswith("This race on python has no result: ours-hands-free,")


def test_the_list_of_races_names_result_and_reference_of_every_rule_and_every_group() -> None:
    said = "\n".join(list_lines())
    for rule in RULES.values():
        assert f"the result is that of {' or '.join(rule.headlines)}, against {rule.plain_arms[0]}" in said
    for name, members in GROUPS.items():
        assert f"{name} " in said
        assert ", ".join(members) in said


def test_a_group_stands_for_its_arms() -> None:
    assert set(chosen_arms("hands-free", ("ours-hands-free",))) == {
        "adamw-swept", *GROUPS["ours-hands-free"]
    }  # fmt: skip
    assert headline_arm(("adamw-swept", "ours-hands-free-rate-high"), "hands-free") == ""
