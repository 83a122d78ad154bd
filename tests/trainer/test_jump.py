import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.clock import FakeClock
from common.errors import EnvironmentFault
from common.messages import APPLIED_VERDICTS, Controls, Outcome, Phase, PhaseDecision, Verdict
from common.settings import VerifySettings
from tests.references import cosine_of
from tests.trainer.small_job import DRIFT, MOMENTUM, small_job, whole
from trainer_node.basis import K
from trainer_node.fingerprint import fingerprint
from trainer_node.jump import Before, Jump, JumpTools, abort_jump, blank_outcome, finish_jump, start_jump
from trainer_node.ledger import Ledger
from trainer_node.snapshot import DiskStore, MemoryStore

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
STEP_PASSES = 3.0


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    yield (store := MemoryStore() if request.param == "memory" else DiskStore(tmp_path))
    store.close()


class Trial:
    """A small job after two windows, and the tools to jump with. Guard losses may be scripted."""

    def __init__(self, *, store=None, guard=None, counted=True, **job_options):
        self.job = small_job(**job_options)
        self.job.window()
        self.job.window()
        self.clock = FakeClock()
        self._script = iter(guard) if guard is not None else None
        self.tools = JumpTools(
            basis=self.job.basis,
            optimizers=self.job.optimizers,
            store=store or MemoryStore(),
            guard_loss=self.guard_loss,
            ledger=Ledger(self.clock, counted=counted),
            settings=VerifySettings(guard_batches=2, ruin_share=0.5, tolerance=1.0),
            probation_steps=4,
        )

    def guard_loss(self):
        self.clock.advance(0.25)
        return self.job.guard_loss() if self._script is None else next(self._script)

    def decision(self, coefficients_GK=None, **changes):
        groups = len(self.job.groups)
        table = torch.zeros(groups, K) if coefficients_GK is None else coefficients_GK
        if coefficients_GK is None:
            table[:, DRIFT], table[:, MOMENTUM] = 0.5, 0.25
        known = PhaseDecision(
            decision_id="8.0", phase=Phase.PREDICT, horizon_steps=10, num_groups=groups, num_directions=K,
            coefficients=tuple(table.reshape(-1).tolist()), controls=Controls(), forecast=None,
            base_generation=1, base_step=8, base_attempt=0,
            base_fingerprint=fingerprint(self.job.basis.parameters), valid_until_step=8, reason="test",
        )  # fmt: skip
        return dataclasses.replace(known, **changes)

    def start(self, decision=None, **before):
        known = {
            "attempt": 3, "recent_losses": [2.0] * 12, "first_loss": 4.0, "loss_noise": 0.01,
            "waiting_seconds": 0.5, "full_step_seconds": 6.0,
        }  # fmt: skip
        return start_jump(self.tools, decision or self.decision(), Before(**{**known, **before}))

    def probation(self, jump, steps=4):
        for _ in range(steps):
            self.job.step()
            jump.step_seconds.append(2.0)
            jump.step_passes += STEP_PASSES

    def state(self):
        """As the loop leaves it: after any verdict a window begins."""
        self.job.basis.averages.begin_window()
        return self.job.state()


def all_bits_of(optimizer, dtype, store, guard):
    """A trial, and its state right before the jump."""
    trial = Trial(optimizer=optimizer, dtype=dtype, store=store, guard=guard)
    return trial, trial.state()


DTYPES = pytest.mark.parametrize("dtype", ["fp32", "bf16"])


@OPTIMIZERS
@DTYPES
def test_a_ruined_delta_leaves_every_bit_as_it_was(store, optimizer, dtype):
    trial, before = all_bits_of(optimizer, dtype, store, [2.0, 9.0])
    outcome = trial.start()
    assert outcome.verdict is Verdict.RUINED
    assert trial.state() == before


