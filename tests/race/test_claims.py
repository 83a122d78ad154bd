"""Claims 1 to 4 follow from the files: met and not met, and by all six tasks or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.race.synthetic_race import READ_MID_RUN, race_results, record
from trainer_node.race import evidence
from trainer_node.race.claims import (
    constant_rules,
    forecasts_mean_something,
    hardest_plain,
    honest_rules,
    no_harm,
)
from trainer_node.race.evidence import Evidence, PairEvidence
from trainer_node.race.figures import race_figures
from trainer_node.race.rules import RULES
from trainer_node.race.tasks import CPU_TASKS

ARMS = ("adamw-decay", "adamw-decay-ema", "ours-fixed", "ours-unguarded", "ours-random", "ours")


@pytest.fixture(scope="module")
def made() -> Evidence:
    figures = race_figures(record(ARMS), race_results(ARMS), read_mid_run=READ_MID_RUN)
    return evidence.evidence_of(figures)


def changed(made: Evidence, **pairs: tuple[float, float]) -> Evidence:
    """With other (median, lower end) of the headline arm against some arms; names have _ for -."""
    rows = []
    for pair in made.pairs:
        median, low = pairs.get(pair.versus.replace("-", "_"), (pair.ratio_median, pair.ratio_low95))
        rows.append(dataclasses.replace(pair, ratio_median=median, ratio_low95=low))
    return dataclasses.replace(made, pairs=tuple(rows))


def renamed(made: Evidence, task: str, rule: str = "decayed") -> Evidence:
    return dataclasses.replace(made, task=task, rule=rule)


def on_all(*races: Evidence) -> list[Evidence]:
    """One race for each of the six tasks; the last one for all that are left."""
    padded = [*races, *[races[-1]] * len(CPU_TASKS)]
    return [dataclasses.replace(race, task=task) for task, race in zip(CPU_TASKS, padded, strict=False)]


def test_a_task_that_is_slower_or_ends_higher_is_harm(made: Evidence) -> None:
    assert no_harm(on_all(made))[0].startswith("**Met**: 6 of 6")
    slower = changed(made, adamw_decay=(1 / 1.03, 0.9))
    assert no_harm(on_all(slower, made))[0].startswith("**Not met**: 5 of 6")
    ours = made.arms["ours"]
    assert ours.final_quality_median is not None
    higher = dataclasses.replace(
        ours, final_quality_median=made.arms["adamw-decay"].final_quality_median * 1.006
    )  # type: ignore[operator]
    worse = dataclasses.replace(made, arms={**made.arms, "ours": higher})
    assert no_harm(on_all(worse, made))[0].startswith("**Not met**: 5 of 6")


def test_a_comparison_that_was_not_made_is_not_harmless(made: Evidence) -> None:
    unknown = dataclasses.replace(made, pairs=tuple(p for p in made.pairs if p.versus != "adamw-decay"))
    assert no_harm(on_all(unknown, made))[0].startswith("**Not met**: 5 of 6")


CLAIMS: dict[str, tuple[str, Callable[[Sequence[Evidence]], list[str]], int]] = {
    "no harm": ("decayed", no_harm, 0),
    "forecasts": ("decayed", forecasts_mean_something, 0),
    "constant": ("constant", constant_rules, 0),
    "cold": ("decayed", honest_rules, 0),
    "fitted": ("fitted", honest_rules, 1),
}


def verdict(said: Sequence[str], number: int) -> str:
    """Of several in a chapter."""
    return [line for line in said if "Met**" in line or "Not met**" in line or "No evidence" in line][number]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_is_not_met_by_the_tasks_that_were_chosen_for_it(made: Evidence, claim: str) -> None:
    """All six, to the end, with ten seeds and the rule's own trials."""
    rule, judge, number = CLAIMS[claim]
    rivals = {versus.replace("-", "_"): (9.0, 9.0) for versus in made.arms if versus != "ours"}
    good = on_all(renamed(changed(made, **rivals), "any", rule))
    assert "**Met**" in verdict(judge(good), number)
    changes = [{"seeds": (0, 1, 2)}, {"missing": ("ours: no run yet",)}, {"trials": RULES[rule].trials - 1}]
    weaker = [dataclasses.replace(good[-1], **change) for change in changes]  # type: ignore[arg-type]
    for files in (good[:-1], *([*good[:-1], one] for one in weaker)):
        said = verdict(judge(files), number)
        assert "**Not met**" in said
        assert f": {CPU_TASKS[-1]}." in said


