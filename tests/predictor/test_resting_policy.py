"""Laws of the policy of a run that is too short to try anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common import features
from common.config import load_settings
from common.errors import CheckpointError
from common.messages import DIRECTIONS
from common.settings import RunSettings
from predictor_node.fixed_policy import FixedPolicy
from predictor_node.learned import LearnedPolicy
from predictor_node.policies import policy_for
from predictor_node.policy import PolicyState
from predictor_node.resting_policy import RestingPolicy
from predictor_node.state import RunFacts


def settings(*overrides: str) -> RunSettings:
    return load_settings(overrides=("trainer.schedule.warmup_steps=0", *overrides))


FACTS = RunFacts(
    run_id="r",
    generation=1,
    feature_version=features.VERSION,
    directions=DIRECTIONS,
    num_groups=1,
    settings_toml="",
    group_sizes=(10,),
)


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["trainer.steps=100"], RestingPolicy),
        (["trainer.steps=5000"], LearnedPolicy),
        (["trainer.steps=100", "trainer.basis.history_snapshots=5"], LearnedPolicy),
    ],
    ids=["short", "long", "short, with weight histories"],
)
def test_only_a_run_that_cannot_try_anything_rests_by_policy(overrides: list[str], kind: type) -> None:
    run = settings(*overrides)
    assert type(policy_for(run, FACTS)) is kind


def test_its_state_is_its_own() -> None:
    policy = RestingPolicy(settings("trainer.steps=100"))
    policy.load(policy.state())
    with pytest.raises(CheckpointError, match="resting policy"):
        policy.load(PolicyState(values={"proposals": 1}))


@pytest.mark.parametrize("policy", ["fixed", "learned"])
def test_a_run_whose_controls_are_turned_off_at_a_resume_goes_on_without_its_pilot(policy: str) -> None:
    chosen = f'predictor.policy="{policy}"'
    piloted = policy_for(settings(chosen, "trainer.controls.rate=true", "trainer.steps=5000"), FACTS)
    assert "pilot" in piloted.state().values
    alone = policy_for(settings(chosen, "trainer.steps=5000"), FACTS, piloted.state())
    assert "pilot" not in alone.state().values


def test_a_state_of_another_policy_is_refused_in_a_short_line() -> None:
    with pytest.raises(CheckpointError) as caught:
        FixedPolicy(settings()).load(PolicyState(values={"else": "x" * 9000}))
    assert len(str(caught.value)) < 200


def test_it_needs_no_torch() -> None:
    code = "import sys, predictor_node.resting_policy as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
