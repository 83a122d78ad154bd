"""Laws of a trial beside its twin: the loser leaves no bit behind, the winner goes on as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Controls, Observation, Outcome, Phase, Verdict
from tests.trainer.test_controls_loop import (
    DROPOUT,
    FIRST,
    SECOND,
    all_bits,
    looped,
    of_controls,
    run,
    script,
    text_job,
    verdicts,
)
from tests.trainer.tiny import same_bits
from trainer_node import control_twin, cycle, jump
from trainer_node.leg_mean import LegMean
from trainer_node.loop import Loop
from trainer_node.phases import PhaseRules, after_decision, before_twin, first_state
from trainer_node.verify import TWIN_GAIN_SHARE, is_better_than_twin

__all__ = ["text_job"]  # a fixture
TRIAL_STEPS = 6  # of the tiny settings
CHANGES = {
    "rate": Controls(rate_factor=0.5),
    "batch": Controls(batch_factor=2.0),
    "small batch": Controls(batch_factor=0.5),
    "both": Controls(rate_factor=2.0, batch_factor=2.0),
}
LOSSES = st.floats(min_value=-5.0, max_value=5.0)


@pytest.fixture(autouse=True)
def no_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_node.first_weights.FirstWeights.take", lambda *_: None)


@pytest.fixture
def better(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """What every comparison says."""
    return lambda keeps: monkeypatch.setattr(control_twin, "is_better_than_twin", lambda **_: keeps)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Trials are accepted without a twin from now on."""

    def switch() -> None:
        monkeypatch.setattr(jump, "judge", lambda **_: Verdict.ACCEPTED)
        monkeypatch.setattr(cycle, "has_twin", lambda _: False)

    return switch


def state_of(loop: Loop) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    return all_bits(loop), list(loop.basis.tensors().values()), torch.get_rng_state()


def same_state(left, right) -> bool:
    return same_bits(left[0], right[0]) and same_bits(left[1], right[1]) and torch.equal(left[2], right[2])


# ---- the loser, the winner ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_a_trial_that_loses_to_its_twin_leaves_no_bit_behind(name: str, better) -> None:
    """The twin is the run that was never asked: weights, moments, averages, data, random state."""
    better(False)
    plain, _ = run(lambda _: None, DROPOUT)
    undisturbed = all_bits(plain), torch.get_rng_state()
    loop, links = run(script({FIRST: CHANGES[name], SECOND: CHANGES[name]}), DROPOUT)
    assert Verdict.REFUSED in verdicts(links)
    assert Verdict.ACCEPTED not in verdicts(links)
    assert loop.progress.controls == Controls()
    assert same_bits(all_bits(loop), undisturbed[0])
    assert torch.equal(torch.get_rng_state(), undisturbed[1])
    assert (loop.progress.step, loop.progress.clock, loop.progress.data_step) == (60, 60, 60)


@pytest.mark.parametrize("name", CHANGES)
def test_a_trial_that_beats_its_twin_goes_on_as_if_there_had_been_none(name: str, better, alone) -> None:
    better(True)
    beside, links = run(script({FIRST: CHANGES[name]}), DROPOUT)
    assert verdicts(links) == [Verdict.ACCEPTED]
    assert beside.progress.controls == CHANGES[name]
    state = state_of(beside)
    alone()
    single, _ = run(script({FIRST: CHANGES[name]}), DROPOUT)
    assert same_state(state, state_of(single))
    place = ("step", "clock", "data_step", "controls", "phase")
    assert [getattr(beside.progress, name) for name in place] == [
        getattr(single.progress, name) for name in place
    ]


@pytest.mark.parametrize("keeps", [True, False])
def test_both_runs_take_the_same_batches_and_are_told_as_steps_on_probation(keeps: bool, better) -> None:
    better(keeps)
    loop, links = run(script({FIRST: CHANGES["rate"]}), DROPOUT)
    tried = list(range(FIRST, FIRST + TRIAL_STEPS))
    assert loop.task.train.used == [*range(FIRST), *tried, *tried, *range(FIRST + TRIAL_STEPS, 60)]
    on_probation = [(o.step, o.attempt) for o in links.of(Observation) if o.phase is Phase.CORRECT]
    assert on_probation == [(step + 1, attempt) for attempt in (0, 1) for step in tried]
    (outcome,) = [o for o in links.of(Outcome) if o.verdict is not Verdict.MISSING]
    assert (outcome.attempt, outcome.probation_steps, outcome.lost_steps) == (1 + keeps, *[TRIAL_STEPS] * 2)
    assert outcome.passes == 3.0 + TRIAL_STEPS * 3.0  # three checks, and one of the two legs
    assert links.of(Observation)[-1].attempt == 1 + keeps
    assert loop.ledger.lost_steps == TRIAL_STEPS


