"""Controls through everything that ends or turns back a run: a kill, a spike, an order, another machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import sealed_folder
from common.errors import CheckpointError
from common.features import INDEX
from common.messages import Controls, MemoryAction, Observation, Outcome, PhaseDecision, Verdict
from tests.trainer.test_controls import ALL_ON
from tests.trainer.test_controls_loop import (
    DROPOUT,
    FIRST,
    SECOND,
    THIRD,
    all_bits,
    judged,
    looped,
    of_controls,
    run,
    script,
    text_job,
    undisturbed,
    verdicts,
)
from tests.trainer.test_rollback import Rotten
from tests.trainer.tiny import same_bits, weights_of
from trainer_node import checkpoint
from trainer_node.checkpoint import Checkpoints
from trainer_node.first_weights import FirstWeights
from trainer_node.housekeeping import Housekeeping
from trainer_node.loop import Loop
from trainer_node.memory_orders import carry_out

__all__ = ["judged", "text_job"]  # fixtures


@pytest.fixture(autouse=True)
def saves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint waits for the run to learn something (test_first_weights.py)."""
    monkeypatch.setattr(FirstWeights, "may_help", lambda *_: False)


class Killed(BaseException):
    """What no handler of the product catches: nothing is saved behind it."""


def kept(
    root: Path,
    wanted: Mapping[int, Controls],
    *overrides: str,
    kill: Callable[[Loop], bool] = lambda _: False,
    resume: Path | None = None,
    **options,
) -> Loop:
    """A run that saves itself every third step. `kill` is asked after each step, before anything is saved."""
    checkpoints = Checkpoints(root, keep=99, on_failure=pytest.fail)
    every = "trainer.checkpoint.every_steps=3"
    loop, links = looped(script(wanted), DROPOUT, every, *overrides, **options)
    housekeeping = Housekeeping(links.emit, checkpoints)
    loop._housekeeping = housekeeping
    note_step = loop.note_step

    def note(taken):
        shortage = note_step(taken)
        if kill(loop):
            raise Killed
        return shortage

    loop.note_step = note
    if resume is None:
        housekeeping.begin(loop)
    else:
        housekeeping.load(checkpoint.load(resume, loop))
    try:
        loop.run()
    except Killed:
        loop.was_killed = True
    checkpoints.close()
    return loop


KILLED_AT = {
    "on probation": lambda loop: loop._jump is not None and loop.progress.step == FIRST + 3,
    "on the first step of a probation": lambda loop: (
        loop._jump is not None and loop.progress.step == SECOND + 1
    ),
    "behind a larger batch": lambda loop: loop.progress.step == SECOND + 9,
    "on the probation of the next one": lambda loop: loop.progress.step == THIRD + 5,
}
BATCHES = {
    FIRST: Controls(batch_factor=0.5),
    SECOND: Controls(batch_factor=1.0, rate_factor=2.0),
    THIRD: Controls(batch_factor=2.0, rate_factor=2.0, decay_start=40, decay_steps=15),
}
WINDOWS = {
    FIRST: Controls(context_tokens=16),
    SECOND: Controls(context_tokens=16, batch_factor=0.5),
    THIRD: Controls(batch_factor=1.0),
}


WHOLE: dict[str, tuple[Loop, torch.Tensor]] = {}  # the same for every kill: taken once


@pytest.mark.parametrize("when", KILLED_AT)
@pytest.mark.parametrize("what", ["batches", "windows"])
def test_a_run_that_is_killed_goes_on_from_its_checkpoint_as_if_it_had_not_been(
    what: str, when: str, judged, text_job, tmp_path: Path
) -> None:
    judged(Verdict.ACCEPTED)
    wanted, overrides = (WINDOWS, text_job) if what == "windows" else (BATCHES, ())
    if what not in WHOLE:
        WHOLE[what] = kept(tmp_path / "whole", wanted, *overrides), torch.get_rng_state()
    whole, random_of_whole = WHOLE[what]
    assert verdicts(whole.links) == [Verdict.ACCEPTED] * 3
    root = tmp_path / "killed"
    killed = kept(root, wanted, *overrides, kill=KILLED_AT[when])
    assert killed.was_killed
    newest = sealed_folder.folders(root)[0]
    again = kept(root, wanted, *overrides, resume=newest)
    assert sealed_folder.age_key(newest.name)[1] < killed.progress.step
    assert same_bits(all_bits(whole), all_bits(again))
    assert same_bits(whole.basis.tensors().values(), again.basis.tensors().values())
    assert torch.equal(random_of_whole, torch.get_rng_state())
    assert repr(whole.progress) == repr(again.progress)
    assert whole.ledger.passes == again.ledger.passes


