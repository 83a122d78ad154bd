"""What people are shown of the policy is what was saved, from the first moment of a run on."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, EnvironmentFault, UserError
from common.messages import Controls
from predictor_node.bandit import REST, LinUCB, Prior
from predictor_node.budget import ExplorationBudget
from predictor_node.calibration import Calibration, bucket_of
from predictor_node.inspect import arm_rows, calibration_rows, residual_count, words
from predictor_node.inspect_controls import control_words
from predictor_node.inspect_picture import draw
from predictor_node.residuals import Residuals

ARMS = (REST, "drift:5", "drift:10", "drift:25", "drift:75", "pull_back:0.5", "forecaster:2w")
WORTH = {REST: 0.0, "drift:5": 0.02, "drift:10": 0.08, "drift:25": 0.15, "drift:75": -0.5}


def played(count: int) -> dict[str, Any]:
    """The state of a policy after `count` decisions of a run whose best arm is drift:25; through JSON."""
    bandit = LinUCB(ARMS, 3, alpha=0.3, priors={arm: Prior(-0.1, 2.0) for arm in ARMS})
    calibration, residuals = Calibration(), Residuals(3)
    budget, decisions = ExplorationBudget(0.02, planned_passes=3000.0), []
    for position in range(count):
        step, wave = 64 + 32 * position, math.sin(0.7 * position)
        context = [1.0, wave, math.cos(position)]
        arm = bandit.choose(context, ARMS).arm
        worth = WORTH.get(arm, -0.3) + 0.1 * wave
        refused = arm != REST and worth < -0.2
        reward = 0.0 if arm == REST else -1.0 if refused else worth
        bandit.update(arm, context, reward, f"{step}.0")
        horizon = int(arm.split(":")[1]) if arm.startswith("drift") else 0
        forecast = 1.2 + 9.0 * step**-0.35
        happened = forecast + 0.03 * wave
        calibration.observe(bucket_of(horizon), forecast=forecast, spread=0.02, happened=happened)
        residuals.add(context, step=step, forecast=forecast, happened=happened)
        budget.ran(96.0)
        budget.settle(0.5, 51.0 if refused else 3.0 if arm != REST else 0.0, max(0.0, 20.0 * worth))
        verdict = "rest" if arm == REST else "refused" if refused else "accepted"
        decisions.append(
            {
                "step": step,
                "arm": arm,
                "verdict": verdict,
                "reward": None if arm == REST else reward,
                "forecast": forecast,
                "happened": None if refused else happened,
            }
        )
    state = {
        "bandit": bandit.state(),
        "calibration": calibration.state(),
        "budget": budget.state(),
        "residuals": residuals.state(),
        "decisions": decisions[-50:],
    }
    return json.loads(json.dumps(state))


def test_shows_every_arm_with_its_pulls_and_estimates() -> None:
    state = played(60)
    rows, bandit = arm_rows(state), LinUCB.from_state(state["bandit"])
    assert [row.name for row in rows] == list(ARMS)
    assert sum(row.pulls for row in rows) == 60
    scores = bandit.score(bandit.last_context)
    for row in rows:
        assert (row.estimate, row.width) == scores[row.name]
        if row.pulls:
            assert row.mean_reward == bandit.reward_sums[row.name] / row.pulls
        else:
            assert row.mean_reward is None
    text = words(state)
    best = max(rows, key=lambda row: row.pulls)
    assert f"{best.name:<13}  {best.pulls:>5}  {best.mean_reward:>+11.2f}  {best.estimate:+.2f}" in text
    assert f"{REST:<13}" in text
    assert "0 by definition" in text


def test_shows_the_calibration_of_every_horizon_in_their_order() -> None:
    state = played(200)
    calibration = Calibration()
    calibration.load(state["calibration"])
    rows = calibration_rows(state)
    assert [row.key for row in rows] == [key for key in ("0", "1-8", "9-16", "17-32", "33-64", "65+")
                                         if key in state["calibration"]]  # fmt: skip
    assert sum(row.count for row in rows) == 200
    for row in rows:
        assert row.coverage == calibration.coverage(row.key)
        assert f"held {row.coverage:4.0%} of {row.count} times; ± {row.factor:.2f} spreads" in words(state)


def test_shows_what_is_left_to_try_with() -> None:
    budget = ExplorationBudget(0.02, planned_passes=3000.0)
    budget.settle(10.0, 21.0, 3.0)
    text = words({"budget": budget.state()})
    assert "may cost 60 forward-equivalents (2.0%)" in text
    assert "have cost 18 more than they gained; 42 are left" in text
    budget.settle(-10.0, 3.0, 50.0)
    assert "have gained 29 net; 60 are left" in words({"budget": budget.state()})


def test_shows_the_last_decisions_and_the_number_of_residuals() -> None:
    state = played(60)
    assert residual_count(state) == 60
    last = state["decisions"][-1]
    line = words(state).splitlines()[-1]
    assert line.split()[:3] == [str(last["step"]), last["arm"], last["verdict"]]
    assert f"{last['forecast']:.4f}" in line


@pytest.mark.parametrize("state", [{}, {"bandit": None, "calibration": {}, "budget": None, "decisions": []}])
def test_a_run_that_has_just_begun_has_words_and_a_picture(state: dict[str, Any], tmp_path: Path) -> None:
    assert "nothing was decided" in words(state)
    draw(state, tmp_path / "policy.png")
    draw(played(0), tmp_path / "cold.png")
    assert "the predictor rests" not in words(played(0))


@pytest.mark.parametrize(
    ("verdict", "word"),
    [("accepted", "kept"), ("refused", "set back"), ("ruined", "set back"), ("aborted", "set back"),
     ("stale", "too late"), ("vetoed", "vetoed")],
)  # fmt: skip
def test_says_what_became_of_a_trial_of_controls(verdict: str, word: str) -> None:
    """Whoever undid it: a trial that the end of the run cut short went back as well."""
    trial = {"step": 80, "verdict": verdict, "reason": "rate ×4: not tried yet", "seen": "+10 ± 6 % seen"}
    budget = {"share": 0.05, "spent_passes": 0.0, "planned_passes": 9100.0, "net_passes": 104.0}
    pilot = {
        "in_force": [{"controls": asdict(Controls(batch_factor=2.0))}],
        "trials": {"budget": budget, "over": [trial], "open": None},
    }
    assert control_words(pilot).splitlines() == [
        "Controls: batch ×2",
        "Trials may cost 455 forward-equivalents (5.0% of the run); 104 are spent.",
        f"      80  {word:<9}  rate ×4: not tried yet, +10 ± 6 % seen",
    ]


def test_says_so_when_no_jump_is_worth_its_cost() -> None:
    bandit = LinUCB((REST, "drift:5"), 1, alpha=0.1, priors={"drift:5": Prior(-0.5, 9.0)})
    assert "No jump promises more than it costs" in words({"bandit": bandit.state()})


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    draw(played(60), tmp_path / "policy.png")
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'hybrid-predict-trainer\[race\]'"):
        draw({}, tmp_path / "policy.png")


def test_a_picture_that_cannot_be_written_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"policy\.png"):
        draw({}, tmp_path / "missing" / "policy.png")


@pytest.mark.parametrize(
    "damaged",
    [{"bandit": {"arms": []}}, {"decisions": [{"step": 3}]}, {"calibration": {"0": {}}}],
)
def test_a_damaged_state_is_refused(damaged: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        words(damaged)
