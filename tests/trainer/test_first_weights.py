"""Laws of a return to the first weights: it is a fresh run's start, or it was not there at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.messages import CheckpointWritten, Controls, Observation, Outcome, Phase, PhaseDecision, Verdict
from tests.trainer.test_controls_loop import (
    DROPOUT,
    FIRST,
    all_bits,
    looped,
    run,
    script,
    verdicts,
)
from tests.trainer.tiny import same_bits
from trainer_node import first_weights
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_reading import load
from trainer_node.first_weights import (
    LEARNED_SHARE,
    LEVEL_STEPS,
    WAIT_WINDOWS,
    FirstWeights,
    has_learned,
    is_below_first,
    is_no_worse,
    only_lowers_rate,
)
from trainer_node.housekeeping import Housekeeping
from trainer_node.loop import Loop
from trainer_node.snapshot import MemoryStore

TRIAL_STEPS = 6  # of the tiny settings
LOWER, LOWEST = Controls(rate_factor=0.25), Controls(rate_factor=0.125)
LOSSES = st.floats(min_value=-5.0, max_value=5.0)
HOT = ("trainer.optimizer.rate=3.0", "trainer.controls.rate_change=8", DROPOUT)  # dead within a few steps


@pytest.fixture
def never_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the run had been killed, whatever its loss."""
    monkeypatch.setattr(first_weights, "is_below_first", lambda *_: False)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """What every comparison at the end of a return says."""
    return lambda keeps: monkeypatch.setattr(first_weights, "is_no_worse", lambda *_, **__: keeps)


def noted_starts(loop: Loop) -> list[tuple[list[torch.Tensor], torch.Tensor, float, list[torch.Tensor]]]:
    """Of each step before it is taken: weights and moments, random state, data position, directions."""
    states, expect_step = [], loop.expect_step

    def noted() -> None:
        expect_step()
        directions = [tensor.clone() for tensor in loop.basis.tensors().values()]
        states.append((all_bits(loop), torch.get_rng_state(), loop.progress.data_step, directions))

    loop.expect_step = noted
    return states


def outcomes(links) -> list[Outcome]:
    return [o for o in links.of(Outcome) if o.verdict is not Verdict.MISSING]


@pytest.mark.usefixtures("never_learns")
def test_a_return_begins_where_a_fresh_run_does_to_the_last_bit(kept) -> None:
    kept(True)
    loop, links = looped(script({FIRST: LOWER}), *HOT)
    states = noted_starts(loop)
    loop.run()
    assert verdicts(links) == [Verdict.ACCEPTED]
    fresh, returned = states[0], states[FIRST]
    assert same_bits(fresh[0], returned[0])
    assert torch.equal(fresh[1], returned[1])
    assert fresh[2] == returned[2] == 0
    assert same_bits(fresh[3], returned[3])


@pytest.mark.usefixtures("never_learns")
def test_a_return_that_is_kept_goes_on_as_a_run_that_had_the_rate_from_its_first_step(kept) -> None:
    kept(True)
    returned, links = run(script({FIRST: LOWER}), *HOT)
    assert verdicts(links) == [Verdict.ACCEPTED]
    bits, random = all_bits(returned), torch.get_rng_state()
    fresh, _ = looped(lambda _: None, *HOT)
    fresh.progress.controls = LOWER
    fresh.run()
    assert same_bits(bits, all_bits(fresh))
    assert torch.equal(random, torch.get_rng_state())
    place = ("step", "clock", "data_step", "controls")
    assert [getattr(returned.progress, name) for name in place] == [60, 60, 60, LOWER]
    assert returned.task.train.used == [*range(FIRST), *range(60)]


@pytest.mark.usefixtures("never_learns")
def test_a_second_return_begins_there_again(kept) -> None:
    kept(True)
    second = TRIAL_STEPS + 6
    wanted = {0: script({FIRST: LOWER}), 1: script({second: LOWEST})}

    def by_attempt(observation: Observation) -> PhaseDecision | None:
        return wanted.get(observation.attempt, script({}))(observation)

    returned, links = run(by_attempt, *HOT)
    assert verdicts(links) == [Verdict.ACCEPTED, Verdict.ACCEPTED]
    assert returned.task.train.used == [*range(FIRST), *range(second), *range(60)]
    bits = all_bits(returned)
    fresh, _ = looped(lambda _: None, *HOT)
    fresh.progress.controls = LOWEST
    fresh.run()
    assert same_bits(bits, all_bits(fresh))
    assert not returned.first_weights.are_held


