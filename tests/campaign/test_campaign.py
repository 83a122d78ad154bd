"""The short form of the campaign: one run of real processes, each quick kind of fault once, no law broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.campaign.campaign import RoundPlan, play_round
from tests.campaign.plan import SINGLE, faults, rules_of

SEED = 3
STEPS = 4000  # a fast machine takes 1600 of them while nine of the twelve faults last


@pytest.mark.slow
@pytest.mark.timeout(900)  # a quiet machine takes about a minute
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_a_run_survives_every_quick_fault_and_breaks_no_law(tmp_path: Path) -> None:
    rules = rules_of(SINGLE, quick=True)
    plan = RoundPlan(
        folder=tmp_path / "run", faults=faults(SEED, rules), steps=STEPS, kind=SINGLE, seed=SEED, say=print
    )
    played = play_round(plan, len(rules))
    assert played.violations == ()
    assert {(one.fault.kind, one.fault.target) for one in played.injected} == {
        (rule.kind, rule.target) for rule in rules
    }
    assert all(one.survived for one in played.injected)
    assert played.fired["dropped_reply"] > 0
    assert played.fired["damaged_request"] + played.fired["damaged_reply"] > 0
    assert played.decisions_applied > 20