@pytest.mark.parametrize(("factor", "twin_steps"), [(2.0, 12), (0.5, 3), (1.0, 6)])
def test_a_twin_takes_as_long_as_the_trial(factor: float, twin_steps: int, better) -> None:
    """In lockstep time is forward-equivalents, so it is equal data too."""
    better(False)
    wanted = Controls(batch_factor=factor, rate_factor=0.5 if factor == 1.0 else 1.0)
    _, links = run(script({FIRST: wanted}))
    second = [o for o in links.of(Observation) if o.phase is Phase.CORRECT and o.attempt == 1]
    assert len(second) == twin_steps


def test_other_controls_have_no_twin(text_job) -> None:
    wanted = (
        Controls(context_tokens=16),
        Controls(decay_start=40, decay_steps=10),
        Controls(read_out="average"),
    )
    for controls in wanted:
        _, links = run(script({FIRST: controls}), *text_job)
        assert {o.attempt for o in links.of(Observation) if o.step <= FIRST + TRIAL_STEPS} <= {0, 1}
        (outcome,) = [o for o in links.of(Outcome) if o.verdict in (Verdict.ACCEPTED, Verdict.REFUSED)]
        assert outcome.lost_steps == (0 if outcome.verdict is Verdict.ACCEPTED else TRIAL_STEPS)


# ---- what cuts it short --------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, TRIAL_STEPS + 3], ids=["in the trial", "in the twin"])
def test_a_stop_before_the_verdict_goes_back_to_before_the_trial(at: int, better) -> None:
    better(True)
    before: list = []
    wanted = script({FIRST: CHANGES["batch"]})
    loop, links = looped(lambda o: before.append(all_bits(loop)) or wanted(o), DROPOUT)
    note_step, taken_steps = loop.note_step, []

    def stop_soon(taken):
        taken_steps.append(taken)
        loop.stop_requested = len(taken_steps) == FIRST + at
        return note_step(taken)

    loop.note_step = stop_soon
    loop.run()
    assert verdicts(links) == [Verdict.ABORTED]
    assert (loop.progress.step, loop.progress.controls) == (FIRST, Controls())
    assert same_bits(all_bits(loop), before[-1])
    assert loop.ledger.lost_steps == at


@pytest.mark.parametrize("at", [3, TRIAL_STEPS + 3], ids=["in the trial", "in the twin"])
def test_memory_that_runs_out_before_the_verdict_goes_back_to_before_the_trial(at: int, better) -> None:
    better(True)
    loop, links = looped(script({FIRST: CHANGES["rate"]}), DROPOUT)
    loop.memory.halvings = 4
    loss, steps, raised = loop.task.loss, [], []
    note_step = loop.note_step

    def run_out(batch):
        if len(steps) == FIRST + at and not raised and loop.task.model.training:
            raised.append(loop.progress.step)
            raise torch.OutOfMemoryError("simulated")
        return loss(batch)

    object.__setattr__(loop.task, "loss", run_out)
    loop.note_step = lambda taken: steps.append(taken) or note_step(taken)
    loop.run()
    assert raised
    assert verdicts(links)[0] is Verdict.FAILED
    assert (loop.progress.clock, loop.progress.controls) == (60, Controls())
    plain, _ = looped(lambda _: None, DROPOUT)
    plain.memory.halvings = 4
    plain.run()
    assert same_bits(all_bits(plain), all_bits(loop))


def test_without_memory_for_its_mean_a_trial_fails_and_the_run_goes_on(monkeypatch, better) -> None:
    better(True)

    def run_out(self) -> None:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(LegMean, "after_step", run_out)
    loop, links = run(script({FIRST: CHANGES["rate"]}), DROPOUT)
    assert verdicts(links) == [Verdict.FAILED]
    plain, _ = run(lambda _: None, DROPOUT)
    assert same_bits(all_bits(plain), all_bits(loop))