def test_forecasts_have_to_win_on_most_tasks_and_be_calibrated(made: Evidence) -> None:
    beaten = changed(made, ours_random=(0.99, 0.9))
    mostly, half = on_all(beaten, beaten, made), on_all(beaten, beaten, beaten, made)
    assert forecasts_mean_something(mostly)[0].startswith("**Met**: ours beat ours-random on 4 of 6")
    assert forecasts_mean_something(half)[0].startswith("**Not met**: ours beat ours-random on 3 of 6")
    unsure = dataclasses.replace(made.arms["ours"], coverage_80=0.95)
    loose = dataclasses.replace(made, arms={**made.arms, "ours": unsure})
    assert forecasts_mean_something(on_all(loose, made))[0].startswith("**Not met**")
    assert "calibrated on 5 of 6" in forecasts_mean_something(on_all(loose, made))[0]


def test_constant_rules_are_judged_by_the_geometric_mean(made: Evidence) -> None:
    def said(*ratios: float | None) -> str:
        races = [changed(made, adamw_decay_ema=(ratio, 1.0)) for ratio in ratios]  # type: ignore[arg-type]
        return constant_rules(on_all(*(renamed(race, "any", "constant") for race in races)))[0]

    assert said(4.0, 1.0, 2.0).startswith("**Met**: geometric mean 2.00× over 6 tasks, worst 1.00×, 0 slower")
    assert said(4.0, 0.9, 2.0).startswith("**Not met**")
    assert said(4.0, None, 2.0).startswith("**Not met**")
    assert constant_rules([made])[0].startswith("**No evidence yet.**")


def test_honest_rules_take_the_harder_of_the_plain_arms_and_need_half_of_the_tasks(made: Evidence) -> None:
    hardest = hardest_plain(changed(made, adamw_decay=(1.5, 1.4), adamw_decay_ema=(1.2, 1.1)))
    assert isinstance(hardest, PairEvidence)
    assert hardest.versus == "adamw-decay-ema"
    good = renamed(changed(made, adamw_decay=(1.5, 1.4), adamw_decay_ema=(1.2, 1.1)), "good")
    unsure = changed(made, adamw_decay=(1.5, 1.4), adamw_decay_ema=(1.2, 1.04))
    assert honest_rules(on_all(good, good, good, unsure))[0].startswith("Cold. **Met**: 3 of 6")
    assert honest_rules(on_all(good, good, unsure))[0].startswith("Cold. **Not met**: 2 of 6")
    assert "Fitted on 4 earlier runs of the same job. **No evidence yet.**" in "\n".join(honest_rules([good]))
    fitted = "\n".join(honest_rules([renamed(good, "good", "fitted")]))
    assert "**Not met**: 0 of 1 tasks reach 1.4×" in fitted


def test_an_averaged_arm_that_was_not_raced_was_not_beaten(made: Evidence) -> None:
    good = changed(made, adamw_decay=(1.5, 1.4), adamw_decay_ema=(1.5, 1.4))
    left = {name: arm for name, arm in made.arms.items() if name != "adamw-decay-ema"}
    pairs = tuple(pair for pair in good.pairs if pair.versus != "adamw-decay-ema")
    said = honest_rules(on_all(dataclasses.replace(good, arms=left, pairs=pairs)))
    assert said[0].startswith("Cold. **Not met**: 0 of 6")
    assert "| python | ours | adamw-decay (adamw-decay-ema not raced) |" in "\n".join(said)


def test_races_on_other_numbers_of_earlier_runs_keep_apart_and_are_no_tasks_of_their_own(
    made: Evidence, tmp_path: Path
) -> None:
    fitted = renamed(changed(made, adamw_decay=(1.5, 1.4), adamw_decay_ema=(1.6, 1.5)), "python", "fitted")
    slow = renamed(changed(made, adamw_decay=(0.9, 0.8), adamw_decay_ema=(0.9, 0.8)), "python", "fitted")
    races = [dataclasses.replace(fitted, fitted_on=4)]
    races += [dataclasses.replace(slow, fitted_on=runs) for runs in (1, 16)]
    paths = [evidence.write(tmp_path, race) for race in races]
    assert [path.name for path in paths] == [
        "python.fitted.json", "python.fitted-1.json", "python.fitted-16.json",
    ]  # fmt: skip
    assert {race.fitted_on for race in evidence.read_all(tmp_path)} == {1, 4, 16}
    said = "\n".join(honest_rules(races))
    assert "1 of 1 tasks reach 1.4×" in said
    assert "| python, fitted on 16 |" in said


def test_few_seeds_are_said_wherever_they_count(made: Evidence) -> None:
    few = dataclasses.replace(made, seeds=(0, 1, 2))
    assert any("python (3 seeds)" in line for line in no_harm([few]))
    assert not any("seeds)" in line for line in no_harm([made]))
