"""Jumps in parts, jumps without the guard, and jumps in a random direction."""

import dataclasses
import math

import pytest
import torch

from common.messages import Outcome, Verdict
from common.settings import VerifySettings
from tests.trainer.small_job import DRIFT, PULL_BACK, bits, whole
from tests.trainer.test_jump import Trial
from trainer_node.basis import K
from trainer_node.fingerprint import fingerprint
from trainer_node.jump import Jump, abort_jump, blank_outcome, finish_jump
from trainer_node.parts import move_in_parts

NOISE = 0.01  # of Trial's training loss


def trial_in_parts(count, guard=None, **options):
    trial = Trial(guard=guard, **options)
    table = torch.zeros(len(trial.job.groups), K)
    table[:, DRIFT], table[:, PULL_BACK] = 0.5, 0.25
    return trial, trial.decision(table, chunks=count)


def test_all_parts_together_are_the_whole_delta():
    whole_trial, decision = trial_in_parts(1, guard=[2.0] * 9)
    start = whole(whole_trial.job.basis.parameters)
    one = whole_trial.start(decision)
    trial, decision = trial_in_parts(4, guard=[2.0, 1.9, 1.8, 1.7, 1.6])
    four = trial.start(decision)
    moved = whole(whole_trial.job.basis.parameters) - start
    assert whole(trial.job.basis.parameters) - start == pytest.approx(moved, abs=1e-6)
    assert (one.outcome.chunks_applied, four.outcome.chunks_applied) == (1, 4)
    assert four.outcome.delta_norm == pytest.approx(one.outcome.delta_norm, rel=1e-5)
    torch.testing.assert_close(four.delta.sample_Gm, one.delta.sample_Gm, atol=1e-6, rtol=1e-4)
    assert (four.outcome.loss_after, four.outcome.passes) == (1.6, 5 * 2)
    assert four.outcome.horizon_steps == 10


def test_one_part_through_the_machinery_of_parts_is_bit_for_bit_the_whole_delta():
    plain, decision = trial_in_parts(1, guard=[2.0, 2.0])
    plain.start(decision)
    trial, decision = trial_in_parts(1, guard=[2.0])
    outcome = blank_outcome("8.0", Verdict.ACCEPTED, step=8, attempt=0)
    jump = Jump(decision, dataclasses.replace(outcome, loss_before=2.0), None, None, None)  # type: ignore[arg-type]
    deltas = trial.tools.deltas(decision, None)
    assert move_in_parts(trial.tools, jump, deltas, bound=9.0, slack=1.0) is None
    assert trial.state() == plain.state()


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([1.9, 1.8, 1.82], 2), ([2.005, 2.02], 1), ([1.9, 9.0], 1), ([1.9, math.nan], 1)],
    ids=["above the best", "above the first", "ruin", "not a number"],
)
def test_the_part_that_makes_it_worse_is_taken_back_to_the_bit(losses, kept):
    trial, decision = trial_in_parts(4, guard=[2.0, *losses])
    jump = trial.start(decision)
    assert isinstance(jump, Jump)
    assert (jump.outcome.chunks_applied, jump.outcome.loss_after) == (kept, losses[kept - 1])
    assert jump.outcome.horizon_steps == max(1, round(10 * kept / 4))
    assert jump.outcome.passes == 2 * (1 + len(losses))
    twin, decision = trial_in_parts(4)
    for _ in range(kept):
        for index, part in parts_of(twin, decision):
            twin.job.basis.parameters[index].data.add_(part)
    assert [bits(p) for p in trial.job.basis.parameters] == [bits(p) for p in twin.job.basis.parameters]


def parts_of(trial, decision):
    if not hasattr(trial, "parts"):
        with torch.no_grad():
            trial.parts = [(i, d / decision.chunks) for i, d in trial.tools.deltas(decision, None)]
    return trial.parts