@pytest.mark.usefixtures("never_learns")
def test_a_return_that_is_refused_leaves_no_bit_behind(kept) -> None:
    kept(False)
    loop, links = run(script({FIRST: LOWER}), *HOT)
    assert verdicts(links) == [Verdict.REFUSED]
    bits, random = all_bits(loop), torch.get_rng_state()
    plain, _ = run(lambda _: None, *HOT)
    assert same_bits(bits, all_bits(plain))
    assert torch.equal(random, torch.get_rng_state())
    assert (loop.progress.step, loop.progress.clock, loop.progress.controls) == (60, 60, Controls())
    assert loop.progress.features.losses.values == plain.progress.features.losses.values


@pytest.mark.usefixtures("never_learns")
@pytest.mark.parametrize("keeps", [True, False])
def test_nothing_of_a_return_is_got_for_free(keeps: bool, kept) -> None:
    kept(keeps)
    loop, links = run(script({FIRST: LOWER}), *HOT)
    (outcome,) = outcomes(links)
    lost_steps = FIRST if keeps else TRIAL_STEPS
    assert (outcome.lost_steps, outcome.probation_steps) == (lost_steps, TRIAL_STEPS)
    assert outcome.passes == 2.0 + 3.0 * lost_steps  # two checks
    assert loop.ledger.lost_steps == lost_steps
    assert loop.progress.features.lost_passes == 3.0 * lost_steps
    told = [(o.step, o.attempt) for o in links.of(Observation) if o.phase is Phase.CORRECT]
    assert told == [(step, 1) for step in range(1, TRIAL_STEPS + 1)]
    assert outcome.attempt == links.of(Observation)[-1].attempt == (1 if keeps else 2)


def used_twice(loop: Loop) -> bool:
    """Whether the first batch was."""
    return loop.task.train.used.count(0) > 1


def held_before_steps(loop: Loop) -> list[bool]:
    held, expect_step = [], loop.expect_step
    loop.expect_step = lambda: expect_step() or held.append(loop.first_weights.are_held)
    return held


