"""The figures of an audit, from jumps that a test makes up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from common.messages import Verdict
from trainer_node.race.audit_table import AuditedJump, calibration_of, gains_of, verdict_counts


def a_jump(verdict: Verdict, later: float, latest: float = math.nan, **facts: float) -> AuditedJump:
    values = {"guard_forecast": 1.0, "guard_spread": 0.1, "guard_twin": 1.0, "refusal_forecast": 0.5}
    return AuditedJump(
        seed=0,
        step=1,
        arm="",
        horizon_steps=5,
        verdict=verdict.value,
        gain_judged=0.0,
        gain_later=later,
        gain_latest=latest,
        cosine=0.5,
        **{**values, **facts},
    )


def test_false_verdicts_are_counted_at_both_readings() -> None:
    jumps = [
        a_jump(Verdict.ACCEPTED, -0.1, 0.1),
        a_jump(Verdict.ACCEPTED, 0.1, -0.1),
        a_jump(Verdict.ACCEPTED, 0.2),
        a_jump(Verdict.REFUSED, 0.1, 0.3),
        a_jump(Verdict.RUINED, 0.3, -0.3),
        a_jump(Verdict.RUINED, -math.inf),
    ]
    assert verdict_counts(jumps) == {
        "kept": 3,
        "refused": 1,
        "ruined": 2,
        "false_accepts": 1,
        "false_refusals": 2,
        "judged_plus200": 4,
        "false_accepts_plus200": 1,
        "false_refusals_plus200": 1,
    }
    assert gains_of(jumps) == {"kept_median": 0.1, "undone_median": 0.1}


def test_a_jump_that_ended_its_run_lowers_the_median_gain() -> None:
    kept = [a_jump(Verdict.ACCEPTED, gain) for gain in (-math.inf, 0.1, 0.2)]
    assert gains_of(kept)["kept_median"] == 0.1
    assert gains_of([*kept, a_jump(Verdict.ACCEPTED, -math.inf)])["kept_median"] is None
    assert gains_of([*kept, a_jump(Verdict.ACCEPTED, math.nan)])["kept_median"] == 0.1


def test_a_calibrated_forecast_covers_and_an_overconfident_one_does_not() -> None:
    errors = [-0.1, 0.05, 0.0, 0.12, -0.2]
    honest = [a_jump(Verdict.ACCEPTED, 0.1, guard_twin=1.0 + error) for error in errors]
    assert calibration_of(honest)["coverage_80"] == pytest.approx(0.8)
    sure = [replace(jump, guard_spread=0.01) for jump in honest]
    assert calibration_of(sure)["coverage_80"] == pytest.approx(0.2)
    assert calibration_of(sure)["spreads_rms"] > 5
    assert calibration_of([])["coverage_80"] is None
    assert calibration_of([a_jump(Verdict.ACCEPTED, 0.1, guard_spread=math.inf)])["n"] == 0