@OPTIMIZERS
@DTYPES
def test_a_refused_delta_leaves_every_bit_as_it_was(store, optimizer, dtype):
    trial, before = all_bits_of(optimizer, dtype, store, [2.0, 2.1, 2.5])
    jump = trial.start()
    trial.probation(jump)
    assert trial.state() != before
    assert finish_jump(trial.tools, jump).verdict is Verdict.REFUSED
    assert trial.state() == before


@OPTIMIZERS
@DTYPES
@pytest.mark.parametrize("steps", [0, 2])
def test_an_aborted_delta_leaves_every_bit_as_it_was(store, optimizer, dtype, steps):
    trial, before = all_bits_of(optimizer, dtype, store, [2.0, 2.1])
    jump = trial.start()
    trial.probation(jump, steps)
    outcome = abort_jump(trial.tools, jump)
    assert outcome.verdict is Verdict.ABORTED
    assert (outcome.lost_steps, outcome.probation_steps) == (steps, steps)
    assert outcome.attempt == 3 + (steps > 0)
    assert trial.state() == before


@OPTIMIZERS
def test_a_delta_that_moves_no_weight_is_malformed_and_leaves_every_bit_as_it_was(store, optimizer):
    tiny = 1e-38  # times a direction it is lost in the rounding of any weight
    for value in (0.0, tiny):
        trial, before = all_bits_of(optimizer, "fp32", store, [2.0, 2.0])
        with torch.no_grad():
            for p in trial.job.basis.parameters:
                p.add_(1.0)
        before = trial.state()
        outcome = trial.start(trial.decision(torch.full((len(trial.job.groups), K), value)))
        assert outcome.verdict is Verdict.MALFORMED
        assert trial.state() == before


@pytest.mark.parametrize("value", [1e300, 3e38, 1e20, -1e300])
def test_an_overflowing_delta_is_ruined_and_leaves_every_bit_as_it_was(value):
    """Finite as float64, infinite as float32 or once multiplied."""
    trial = Trial()
    before = trial.state()
    coefficients = (value,) * (len(trial.job.groups) * K)
    outcome = trial.start(trial.decision(coefficients=coefficients))
    assert outcome.verdict is Verdict.RUINED
    assert trial.state() == before


def test_an_accepted_delta_keeps_weights_and_steps():
    trial = Trial(guard=[2.0, 2.1, 1.9])
    before = fingerprint(trial.job.basis.parameters)
    jump = trial.start()
    assert isinstance(jump, Jump)
    trial.probation(jump)
    reached = trial.state()
    outcome = finish_jump(trial.tools, jump)
    assert outcome.verdict is Verdict.ACCEPTED
    assert trial.state() == reached
    assert fingerprint(trial.job.basis.parameters) != before
    assert (outcome.attempt, outcome.lost_steps, outcome.probation_steps) == (3, 0, 4)


def test_a_failed_snapshot_changes_nothing_and_is_told():
    def full_disk(*_):
        raise EnvironmentFault("no snapshot: disk full")

    trial = Trial(store=SimpleNamespace(save=full_disk), guard=[])
    before = trial.state()
    outcome = trial.start()
    assert isinstance(outcome, Outcome)
    assert (outcome.verdict, outcome.passes, outcome.delta_norm) == (Verdict.FAILED, 0.0, 0.0)
    assert trial.state() == before


def test_a_restore_from_a_damaged_store_stops_training():
    store = MemoryStore()
    trial = Trial(store=store, guard=[2.0, 2.1])
    jump = trial.start()
    store._copies[0].view(-1)[0] += 1.0
    with pytest.raises(EnvironmentFault, match="resume from the last checkpoint"):
        abort_jump(trial.tools, jump)


LOSS = st.one_of(st.floats(0, 10), st.sampled_from([math.nan, math.inf, -math.inf]))


@settings(deadline=None, max_examples=40)
@given(LOSS, LOSS, LOSS, LOSS)
def test_a_jump_is_kept_only_on_finite_losses_and_else_every_bit_is_as_it_was(loss, after, end, first):
    trial = Trial(guard=[loss, after, end])
    before = trial.state()
    jump = trial.start(first_loss=first)
    if isinstance(jump, Jump):
        trial.probation(jump, 1)
        jump = finish_jump(trial.tools, jump)
    assert jump.verdict in APPLIED_VERDICTS
    if jump.verdict is Verdict.ACCEPTED:
        assert all(map(math.isfinite, (loss, after, end)))
        assert end <= loss + jump.loss_spread  # a flat curve forecasts no change
    else:
        assert trial.state() == before


