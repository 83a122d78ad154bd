"""Claims 5 to 9 follow from the files: met and not met, and one line while there is none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from trainer_node.race import evidence
from trainer_node.race.arm_table import GROUPS
from trainer_node.race.claims_controls import controls_do_no_harm, hands_free, ramp, untuned, whole_stack
from trainer_node.race.evidence import ArmEvidence, Evidence, PairEvidence
from trainer_node.race.evidence_page import render
from trainer_node.race.figures import race_figures
from trainer_node.race.rules import RULES
from trainer_node.race.statistics import pooled_ratio_of, ratio_of
from trainer_node.race.tasks import CPU_TASKS

from .synthetic_race import race_results, record, run

Claim = Callable[[Sequence[Evidence]], list[str]]
CHAPTERS: Mapping[str, Claim] = {
    "whole-stack": whole_stack,
    "untuned": untuned,
    "hands-free": hands_free,
    "ramp": ramp,
    "controls": controls_do_no_harm,
}
ARM = ArmEvidence(
    config={}, passes_median=600.0, seconds_median=2.0, ratio_median=1.0, ratio_low95=0.9, ratio_high95=1.1,
    final_quality_median=1.0, misses=0,
)  # fmt: skip


def file(
    task: str, rule: str, ratio: float | None, others: Mapping[tuple[str, str], float] | None = None
) -> Evidence:
    """The headline arm has `ratio` against the reference; `others` by (arm, versus)."""
    reference, headline = RULES[rule].plain_arms[-1], RULES[rule].headlines[0]
    ratios = {(arm, reference): ratio for arm in (headline, *GROUPS.get(headline, ()))} | dict(others or {})
    return Evidence(
        task=task, rule=rule, target=1.0, seeds=tuple(range(10)), trials=RULES[rule].trials,
        machine="made up", date="2026-11-22", base_steps=200,
        command=f"trainer-node race {task} --rule {rule}",
        arms=dict.fromkeys(RULES[rule].arms, ARM), reference_arm=reference, headline_arm=headline,
        pairs=tuple(
            PairEvidence(
                arm=arm, versus=versus, ratio_median=value, ratio_low95=value, ratio_high95=value, wins=10,
                losses=0, sign_test_p=0.002,
            )
            for (arm, versus), value in ratios.items()
        ),
    )  # fmt: skip


def files(rule: str, ratios: Sequence[float | None]) -> list[Evidence]:
    return [file(task, rule, ratio) for task, ratio in zip(CPU_TASKS, ratios, strict=True)]


MET = {
    "whole-stack": [4.0, 1.0, 2.0, 2.0, 2.0, 2.01],
    "untuned": [9.0, 1.01, 3.0, 3.0, 3.0, 3.0],
    "hands-free": [0.985] * 6,
    "ramp": [1.15] * 3 + [0.9] * 3,
    "controls": [0.981] * 6,
}
MISSED = {
    "whole-stack": [3.9, 1.0, 2.0, 2.0, 2.0, 2.0],
    "untuned": [9.0, 0.99, 3.0, 3.0, 3.0, 3.0],
    "hands-free": [1.5] * 5 + [0.97],
    "ramp": [1.15] * 2 + [1.14] * 4,
    "controls": [1.5] * 5 + [0.98],
}


@pytest.mark.parametrize("rule", CHAPTERS)
def test_a_bar_is_met_by_the_numbers_and_by_nothing_else(rule: str) -> None:
    assert CHAPTERS[rule](files(rule, MET[rule]))[0].startswith("**Met**")
    assert CHAPTERS[rule](files(rule, MISSED[rule]))[0].startswith("**Not met**")


@pytest.mark.parametrize("rule", CHAPTERS)
def test_a_bar_is_not_met_by_the_tasks_that_came_out_well(rule: str) -> None:
    """All six, to the end, with ten seeds and the rule's own trials: a sweep of two is no sweep."""
    good = files(rule, [9.0] * 6)
    said = CHAPTERS[rule](good[:-1])[0]
    assert said.startswith("**Not met**")
    assert CPU_TASKS[-1] in said
    changes = [{"seeds": (0, 1, 2)}, {"missing": ("ours: still has runs to do",)}]
    changes += [{"trials": RULES[rule].trials - 1}] if RULES[rule].tunes else []
    for change in changes:
        weaker = [*good[:-1], dataclasses.replace(good[-1], **change)]  # type: ignore[arg-type]
        assert CHAPTERS[rule](weaker)[0].startswith("**Not met**")


