"""The bandit's state: the same bits after a restart, arms known by name, nothing taken from a damaged one."""

from __future__ import annotations

import json

import pytest

from common.errors import CheckpointError
from predictor_node.bandit import REST, LinUCB, Prior
from tests.predictor.test_bandit import ARMS, D, random_updates, taught


def through_json(state: dict[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(state, sort_keys=True))


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
@pytest.mark.parametrize("cut", [0, 7, 400])
def test_goes_on_after_a_restart_with_the_same_bits(cut: int, forgetting: float) -> None:
    updates = random_updates(cut + 300, seed=2)
    unbroken = LinUCB(ARMS, D, forgetting=forgetting)
    for position, update in enumerate(updates[:cut]):
        unbroken.update(*update, str(position))
    restored = LinUCB(ARMS, D, forgetting=forgetting)
    restored.load(through_json(unbroken.state()))
    for position, (arm, context, reward) in enumerate(updates[cut:], start=cut):
        assert restored.score(context) == unbroken.score(context)
        for bandit in (unbroken, restored):
            assert bandit.update(arm, context, reward, str(position))
    assert through_json(restored.state()) == through_json(unbroken.state())
    assert LinUCB.from_state(through_json(unbroken.state())).state() == unbroken.state()


def test_arms_are_known_by_name_whatever_their_place() -> None:
    earlier = taught(60)
    later = LinUCB((REST, "forecaster:2w", "drift:25", "drift:5"), D)
    later.load(earlier.state())
    context = [1.0, 0.3, -0.2]
    assert later.score(context)["drift:25"] == earlier.score(context)["drift:25"]
    assert later.pulls["drift:5"] == earlier.pulls["drift:5"]
    assert later.score(context)["forecaster:2w"] == LinUCB(ARMS, D).score(context)["drift:5"]


def test_decision_ids_of_an_earlier_run_do_not_shut_out_those_of_the_next() -> None:
    earlier, later = taught(20), taught(0)
    later.load(earlier.state())
    later.new_run()
    assert later.update("drift:5", [1.0, 0.0, 0.0], 0.5, "7.0")
    assert later.pulls["drift:5"] == earlier.pulls["drift:5"] + 1


def test_a_loaded_bandit_keeps_its_own_ridge_and_prior() -> None:
    earlier = taught(60)
    priors = {"drift:5": Prior(0.5, 3.0)}
    later = LinUCB(ARMS, D, ridge=4.0, priors=priors)
    later.load(earlier.state())
    direct = LinUCB(ARMS, D, ridge=4.0, priors=priors)
    for position, update in enumerate(random_updates(60)):
        direct.update(*update, str(position))
    context = [1.0, 0.3, -0.2]
    for arm in ARMS:
        assert later.score(context)[arm] == pytest.approx(direct.score(context)[arm])


def damaged(state: dict[str, object], key: str) -> dict[str, object]:
    state = through_json(state)
    if key == "dimension":
        state["dimension"] = 4
    elif key == "arms":
        state["arms"][2]["squares"]["float64"] = "AAAA"  # type: ignore[index]
    else:
        del state[key]
    return state


@pytest.mark.parametrize("key", ["dimension", "arms", "recent_ids"])
def test_a_damaged_state_is_refused_and_changes_nothing(key: str) -> None:
    bandit = taught(10, seed=3)
    before = json.dumps(bandit.state())
    with pytest.raises(CheckpointError):
        bandit.load(damaged(taught(20).state(), key))
    assert json.dumps(bandit.state()) == before