@pytest.mark.parametrize("predictor_asks_again", [False, True])
def test_a_rollback_puts_the_controls_of_its_checkpoint_in_force(
    predictor_asks_again: bool, judged, tmp_path: Path
) -> None:
    """Clock and controls are the checkpoint's; the data go on from where the spike had come to."""
    judged(Verdict.ACCEPTED)
    change = Controls(rate_factor=0.5, batch_factor=0.5)

    def answer(observation: Observation) -> PhaseDecision | None:
        is_asked = observation.step == THIRD and (predictor_asks_again or observation.attempt == 0)
        return of_controls(observation, change) if is_asked else None

    checkpoints = Checkpoints(tmp_path, keep=99, on_failure=pytest.fail)
    every = ("trainer.checkpoint.every_steps=4", "trainer.steps=120", "trainer.optimizer.name=adamw")
    loop, links = looped(answer, *every)
    # Steps 39 to 44 are its probation, on batches 38 to 40; no checkpoint was written with it in force.
    data = Rotten(loop.task.train.batches, is_rotten=lambda position: position in (41, 42))
    object.__setattr__(loop.task, "train", data)
    housekeeping = Housekeeping(links.emit, checkpoints)
    loop._housekeeping = housekeeping
    housekeeping.begin(loop)
    loop.run()
    checkpoints.close()
    told = links.of(Observation)
    ((before, after),) = [(a, b) for a, b in itertools.pairwise(told) if b.step <= a.step]
    factors = [INDEX["log2_batch_factor"], INDEX["log2_rate_factor"]]
    assert [before.features[index] for index in factors] == [-1.0, -1.0]
    assert [after.features[index] for index in factors] == [0.0, 0.0]
    assert after.step <= THIRD
    assert loop.progress.controls == (change if predictor_asks_again else Controls())
    assert loop.progress.clock == 120
    whole_batches = math.ceil(loop.progress.data_step)
    assert data.used == list(range(whole_batches))
    assert whole_batches > 120
    assert all(bool(torch.isfinite(p).all()) for p in weights_of(loop))


LATE = {
    "of another step": {"base_step": 0},
    "of another attempt": {"base_attempt": 7},
    "of another start of the trainer": {"base_generation": 9},
    "of other weights": {"base_fingerprint": "0" * 16},
    "expired": {"valid_until_step": FIRST - 1},
}


@pytest.mark.parametrize("name", LATE)
def test_a_change_that_comes_too_late_changes_nothing(name: str) -> None:
    wanted = Controls(rate_factor=0.5, batch_factor=2.0)
    loop, links = run(lambda o: replace(of_controls(o, wanted), **LATE[name]))
    found = set(verdicts(links))
    assert Verdict.STALE in found
    assert name == "expired" or found == {Verdict.STALE}
    assert Verdict.ACCEPTED not in found
    assert loop.progress.controls == Controls()
    assert same_bits(weights_of(loop), undisturbed())


@pytest.mark.parametrize("verdict", [Verdict.ACCEPTED, Verdict.REFUSED])
def test_a_decision_that_comes_twice_is_taken_once(verdict: Verdict, judged) -> None:
    """With its id and all else as it must be: the controls that it asks for are of no account any more."""
    judged(verdict)
    ids: list[str] = []

    def answer(observation: Observation) -> PhaseDecision | None:
        factor = 0.5 ** (len(ids) + 1)
        decision = of_controls(observation, Controls(rate_factor=factor))
        ids.append(decision.decision_id)
        return replace(decision, decision_id=ids[0])

    loop, links = run(answer)
    found = verdicts(links)
    assert found[0] is verdict
    assert set(found[1:]) == {Verdict.USED}
    assert loop.progress.controls == (
        Controls(rate_factor=0.5) if verdict is Verdict.ACCEPTED else Controls()
    )


