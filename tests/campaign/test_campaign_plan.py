"""Laws of plan and table: a seed is a plan, nothing is left out, a quantile is one of the values."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.campaign import table
from tests.campaign.attacks import ATTACKS
from tests.campaign.campaign import Injected, Round, differs_from_twin
from tests.campaign.moved_clock import offset_seconds
from tests.campaign.plan import NODES, RULES, SENTINEL, SINGLE, Fault, faults, rules_of

SINGLE_RULES = rules_of(SINGLE, quick=False)


def taken(seed: int, count: int) -> list[Fault]:
    return list(itertools.islice(faults(seed, SINGLE_RULES), count))


def test_the_same_seed_is_the_same_plan_and_another_one_is_not() -> None:
    assert taken(3, 100) == taken(3, 100)
    assert taken(3, 100) != taken(4, 100)


def test_every_rule_comes_once_in_a_round() -> None:
    plan = taken(5, 3 * len(SINGLE_RULES))
    for start in range(0, len(plan), len(SINGLE_RULES)):
        part = plan[start : start + len(SINGLE_RULES)]
        assert Counter((f.kind, f.target) for f in part) == Counter((r.kind, r.target) for r in SINGLE_RULES)


def test_faults_stay_within_their_rules_and_are_numbered() -> None:
    rules = {(rule.kind, rule.target): rule for rule in SINGLE_RULES}
    for number, fault in enumerate(taken(7, 200), start=1):
        rule = rules[fault.kind, fault.target]
        assert fault.number == number
        assert rule.seconds[0] - 0.01 <= fault.seconds <= rule.seconds[1] + 0.01
        assert rule.amount[0] - 0.001 <= fault.amount <= rule.amount[1] + 0.001
        assert fault.after_steps > 0


def test_every_kind_can_be_done_and_every_node_is_killed_and_stopped() -> None:
    assert {rule.kind for rule in RULES} == set(ATTACKS)
    for kind in ("kill", "freeze"):
        assert {r.target for r in SINGLE_RULES if r.kind == kind} >= set(NODES)


def test_the_short_form_is_a_part_of_the_long_one() -> None:
    assert set(rules_of(SINGLE, quick=True)) < set(SINGLE_RULES)


def test_only_a_pair_can_fail_over() -> None:
    assert "fail_over" in {rule.kind for rule in rules_of(SENTINEL, quick=False)}
    assert "fail_over" not in {rule.kind for rule in SINGLE_RULES}


def test_a_plan_without_rules_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rule"):
        next(faults(1, ()))


def injected(kind: str, seconds: float | None, *, survived: bool = True) -> Injected:
    fault = Fault(number=1, kind=kind, target="server", after_steps=1, seconds=0.0, amount=0.0)
    return Injected(fault=fault, recovery_seconds=seconds, survived=survived, notes=())


def played(*done: Injected, broken: tuple[str, ...] = ()) -> Round:
    return Round(
        injected=done, violations=broken, fired=Counter(dropped_reply=3), ended_by_themselves=(), starts={},
        steps_published=10, decisions_applied=2, folder=Path("run-1"), held_out_loss=0.1,
        taken_digest="decisions", model_digest="weights",
    )  # fmt: skip


def test_the_table_counts_by_kind_and_takes_quantiles_of_what_recovered() -> None:
    done = [injected("flush", seconds) for seconds in (0.5, 0.1, 0.3, None)] + [
        injected("kill", None, survived=False)
    ]
    flush, kill = table.rows(done)
    assert (flush["injected"], flush["survived"]) == (4, 4)
    assert (flush["recovery_seconds_p50"], flush["recovery_seconds_p99"]) == (0.3, 0.5)
    assert (kill["injected"], kill["survived"], kill["recovery_seconds_p50"]) == (1, 0, None)


def test_the_report_is_json_and_names_every_violation() -> None:
    rounds = [played(injected("flush", 0.2), broken=("ids_come_once: history 1-4",)), played()]
    found = table.report(rounds, seed=3, command="x", date="2026-11-21", seconds=1.0)
    assert json.loads(json.dumps(found)) == found
    assert found["violations"] == ["run-1: ids_come_once: history 1-4"]
    assert found["link_faults"] == {"dropped_reply": 6}
    assert "VIOLATION run-1: ids_come_once: history 1-4" in table.text(found)
    assert "no violation" in table.text(table.report([played()], seed=3, command="x", date="", seconds=1.0))


def test_equal_decisions_that_ended_in_other_weights_than_the_undisturbed_twin_are_a_violation() -> None:
    twin = played()
    assert differs_from_twin(replace(twin, model_digest="others"), twin)
    assert not differs_from_twin(twin, twin)
    assert not differs_from_twin(replace(twin, model_digest="others", taken_digest="others"), twin)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1.0])
def test_a_quantile_is_one_of_the_values_and_bounds_its_share(share: float) -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    quantile = table.quantile(values, share)
    assert quantile in values
    assert sum(value <= quantile for value in values) >= share * len(values)


def test_a_clock_file_that_is_missing_or_torn_moves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "clock"
    assert offset_seconds(file) == 0.0
    file.write_text("-36")
    assert offset_seconds(file) == -36.0
    file.write_text("")
    assert offset_seconds(file) == 0.0