@pytest.mark.parametrize("by", ["training loss", "guard loss"])
def test_a_run_that_has_learned_something_never_returns(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "guard loss":
        monkeypatch.setattr(first_weights, "has_learned", lambda *_: False)
    steps = ("trainer.steps=120", "trainer.window_steps=102", "trainer.optimizer.rate=0.02")
    loop, links = looped(script({110: LOWER}), *steps)
    held = held_before_steps(loop)
    loop.run()
    assert verdicts(links)
    assert not used_twice(loop)
    assert held[0]
    assert held[-1] is (by == "guard loss")  # its end closes what is left
    assert not loop.first_weights.are_held


@pytest.mark.usefixtures("never_learns")
@pytest.mark.parametrize(
    "wanted", [Controls(rate_factor=2.0), Controls(rate_factor=0.5, batch_factor=2.0)], ids=["up", "batch"]
)
def test_only_a_lower_rate_alone_returns(wanted: Controls) -> None:
    loop, links = run(script({FIRST: wanted}))
    assert verdicts(links)
    assert not used_twice(loop)


@pytest.mark.usefixtures("never_learns")
@pytest.mark.parametrize("off", ["trainer.controls.rate=false", "trainer.verify.enabled=false"])
def test_with_its_switch_off_nothing_is_kept(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(MemoryStore, "another", lambda self: opened.append(self) or MemoryStore())
    loop, _ = looped(script({}), off)
    loop.expect_step()
    assert not loop.first_weights.are_held
    assert not opened


@pytest.mark.usefixtures("never_learns")
def test_a_checkpoint_waits_while_a_return_may_help_but_not_for_ever(tmp_path) -> None:
    loop, links = looped(script({}), *HOT)
    checkpoints = Checkpoints(tmp_path, keep=99, on_failure=print)
    keeper = Housekeeping(links.emit, checkpoints)
    loop._housekeeping = keeper
    keeper.begin(loop)  # every 10 steps
    loop.run()
    checkpoints.close()
    first = min(written.step for written in links.of(CheckpointWritten))
    waits_steps = loop.settings.statistics_steps + WAIT_WINDOWS * loop.settings.window_steps
    assert waits_steps <= first < loop.progress.step
    assert not loop.first_weights.are_held


@pytest.mark.usefixtures("never_learns")
def test_behind_a_checkpoint_there_is_no_return_and_no_store(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume would begin within what was left."""
    monkeypatch.setattr(FirstWeights, "may_help", lambda *_: False)
    checkpoints = Checkpoints(tmp_path, keep=3, on_failure=print)
    keeper = Housekeeping(lambda _: None, checkpoints)
    loop, links = looped(script({FIRST: LOWER}), *HOT, housekeeping=keeper)
    keeper.begin(loop)  # every 10 steps
    loop.run()
    assert verdicts(links)
    assert not used_twice(loop)


@pytest.mark.usefixtures("never_learns")
def test_behind_a_resume_there_is_no_return(tmp_path) -> None:
    """Not even of a checkpoint from before the first step."""
    saved, _ = looped(script({}), *HOT)
    checkpoints = Checkpoints(tmp_path, keep=3, on_failure=print)
    written = checkpoints.save(saved, {}, emergency=False, read_out=None)
    checkpoints.wait()
    resumed, links = looped(script({FIRST: LOWER}), *HOT)
    load(tmp_path / written.name, resumed)
    resumed.run()
    assert verdicts(links)
    assert not used_twice(resumed)


def test_prediction_that_is_dropped_takes_the_first_weights_with_it() -> None:
    loop, _ = looped(script({}), *HOT)
    held = held_before_steps(loop)
    loop.expect_step()
    loop.prediction.drop()
    loop.run()
    assert (held[0], held[-1]) == (True, False)


def test_without_room_for_the_first_weights_the_run_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(_: MemoryStore) -> MemoryStore:
        store = MemoryStore()
        store.save = raise_shortage
        return store

    def raise_shortage(*_: object) -> None:
        raise torch.OutOfMemoryError("simulated")

    plain, _ = run(lambda _: None, *HOT)
    bits = all_bits(plain)
    loop, _ = looped(lambda _: None, *HOT)
    monkeypatch.setattr(type(loop.tools.store), "another", run_out)
    loop.run()
    assert same_bits(bits, all_bits(loop))


@pytest.mark.usefixtures("never_learns")
@pytest.mark.parametrize("where", ["on the way back", "at the verdict"])
def test_memory_that_runs_out_fails_a_return_and_the_run_goes_on(where: str, monkeypatch) -> None:
    def raise_shortage(*_: object) -> None:
        raise torch.OutOfMemoryError("simulated")

    name = "_begin" if where == "on the way back" else "_finish"
    monkeypatch.setattr(FirstWeights, name, raise_shortage)
    loop, links = run(script({FIRST: LOWER}), *HOT)
    assert verdicts(links) == [Verdict.FAILED]
    bits = all_bits(loop)
    plain, _ = run(lambda _: None, *HOT)
    assert same_bits(bits, all_bits(plain))


@given(level=LOSSES, first=LOSSES)
def test_a_run_has_learned_where_its_loss_lies_a_tenth_below_the_first(level: float, first: float) -> None:
    losses = [9.0, *[level] * LEVEL_STEPS]
    assert has_learned(losses, first) == is_below_first(level, first) or abs(level - first) < 1e-9
    assert not is_below_first(first, first)
    assert is_below_first(first - (LEARNED_SHARE + 1e-6) * max(1.0, abs(first)), first)


@pytest.mark.parametrize("losses", [[], [0.1] * (LEVEL_STEPS - 1), [0.1] * 7 + [math.nan], [math.inf] * 8])
def test_too_few_losses_or_none_that_is_a_number_are_nothing_learned(losses: list[float]) -> None:
    assert not has_learned(losses, 1.0)
    assert not has_learned([0.1] * 8, math.nan)


def test_a_return_goes_on_where_it_ends_no_worse_than_the_run_began_or_stood() -> None:
    rule = {"first_loss": 2.0, "spread": 0.1}
    assert is_no_worse(2.05, loss_before=1.9, **rule)
    assert not is_no_worse(2.2, loss_before=1.9, **rule)
    assert is_no_worse(2.9, loss_before=3.0, **rule)
    assert is_no_worse(9.0, loss_before=math.nan, **rule)
    assert not is_no_worse(math.nan, loss_before=math.nan, **rule)


def test_what_only_lowers_the_rate() -> None:
    now = Controls(rate_factor=0.5, batch_factor=2.0)
    assert only_lowers_rate(Controls(rate_factor=0.25, batch_factor=2.0), now)
    assert not only_lowers_rate(Controls(rate_factor=0.25), now)
    assert not only_lowers_rate(now, now)
    assert not only_lowers_rate(None, now)