def test_a_jump_as_good_as_its_forecast_is_accepted_and_a_bad_one_refused():
    falling = [4.0 - 0.1 * step for step in range(12)]
    for end, verdict in ((1.6, Verdict.ACCEPTED), (1.7, Verdict.REFUSED)):
        trial = Trial(guard=[2.0, 2.0, end])
        jump = trial.start(recent_losses=falling)
        assert jump.outcome.loss_forecast == pytest.approx(2.0 - 4 * 0.1)  # four steps of probation
        assert finish_jump(trial.tools, jump).verdict is verdict


def test_the_ruin_bound_is_half_of_the_way_back_to_the_first_loss():
    assert isinstance(Trial(guard=[2.0, 3.0]).start(first_loss=4.0), Jump)
    assert isinstance(Trial(guard=[2.0, 3.01]).start(first_loss=4.0), Outcome)
    assert isinstance(Trial(guard=[2.0, 3.01]).start(first_loss=4.0, loss_noise=0.2), Jump)


def test_all_that_a_refused_jump_cost_is_in_its_outcome():
    trial = Trial(guard=[2.0, 2.1, 2.5])
    jump = trial.start()
    trial.probation(jump)
    outcome = finish_jump(trial.tools, jump)
    assert outcome.passes == 3 * 2 + 4 * STEP_PASSES  # three checks of two guard batches, four lost steps
    assert outcome.check_seconds == 6.0  # counted
    assert (outcome.lost_steps, outcome.lost_seconds, outcome.attempt) == (4, 8.0, 4)
    assert (outcome.waiting_seconds, outcome.full_step_seconds) == (0.5, 6.0)
    assert (outcome.loss_before, outcome.loss_after, outcome.loss_end) == (2.0, 2.1, 2.5)
    assert (outcome.base_step, outcome.horizon_steps, outcome.decision_id) == (8, 10, "8.0")
    assert trial.tools.ledger.passes["verification"] == 6.0


def test_in_live_mode_the_outcome_tells_wall_seconds():
    trial = Trial(guard=[2.0, 2.1, 1.9], counted=False)
    jump = trial.start()
    outcome = finish_jump(trial.tools, jump)
    assert outcome.check_seconds == 0.75
    assert outcome.snapshot_seconds == outcome.jump_seconds == outcome.restore_seconds == 0.0
    assert outcome.passes == 6.0


def test_equal_trials_tell_equal_outcomes():
    outcomes = []
    for _ in range(2):
        trial = Trial(optimizer="muon")
        jump = trial.start()
        trial.probation(jump)
        outcomes.append(finish_jump(trial.tools, jump))
    assert repr(outcomes[0]) == repr(outcomes[1])  # by text, as NaN is not equal to itself


def test_the_cosine_is_of_the_delta_to_what_probation_did_afterwards():
    trial = Trial(guard=[2.0, 2.1, 1.9])
    start = whole(trial.job.basis.parameters)
    jump = trial.start()
    jumped = whole(trial.job.basis.parameters)
    trial.probation(jump)
    reached = whole(trial.job.basis.parameters)
    outcome = finish_jump(trial.tools, jump)
    assert outcome.delta_cosine == pytest.approx(cosine_of(jumped - start, reached - jumped), abs=1e-4)


def test_a_blank_outcome_moved_nothing_and_measured_nothing():
    outcome = blank_outcome("1.0", Verdict.STALE, step=1, attempt=0)
    assert outcome.delta_norm == outcome.passes == outcome.lost_steps == 0
    assert all(math.isnan(v) for v in (outcome.loss_before, outcome.loss_end, outcome.delta_cosine))