def test_an_order_to_halve_wins_over_a_larger_batch_whenever_it_comes(judged) -> None:
    """Before the change, on its probation and behind it; the step keeps its items."""
    judged(Verdict.ACCEPTED)
    loop, _ = looped(script({FIRST: Controls(batch_factor=4.0)}), "trainer.controls.batch_change=4")
    sizes: list[tuple[int, int]] = []
    loss, note_step = loop.task.loss, loop.note_step

    def noted(batch):
        if loop.task.model.training:
            sizes.append((loop.progress.step, len(batch.inputs)))
        return loss(batch)

    def order(taken):
        if loop.progress.step in (FIRST - 3, FIRST + 8):
            assert loop.is_calm
            assert carry_out(loop, MemoryAction.HALVE_MICRO_BATCH, undo=False).done
        return note_step(taken)

    object.__setattr__(loop.task, "loss", noted)
    loop.note_step = order
    loop.run()
    for step in range(loop.progress.step):
        mine = [size for at, size in sizes if at == step]
        assert max(mine) <= (16 if step <= FIRST - 3 else 8 if step <= FIRST + 8 else 4)
        assert sum(mine) == (16 if step < FIRST else min(64, sum(mine)))
    assert sum(size for _, size in sizes) == 60 * 16


def test_without_directions_the_controls_stay_as_they_were_and_the_run_ends_with_its_data(judged) -> None:
    """The monitor's order PREDICTION_OFF: nobody can propose any more, to change back included."""
    judged(Verdict.ACCEPTED)
    loop, links = looped(script({FIRST: Controls(batch_factor=2.0), SECOND: Controls()}))
    note_step = loop.note_step

    def order(taken):
        if loop.progress.step == FIRST + 8:
            assert carry_out(loop, MemoryAction.PREDICTION_OFF, undo=False).done
        return note_step(taken)

    loop.note_step = order
    loop.run()
    assert verdicts(links) == [Verdict.ACCEPTED]
    assert loop.progress.controls == Controls(batch_factor=2.0)
    assert (loop.progress.clock, loop.task.train.used) == (60, list(range(60)))


@pytest.mark.parametrize("where", ["passes", "update"])
def test_memory_that_runs_out_on_probation_sets_the_controls_back(where: str, judged) -> None:
    judged(Verdict.ACCEPTED)
    loop, links = looped(script({FIRST: Controls(batch_factor=2.0, rate_factor=0.5)}))
    loop.memory.halvings = 4  # one item at a time: nothing is left to be halved
    optimizer, loss = loop.optimizers[0], loop.task.loss
    step, raised = optimizer.step, []

    def run_out(work, is_here):
        def called(*arguments):
            if is_here and loop._jump is not None and loop.progress.step == FIRST + 2 and not raised:
                raised.append(loop.progress.controls)
                raise torch.OutOfMemoryError("simulated")
            return work(*arguments)

        return called

    optimizer.step = run_out(step, where == "update")
    object.__setattr__(loop.task, "loss", run_out(loss, where == "passes"))
    before: list[list[torch.Tensor]] = []
    answer = loop.links.answer
    loop.links.answer = lambda o: before.append(all_bits(loop)) or answer(o)
    emit = loop.emit

    def listen(message):
        emit(message)
        if isinstance(message, Outcome) and message.verdict is Verdict.FAILED:
            assert loop.progress.controls == Controls()
            progress = loop.progress
            assert (progress.step, progress.clock, progress.data_step) == (FIRST, FIRST, FIRST)
            assert same_bits(before[-1], all_bits(loop))

    loop.emit = listen
    loop.run()
    assert raised == [Controls(batch_factor=2.0, rate_factor=0.5)]
    assert verdicts(links)[0] is Verdict.FAILED
    assert loop.progress.clock == 60


def as_main_wrote_it(loop: Loop) -> None:
    """Without what this release has added to a checkpoint."""
    to_json = loop.progress.to_json

    def of_main():
        values = to_json()
        for name in ("controls", "extra_steps", "extra_data_steps"):
            del values[name]
        features = dict(values["features"])
        for name in ("noise", "average_distance"):
            del features[name]
        return {**values, "features": features}

    loop.progress.to_json = of_main


def saved(root: Path, loop: Loop, *, of_main: bool = False, at_step: int = 22) -> Path:
    checkpoints = Checkpoints(root, keep=9, on_failure=pytest.fail)

    def between(loop: Loop) -> None:
        if loop.progress.step == at_step:
            if of_main:
                as_main_wrote_it(loop)
            checkpoints.save(loop, Housekeeping(loop.emit, None).to_json(), emergency=False)
            loop.stop_requested = True

    loop._housekeeping = between
    loop.run()
    checkpoints.close()
    return sealed_folder.folders(root)[0]


@pytest.mark.parametrize("on", [(), ALL_ON], ids=["off", "on"])
def test_a_checkpoint_from_before_there_were_controls_goes_on_as_configured(
    on: tuple[str, ...], tmp_path: Path
) -> None:
    loop, _ = looped(lambda _: None, DROPOUT, on=on)
    folder = saved(tmp_path, loop, of_main=True)
    fresh, _ = looped(lambda _: None, DROPOUT, on=on)
    checkpoint.load(folder, fresh)
    assert (fresh.progress.controls, fresh.progress.clock) == (Controls(), 22)
    fresh.run()
    whole, _ = run(lambda _: None, DROPOUT, on=on)
    assert same_bits(all_bits(whole), all_bits(fresh))