@pytest.mark.parametrize(("loss", "verdict"), [(2.02, Verdict.REFUSED), (9.0, Verdict.RUINED)])
def test_a_bad_first_part_leaves_every_bit_as_it_was(loss, verdict):
    trial, decision = trial_in_parts(3, guard=[2.0, loss])
    before = trial.state()
    outcome = trial.start(decision)
    assert isinstance(outcome, Outcome)
    assert (outcome.verdict, outcome.lost_steps, outcome.attempt) == (verdict, 0, 3)
    assert trial.state() == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_refused_jump_in_parts_leaves_every_bit_as_it_was(dtype):
    trial, decision = trial_in_parts(3, guard=[2.0, 1.9, 1.8, 2.5, 3.0], dtype=dtype)
    before = trial.state()
    jump = trial.start(decision)
    assert jump.outcome.chunks_applied == 2
    trial.probation(jump)
    assert finish_jump(trial.tools, jump).verdict is Verdict.REFUSED
    assert trial.state() == before


# ---- without the guard ---------------------------------------------------------------------


def unguarded(**options):
    trial = Trial(store=NoStore(), guard=[], **options)
    trial.tools = dataclasses.replace(trial.tools, settings=VerifySettings(enabled=False))
    return trial


class NoStore:
    """Any use of it fails."""


def test_without_the_guard_a_jump_takes_no_snapshot_and_no_pass():
    trial, guarded = unguarded(), Trial(guard=[2.0, 2.0])
    jump = trial.start()
    assert isinstance(jump, Jump)
    guarded.start()
    assert fingerprint(trial.job.basis.parameters) == fingerprint(guarded.job.basis.parameters)
    trial.probation(jump)
    jump.losses = [2.0, 9.0, 50.0]  # however bad
    outcome = finish_jump(trial.tools, jump)
    assert (outcome.verdict, outcome.passes, outcome.probation_steps) == (Verdict.ACCEPTED, 0.0, 4)
    assert math.isnan(outcome.loss_before)
    assert math.isnan(outcome.loss_end)
    assert math.isfinite(outcome.delta_cosine)
    assert trial.tools.ledger.passes["verification"] == 0.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_without_the_guard_only_a_loss_that_is_not_finite_is_refused_and_nothing_is_undone(loss):
    trial = unguarded()
    jump = trial.start()
    trial.probation(jump)
    reached = trial.state()
    jump.losses = [2.0, loss]
    outcome = finish_jump(trial.tools, jump)
    assert (outcome.verdict, outcome.lost_steps, outcome.attempt) == (Verdict.REFUSED, 0, 3)
    assert trial.state() == reached


def test_without_the_guard_a_stopped_run_keeps_its_jump():
    trial = unguarded()
    jump = trial.start()
    trial.probation(jump, 2)
    reached = trial.state()
    outcome = abort_jump(trial.tools, jump)
    assert (outcome.verdict, outcome.probation_steps, outcome.lost_steps) == (Verdict.ACCEPTED, 2, 0)
    assert trial.state() == reached


def test_without_the_guard_a_delta_that_moves_nothing_is_malformed():
    trial = unguarded()
    before = trial.state()
    outcome = trial.start(trial.decision(torch.zeros(len(trial.job.groups), K)))
    assert outcome.verdict is Verdict.MALFORMED
    assert trial.state() == before


# ---- the ablation --------------------------------------------------------------------------


def delta_of(seed, *, step=8, attempt=0, count=1):
    trial, decision = trial_in_parts(count, guard=[2.0] * 9)
    trial.tools = dataclasses.replace(trial.tools, ablation_seed=seed)
    random_before = torch.get_rng_state()
    decision = dataclasses.replace(decision, base_step=step, base_attempt=attempt)
    with torch.no_grad():
        deltas = {i: d.clone() for i, d in trial.tools.deltas(decision, None)}
    assert torch.equal(torch.get_rng_state(), random_before)
    return [deltas[i] for i in sorted(deltas)]


def test_a_random_direction_has_the_norm_of_the_delta_it_replaces():
    real, random = delta_of(None), delta_of(7)
    for mine, other in zip(random, real, strict=True):
        assert float(mine.norm()) == pytest.approx(float(other.norm()), rel=1e-5)
    left, right = whole(random), whole(real)
    assert abs(left @ right) < 0.3 * (left @ left)


def test_a_random_direction_is_a_function_of_seed_step_and_attempt():
    base = whole(delta_of(7))
    assert (whole(delta_of(7)) == base).all()
    for other in (delta_of(8), delta_of(7, step=9), delta_of(7, attempt=1)):
        assert not (whole(other) == base).all()
