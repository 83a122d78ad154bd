"""The learned policy through the predictor's front door: deterministic, resumable, affordable, warm."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from common import codec
from common.bus import EntryId
from common.errors import CheckpointError
from common.messages import DIRECTIONS, Message, Outcome, PhaseDecision, Verdict
from predictor_node.bandit import REST
from predictor_node.learned import LearnedPolicy
from predictor_node.models import MIN_UPDATES
from predictor_node.node import Predictor
from predictor_node.policies import policy_for
from predictor_node.policy import LAST_WINDOW_FACTOR
from predictor_node.state import MemoryStore, facts_of, files_of
from predictor_node.tempers import TEMPERS
from predictor_node.warm_start import read_warm_start, write_warm_start
from tests.predictor.scripted import ScriptedTrainer, observed, outcome, point, small_settings, started

LEARNED = 'predictor.policy="learned"'
BOLD = 'predictor.temper="aggressive"'


class Line:
    """Feeds a predictor with the messages of a scripted trainer; keeps what was said on both sides."""

    def __init__(self, predictor: Predictor, *, generation: int = 1, all_refused: bool = False) -> None:
        self.predictor, self.generation, self.all_refused = predictor, generation, all_refused
        self.decisions: list[PhaseDecision] = []
        self.history: list[Message] = []
        self._sequence = 0

    def __call__(self, message: Message) -> PhaseDecision | None:
        self._sequence += 1
        self.history.append(message)
        answers = self.predictor.handle(message, EntryId(self.generation, self._sequence))
        made = [answer for answer in answers if isinstance(answer, PhaseDecision)]
        self.decisions += made
        return made[0] if made else None


def run_of(
    *overrides: str, until_step: int | None = None, shape: tuple[int, ...] = (2, 3)
) -> tuple[Line, MemoryStore, ScriptedTrainer]:
    store = MemoryStore(keep_all=True)
    line = Line(Predictor(store))
    trainer = ScriptedTrainer(small_settings(LEARNED, *overrides), shape=shape)
    trainer.run(line, until_step=until_step)
    return line, store, trainer


def bodies(decisions: list[PhaseDecision]) -> list[bytes]:
    return [codec.encode(decision) for decision in decisions]


def test_equal_runs_get_equal_decisions_and_equal_states_to_the_byte() -> None:
    (one, store_one, _), (two, store_two, _) = run_of(BOLD), run_of(BOLD)
    assert bodies(one.decisions) == bodies(two.decisions)
    newest = [store.newest("scripted") for store in (store_one, store_two)]
    assert newest[0] is not None
    assert newest[1] is not None
    assert files_of(newest[0]) == files_of(newest[1])


def test_it_tries_something_and_each_try_names_its_arm() -> None:
    line, _, _ = run_of(BOLD)
    proposals = [decision for decision in line.decisions if decision.horizon_steps]
    assert len(proposals) >= 2
    assert all(decision.arm not in ("", REST) for decision in proposals)
    assert all(
        decision.arm == REST
        for decision in line.decisions
        if not decision.horizon_steps and decision.forecast
    )
    assert all(any(decision.coefficients) for decision in proposals)


def test_a_predictor_resumed_from_a_checkpoint_goes_on_as_the_unbroken_one() -> None:
    whole, store, trainer = run_of(BOLD)
    name = sorted(trainer.checkpoints)[len(trainer.checkpoints) // 2]
    resumed = Line(Predictor(store), generation=2)
    trainer.resumed(name, generation=2).run(resumed)
    step = trainer.checkpoints[name].step
    expected = [d for d in whole.decisions if d.base_step > step]
    assert len(expected) > 3
    assert [dataclasses.replace(d, base_generation=2) for d in expected] == resumed.decisions


def test_a_run_whose_jumps_are_all_refused_loses_no_more_than_twice_its_share() -> None:
    settings = small_settings(LEARNED, "trainer.steps=2000", "predictor.rest_windows=0")
    policy_cost = {"checks": 0.0, "lost": 0.0}
    predictor = Predictor(MemoryStore())
    line = Line(predictor)

    def refuse(message: Message) -> PhaseDecision | None:
        if isinstance(message, Outcome) and message.horizon_steps:
            steps = message.probation_steps
            message = dataclasses.replace(
                outcome_like(message), verdict=Verdict.REFUSED, lost_steps=steps, lost_seconds=3.0 * steps
            )
            policy_cost["checks"] += 3.0
            policy_cost["lost"] += 3.0 * steps
        return line(message)

    ScriptedTrainer(settings).run(refuse)
    tried = [decision for decision in line.decisions if decision.horizon_steps]
    assert tried, "nothing was tried, so nothing was tested"
    share = TEMPERS["balanced"].exploration_share
    assert sum(policy_cost.values()) <= 2.0 * share * 3.0 * settings.trainer.steps


def test_a_kept_jump_never_costs_the_budget_more_than_a_refused_one_would_have() -> None:
    settings = small_settings(LEARNED, BOLD)
    predictor = Predictor(MemoryStore())
    line = Line(predictor)
    checks = []

    def keep_at_a_high_loss(message: Message) -> PhaseDecision | None:
        if isinstance(message, Outcome) and message.horizon_steps:
            message = dataclasses.replace(
                message, verdict=Verdict.ACCEPTED, loss_end=50.0, check_seconds=3.0, passes=3.0
            )
            checks.append(message.decision_id)
        return line(message)

    ScriptedTrainer(settings).run(keep_at_a_high_loss, until_step=300)
    state = predictor.learned.policy
    assert state is not None
    worst = 3.0 + 3.0 * settings.trainer.probation_steps
    assert checks
    assert 0.0 < state.values["budget"]["net_passes"] <= worst * len(checks) + 1e-9


def outcome_like(message: Outcome) -> Outcome:
    return dataclasses.replace(message, check_seconds=3.0, loss_end=3.0, loss_forecast=1.9)


LARGE = (2048, 2048)
EAGER = "predictor.learn_share=4.0"


def test_the_world_model_of_a_large_job_learns_and_is_asked_and_resumes_exactly() -> None:
    whole, store, trainer = run_of(BOLD, EAGER, shape=LARGE)
    newest = store.newest("scripted")
    assert newest is not None
    models = LearnedPolicy(trainer.settings, newest.facts).models
    assert newest.learned.policy is not None
    models.load(newest.learned.policy.values["models"], newest.learned.policy.tensors)
    assert models.world.updates >= MIN_UPDATES
    name = sorted(trainer.checkpoints)[-2]
    resumed = Line(Predictor(store), generation=2)
    trainer.resumed(name, generation=2).run(resumed)
    step = trainer.checkpoints[name].step
    expected = [d for d in whole.decisions if d.base_step > step]
    assert expected
    assert [dataclasses.replace(d, base_generation=2) for d in expected] == resumed.decisions


def test_the_world_model_of_a_small_job_sleeps() -> None:
    line, store, trainer = run_of(BOLD)
    assert line.decisions
    newest = store.newest("scripted")
    assert newest is not None
    assert newest.learned.policy is not None
    models = LearnedPolicy(trainer.settings, newest.facts).models
    models.load(newest.learned.policy.values["models"], newest.learned.policy.tensors)
    assert (models.world.updates, models.world.observed) == (0, 0)
    asleep = LearnedPolicy(trainer.settings, newest.facts).models
    assert not asleep.latent().any()
    assert asleep.imagine([], 4) == []
    assert "rssm" not in vars(asleep.world), "made for nothing"


def test_nothing_is_tried_before_the_temper_allows_it_nor_in_the_decay() -> None:
    line, _, trainer = run_of(BOLD)
    steps = [decision.base_step for decision in line.decisions if decision.horizon_steps]
    assert min(steps) >= min(TEMPERS["aggressive"].first_step, 0.1 * trainer.settings.trainer.steps)
    assert max(steps) < 0.8 * trainer.settings.trainer.steps


def test_windows_grow_while_resting_and_are_of_the_usual_length_after_a_jump() -> None:
    line, _, _ = run_of('predictor.temper="conservative"', "trainer.steps=900")
    window_steps = small_settings().trainer.window_steps
    grown = [decision.next_window_steps for decision in line.decisions if not decision.horizon_steps]
    assert max(grown) > window_steps
    assert all(steps == 0 or steps % window_steps == 0 for steps in grown)


def test_a_run_that_cannot_pay_for_one_refused_jump_is_watched_with_the_longest_windows_and_left_alone() -> (
    None
):
    short = small_settings().trainer.probation_steps * 40  # a refusal costs more than 2 % of it
    line, _, trainer = run_of(f"trainer.steps={short}")
    longest = LAST_WINDOW_FACTOR * trainer.settings.trainer.window_steps
    assert line.decisions
    assert {decision.horizon_steps for decision in line.decisions} == {0}
    assert all("is too short to pay for one refused jump" in decision.reason for decision in line.decisions)
    assert {decision.next_window_steps for decision in line.decisions} == {longest}


def test_where_there_will_be_no_more_jumps_the_next_decision_point_is_put_off_at_once() -> None:
    line, _, trainer = run_of(BOLD, "trainer.steps=400")
    longest = LAST_WINDOW_FACTOR * trainer.settings.trainer.window_steps
    rests = [decision for decision in line.decisions if not decision.horizon_steps]
    ended = [d for d in rests if "is decaying" in d.reason or "budget" in d.reason]
    assert {"decaying", "budget"} <= {word for d in ended for word in d.reason.split()}
    assert all(decision.next_window_steps == longest for decision in ended)
    assert any(decision.next_window_steps < longest for decision in rests if decision not in ended)


def test_a_warm_start_comes_back_as_it_was_written_and_a_changed_byte_is_refused(tmp_path: Path) -> None:
    _, store, _ = run_of(BOLD, until_step=200)
    newest = store.newest("scripted")
    assert newest is not None
    assert newest.learned.policy is not None
    path = tmp_path / "state.hps"
    write_warm_start(path, newest.learned.policy)
    assert read_warm_start(path).tensors == newest.learned.policy.tensors
    content = bytearray(path.read_bytes())
    for position in (3, 20, 60, len(content) - 5):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.hps"):
            read_warm_start(path)


def test_a_warm_run_knows_the_arms_of_the_former_one_but_not_where_it_stood(tmp_path: Path) -> None:
    line, store, _ = run_of(BOLD)
    newest = store.newest("scripted")
    assert newest is not None
    assert newest.learned.policy is not None
    write_warm_start(tmp_path / "state.hps", newest.learned.policy)
    settings = small_settings(LEARNED, BOLD, f'predictor.state="{tmp_path / "state.hps"}"')
    warm = policy_for(settings, facts_of(started(settings)))
    assert isinstance(warm, LearnedPolicy)
    tried = sum(count for arm, count in warm.experience.bandit.pulls.items() if arm != REST)
    assert tried == len([d for d in line.decisions if d.horizon_steps])
    assert warm.experience.budget.spent_passes == 0.0


def test_a_state_of_another_policy_is_refused() -> None:
    settings = small_settings(LEARNED)
    policy = LearnedPolicy(settings, facts_of(started(settings)))
    other = Predictor(MemoryStore())
    Line(other)(started(small_settings()))
    state = other.learned.policy
    assert state is not None
    with pytest.raises(CheckpointError, match="not a state"):
        policy.load(state)


def test_an_outcome_that_was_never_asked_for_teaches_nothing() -> None:
    settings = small_settings(LEARNED)
    policy = LearnedPolicy(settings, facts_of(started(settings)))
    before = policy.experience.bandit.state()
    decision = dataclasses.replace(a_decision(), decision_id="999.0")
    policy.settle(outcome(decision, Verdict.ACCEPTED, 0))
    assert policy.experience.bandit.state() == before


def a_decision() -> PhaseDecision:
    line, _, _ = run_of(until_step=40)
    assert len(DIRECTIONS) == line.decisions[0].num_directions
    assert math.isfinite(line.decisions[0].base_step)
    return line.decisions[0]


def test_a_decision_point_of_another_shape_is_answered_with_a_rest_and_teaches_nothing() -> None:
    settings = small_settings(LEARNED, BOLD, "predictor.rest_windows=0")
    predictor = Predictor(MemoryStore())
    line = Line(predictor)
    line(started(settings))
    for step in range(1, 80):
        line(observed(step))
    decision = line(observed(80, decision_point=dataclasses.replace(point(5), gram=(1.0, math.nan))))
    assert decision is not None
    assert decision.horizon_steps == 0
    assert "Gram" in decision.reason