@pytest.mark.parametrize("rule", CHAPTERS)
def test_a_comparison_without_a_number_meets_nothing(rule: str) -> None:
    assert CHAPTERS[rule](files(rule, [None] * 6))[0].startswith("**Not met**")


@pytest.mark.parametrize("rule", CHAPTERS)
def test_without_a_file_of_the_rule_it_is_one_line(rule: str) -> None:
    other = next(name for name in CHAPTERS if name != rule)
    said = CHAPTERS[rule](files(other, [2.0] * 6))
    assert len(said) == 1
    assert said[0].startswith("**No evidence yet.** The bar: ")


def test_the_ramp_counts_the_faster_of_the_fixed_arms() -> None:
    ours = "ours-ramp"
    slower = [file(task, "ramp", 1.5, {(ours, "adamw-decay"): 1.1}) for task in CPU_TASKS]
    assert ramp(slower)[0].startswith("**Not met**: 0 of 6")


@pytest.mark.parametrize("start", GROUPS["ours-hands-free"])
@pytest.mark.parametrize("rival", ["adamw-swept", "adamw-decay"])
def test_one_bad_start_or_a_faster_fixed_arm_is_not_hands_free(start: str, rival: str) -> None:
    good = files("hands-free", [1.0] * 6)
    assert hands_free(good)[0].startswith("**Met**")
    slow = file(CPU_TASKS[0], "hands-free", 1.0, {(start, rival): 0.97})
    assert hands_free([slow, *good[1:]])[0].startswith("**Not met**: 5 of 6")


@pytest.mark.parametrize(("rule", "claim"), [("hands-free", hands_free), ("ramp", ramp)])
def test_without_the_tuned_arm_of_the_task_s_own_batch_nothing_is_met(rule: str, claim: Claim) -> None:
    weaker = [
        dataclasses.replace(one, arms={name: arm for name, arm in one.arms.items() if name != "adamw-decay"})
        for one in files(rule, [2.0] * 6)
    ]
    assert claim(weaker)[0].startswith("**Not met**: 0 of 6")


@pytest.mark.parametrize(("end", "met"), [(1.005, True), (1.006, False)])
def test_a_planned_run_that_controls_end_early_and_higher_is_harmed_however_fast_it_was(
    end: float, met: bool
) -> None:
    good = files("controls", [1.5] * 6)
    worse = dataclasses.replace(ARM, final_quality_median=end)
    one = dataclasses.replace(good[0], arms={**good[0].arms, "ours-controls": worse})
    said = controls_do_no_harm([one, *good[1:]])[0]
    assert said.startswith("**Met**" if met else "**Not met**: 5 of 6")


def test_a_start_that_is_less_wrong_than_its_name_says_so() -> None:
    one, start = file("python", "hands-free", 1.0), "ours-hands-free-batch-low"
    key = "arm.batch_factor"
    configs = {"adamw-swept": {key: 0.25}, start: {key: 0.125}}
    arms = {name: dataclasses.replace(ARM, config=configs.get(name, {})) for name in one.arms}
    said = "\n".join(hands_free([dataclasses.replace(one, arms=arms)]))
    assert said.count("(batch × 0.5 only)") == 1
    whole = {**arms, start: dataclasses.replace(ARM, config={key: 0.0625})}
    assert "only)" not in "\n".join(hands_free([dataclasses.replace(one, arms=whole)]))


def test_a_rescue_has_its_own_bar() -> None:
    pair = ("ours-rescue", "adamw-swept")
    said = hands_free([file("digits", "hands-free", 1.0, {pair: 0.91})])
    assert "From 30 times the best rate: 1 of 1 tasks within 10 %." in said
    said = hands_free([file("digits", "hands-free", 1.0, {pair: 0.90})])
    assert "From 30 times the best rate: 0 of 1 tasks within 10 %." in said