def test_a_trial_that_ruins_the_run_ends_half_way_and_costs_no_twin() -> None:
    loop, links = run(
        script({FIRST: Controls(rate_factor=64.0)}),
        "trainer.optimizer.name=adamw",
        "trainer.controls.rate_change=64",
    )
    assert verdicts(links) == [Verdict.REFUSED]
    assert loop.progress.controls == Controls()
    (outcome,) = [o for o in links.of(Outcome) if o.verdict is Verdict.REFUSED]
    assert (outcome.lost_steps, outcome.probation_steps, outcome.attempt) == (3, 3, 1)
    assert outcome.passes == 1.0 + 3 * 3.0
    assert outcome.loss_end > outcome.loss_before
    plain, _ = run(lambda _: None, "trainer.optimizer.name=adamw")
    assert same_bits(all_bits(plain), all_bits(loop))


def test_no_store_of_a_twin_stays_open(monkeypatch, better) -> None:
    better(True)
    closed = []
    loop, _ = looped(script({FIRST: CHANGES["rate"]}))
    another = type(loop.tools.store).another

    def noted(self):
        store = another(self)
        close = store.close
        store.close = lambda: closed.append(store) or close()
        return store

    monkeypatch.setattr(type(loop.tools.store), "another", noted)
    loop.run()
    assert len(closed) == 1


# ---- the verdict, the mean, the phases -------------------------------------------------------------------


@given(before=LOSSES, with_it=LOSSES, without=LOSSES)
def test_what_is_no_better_than_its_twin_is_never_kept(before: float, with_it: float, without: float) -> None:
    keeps = is_better_than_twin(loss_before=before, loss_with=with_it, loss_without=without)
    assert not keeps or with_it < without
    fall = max(0.0, before - without)
    if with_it < without - TWIN_GAIN_SHARE * fall - 1e-9:
        assert keeps


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_never_wins(bad: float) -> None:
    assert not is_better_than_twin(loss_before=1.0, loss_with=bad, loss_without=1.0)
    assert not is_better_than_twin(loss_before=1.0, loss_with=bad, loss_without=bad)
    assert is_better_than_twin(loss_before=1.0, loss_with=1e9, loss_without=bad)
    assert is_better_than_twin(loss_before=bad, loss_with=0.9, loss_without=1.0)


@given(steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_mean_is_that_of_the_second_half_and_the_weights_come_back(steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.zeros(3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)]
    mean, seen = LegMean(weights, steps), []
    for _ in range(steps):
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        seen.append([weight.clone() for weight in weights])
        mean.after_step()
    kept = [weight.clone() for weight in weights]
    half = seen[steps // 2 :]
    for _ in range(2):
        with mean.in_place():
            for index, weight in enumerate(weights):
                torch.testing.assert_close(weight, torch.stack([s[index] for s in half]).mean(0))
        assert same_bits(weights, kept)


def test_a_twin_is_due_only_where_a_trial_is_to_be_judged() -> None:
    rules = PhaseRules(statistics_steps=4, window_steps=6, probation_steps=5, total_steps=60)
    state = replace(first_state(rules), phase=Phase.FULL, steps_left=0)
    on_trial = after_decision(state, "1", rules, trial_steps=9)
    assert (on_trial.phase, on_trial.steps_left) == (Phase.CORRECT, 9)
    with pytest.raises(ValueError, match="no judgement is due"):
        before_twin(on_trial, 4)
    twin = before_twin(replace(on_trial, steps_left=0), 4)
    assert (twin.phase, twin.steps_left, twin.used_decision) == (Phase.CORRECT, 4, "1")


def test_a_trial_that_cannot_end_before_the_run_does_is_refused() -> None:
    """Of 60 steps the last decision point lies at 56: four are left, and a trial takes six."""
    late = Controls(rate_factor=0.5)
    _, links = run(lambda o: of_controls(o, late) if o.step > 54 else None)
    assert verdicts(links)
    assert set(verdicts(links)) == {Verdict.MALFORMED}