def test_a_run_that_kept_no_directions_may_be_given_controls(judged, tmp_path: Path) -> None:
    """Too short to pay for a jump (common/trying.py) it had none; they begin anew, and warm first."""
    judged(Verdict.ACCEPTED)
    learned = ("predictor.policy=learned", "trainer.steps=90")
    loop, _ = looped(lambda _: None, DROPOUT, *learned, on=())
    assert loop.basis is None
    folder = saved(tmp_path, loop, of_main=True)
    asked: list[int] = []

    def answer(observation: Observation) -> PhaseDecision | None:
        asked.append(observation.step)
        return of_controls(observation, Controls(rate_factor=0.5)) if len(asked) == 1 else None

    fresh, _ = looped(answer, DROPOUT, *learned)
    before = weights_of(loop)
    checkpoint.load(folder, fresh)
    assert same_bits(before, weights_of(fresh))
    fresh.run()
    assert asked[0] == 32  # the window from 20 to 26 had begun
    assert fresh.progress.controls == Controls(rate_factor=0.5)


def test_controls_beyond_todays_bounds_are_refused_with_the_cure(judged, tmp_path: Path) -> None:
    judged(Verdict.ACCEPTED)
    loop, _ = looped(script({FIRST: Controls(rate_factor=4.0)}))
    folder = saved(tmp_path, loop)
    assert loop.progress.controls.rate_factor == 4.0
    narrower, _ = looped(lambda _: None, "trainer.controls.rate_high=2.0")
    before = weights_of(narrower)
    with pytest.raises(
        CheckpointError, match=r"rate_factor = 4 .*resume with the \[trainer.controls\]"
    ) as error:
        checkpoint.load(folder, narrower)
    assert "\n" not in str(error.value)
    assert same_bits(before, weights_of(narrower))
    assert math.isclose(narrower.progress.clock, 0.0)
    off, _ = looped(lambda _: None, on=())
    checkpoint.load(folder, off)
    assert off.progress.controls == Controls()


QUARTER = "trainer.controls.batch_change=4"  # at once


def test_a_checkpoint_within_a_micro_batch_of_todays_batch_is_refused_with_the_cure(
    judged, tmp_path: Path
) -> None:
    judged(Verdict.ACCEPTED)
    loop, _ = looped(script({FIRST: Controls(batch_factor=0.25)}), QUARTER)
    folder = saved(tmp_path, loop, at_step=21)
    assert loop.progress.clock == 15.75
    fitting, _ = looped(lambda _: None, "trainer.batch.sequences=4", on=())
    checkpoint.load(folder, fitting)
    assert fitting.progress.clock == 15.75
    other, _ = looped(lambda _: None, "trainer.batch.sequences=2", on=())
    before = weights_of(other)
    with pytest.raises(CheckpointError, match=r"15\.75 steps.*resume with .* the batch") as error:
        checkpoint.load(folder, other)
    assert "\n" not in str(error.value)
    assert same_bits(before, weights_of(other))


def test_without_checkpoints_on_the_way_none_is_written_however_many_steps_the_run_takes(
    judged, tmp_path: Path
) -> None:
    """every_steps = 0: only the end writes one, and with a quarter of the batch it is at step 198, not 60."""
    judged(Verdict.ACCEPTED)
    wanted = {FIRST: Controls(batch_factor=0.25)}
    loop = kept(tmp_path, wanted, "trainer.checkpoint.every_steps=0", QUARTER)
    assert (loop.progress.step, loop.progress.clock) == (198, 60)
    assert not sealed_folder.folders(tmp_path)


def test_a_trial_of_controls_is_never_corrected(judged) -> None:
    """There is no delta to correct, whatever share of one the decision asks for."""
    judged(Verdict.ACCEPTED)
    change = Controls(rate_factor=2.0)
    plain, _ = run(script({FIRST: change}))
    asked, links = run(
        lambda o: replace(of_controls(o, change), correction_share=1.0) if o.step == FIRST else None
    )
    (outcome,) = [o for o in links.of(Outcome) if o.verdict is Verdict.ACCEPTED]
    assert outcome.correction == 0.0
    assert math.isnan(outcome.slope_after)
    assert same_bits(all_bits(plain), all_bits(asked))