def test_a_reference_that_never_gets_there_is_said_in_words() -> None:
    weak = "adamw-3e-4-cosine"
    one = file("digits", "untuned", 3.0, {("ours-muon-defaults", weak): None})  # type: ignore[dict-item]
    lost = dataclasses.replace(ARM, seconds_median=None, misses=10)
    one = dataclasses.replace(one, arms={**one.arms, weak: lost})
    assert any(f"{weak} never got there" in line for line in untuned([one]))


def test_each_part_of_the_whole_stack_has_its_own_factor() -> None:
    others = {(part.arm, part.versus): 1.1 + i / 10 for i, part in enumerate(RULES["whole-stack"].parts)}
    said = "\n".join(whole_stack([file("digits", "whole-stack", 2.0, others)]))
    words = ("schedule alone", "Muon alone", "read-out alone", "prediction alone", "prediction on top")
    for word, number in zip(words, (1.1, 1.2, 1.3, 1.4, 1.6), strict=True):
        assert f"{word} (" in said
        assert f" {number:.3f}× |" in said


def test_the_page_has_a_section_and_a_verdict_for_every_file(tmp_path: Path) -> None:
    assert "**Met**" not in render(tmp_path)
    for rule in CHAPTERS:
        for one in files(rule, MET[rule]):
            assert evidence.read(evidence.write(tmp_path, one)) == one
    page = render(tmp_path)
    assert page.count("**Met**") == len(CHAPTERS)
    for rule in CHAPTERS:
        assert f"## digits, {rule}" in page
    assert "**ours-hands-free** (over ours-hands-free-rate-high" in page
    assert "Nothing was tuned, least of all the reference" in page


def test_the_number_of_a_group_is_the_median_over_its_arms_and_seeds() -> None:
    group, reference = GROUPS["ours-hands-free"], "adamw-swept"
    speeds = dict(zip(group, (0.5, 0.9, 1.1, 2.0), strict=True))
    results = [run(reference, n, seed, speed=1.0) for n in (200, 400, 1000) for seed in range(10)]
    for arm, speed in speeds.items():
        results += [run(arm, n, seed, speed=speed) for n in (200, 400, 1000) for seed in range(10)]
    race = record((reference, *group), rule="hands-free", reference_arm=reference)
    figures = race_figures(race, results, read_mid_run=frozenset())
    pooled = figures.pair("ours-hands-free", reference)
    assert pooled is not None
    singles = [figures.pair(arm, reference) for arm in group]
    middle = sorted(pair.median for pair in singles if pair is not None)[1:3]
    assert pooled.median == pytest.approx(sum(middle) / 2)
    made = evidence.evidence_of(figures)
    assert made.headline_arm == "ours-hands-free"
    assert {pair.arm for pair in made.pairs if pair.versus == reference} == {"ours-hands-free", *group}
    assert {pair.versus for pair in made.pairs if pair.arm == group[0]} == {reference, *group[1:]}
    without = race_figures(race, [r for r in results if r.key.arm != group[0]], read_mid_run=frozenset())
    assert without.pair("ours-hands-free", reference).pairs == 0  # type: ignore[union-attr]


def test_pooling_one_arm_is_the_plain_ratio_and_a_shared_miss_leaves_the_seed_out() -> None:
    reference = {seed: 1.0 + seed / 10 for seed in range(10)}
    arm = {seed: 1.2 - seed / 20 for seed in range(10)}
    assert pooled_ratio_of(reference, [arm]) == ratio_of(reference, arm)
    lost = pooled_ratio_of({**reference, 0: math.inf}, [{**arm, 0: math.inf}, arm])
    assert (lost.pairs, lost.both_missed) == (9, 1)
    missed = pooled_ratio_of(reference, [dict.fromkeys(arm, math.inf), arm, arm])
    assert missed.median > 0
    assert missed.low95 > 0
    never = pooled_ratio_of(reference, [dict.fromkeys(arm, math.inf)] * 2)
    assert (never.median, never.losses) == (0.0, 10)


def test_the_page_of_a_classic_race_is_as_before() -> None:
    figures = race_figures(record(), race_results(), read_mid_run=frozenset())
    assert not {pair.arm for pair in figures.pairs} & GROUPS.keys()
