import dataclasses

import numpy as np
import pytest
import torch

from common.messages import Controls, Phase, PhaseDecision
from tests.references import snoo_weights
from tests.trainer.small_job import (
    DRIFT,
    MOMENTUM,
    PULL_BACK,
    SLOW_DRIFT,
    bits,
    directions_by_group,
    small_job,
    whole,
)
from trainer_node import delta as delta_module
from trainer_node import fused_apply
from trainer_node.basis import K
from trainer_node.delta import apply_delta, coefficients_of, linear_deltas, move

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def ready_job(**options):
    job = small_job(**options)
    job.window()
    job.window()
    return job


def random_coefficients(job, *, seed=0):
    return torch.randn(len(job.groups), K, generator=torch.Generator().manual_seed(seed))


def weights_by_group(job):
    return [whole(group.parameters) for group in job.groups]


def test_coefficients_are_read_row_by_row():
    decision = PhaseDecision(
        decision_id="1.0", phase=Phase.PREDICT, horizon_steps=1, num_groups=2, num_directions=3,
        coefficients=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), controls=Controls(), forecast=None, base_generation=1,
        base_step=1, base_attempt=0, base_fingerprint="", valid_until_step=1, reason="",
    )  # fmt: skip
    assert coefficients_of(decision).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert coefficients_of(dataclasses.replace(decision, num_groups=3, num_directions=2)).shape == (3, 2)


@OPTIMIZERS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_weights_move_by_the_sum_of_coefficients_times_directions(optimizer, dtype):
    job = ready_job(optimizer=optimizer, dtype=dtype)
    coefficients = random_coefficients(job)
    directions, before = directions_by_group(job.basis), weights_by_group(job)
    applied = apply_delta(job.basis, coefficients)
    wanted = [row @ d for row, d in zip(coefficients.double().numpy(), directions, strict=True)]
    for old, new, delta in zip(before, weights_by_group(job), wanted, strict=True):
        np.testing.assert_allclose(new - old, delta, atol=1e-6)
    assert applied.norm == pytest.approx(np.linalg.norm(np.concatenate(wanted)), rel=1e-5)


def test_zero_coefficients_leave_the_weights_bit_identical():
    """Also where a weight is minus zero: adding a zero would make it plus zero."""
    job = ready_job()
    with torch.no_grad():
        job.model.head.bias.copy_(torch.tensor([-0.0, 0.0, 1e-45, -0.0, 3.0]))
    before = job.state()
    applied = apply_delta(job.basis, torch.zeros(len(job.groups), K))
    assert job.state() == before
    assert applied.norm == 0.0
    assert not applied.sample_Gm.any()


@pytest.mark.parametrize(("sample_size", "smallest"), [(4096, 0), (16, 40)])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("momentum", [0.25, 0.0])
@OPTIMIZERS
def test_a_jump_leaves_every_bit_as_whole_deltas_do(
    monkeypatch, optimizer, momentum, dtype, weights, sample_size, smallest
):
    """In one pass over memory or not; and one group of three, whose coefficients are zero, as it was."""
    monkeypatch.setattr(fused_apply, "BLOCK_BYTES", 120)  # some parameters are several blocks
    monkeypatch.setattr(delta_module, "SMALLEST_ONE_PASS", smallest)
    jobs = [
        ready_job(optimizer=optimizer, dtype=dtype, weights=weights, sample_size=sample_size)
        for _ in range(2)
    ]
    coefficients = random_coefficients(jobs[0])
    coefficients[:, MOMENTUM] *= momentum
    coefficients[1] = 0.0
    for job in jobs:
        with torch.no_grad():
            for parameter in job.basis.parameters:
                parameter.view(-1)[0] = -0.0
    still = [bits(p) for p in jobs[0].groups[1].parameters]
    applied = apply_delta(jobs[0].basis, coefficients)
    in_wholes = move(jobs[1].basis, linear_deltas(jobs[1].basis, coefficients))
    assert jobs[0].state() == jobs[1].state()
    assert bits(applied.sample_Gm) == bits(in_wholes.sample_Gm)
    assert bits(applied.weights_Gm) == bits(in_wholes.weights_Gm)
    assert applied.norm == pytest.approx(in_wholes.norm, rel=1e-5)
    assert applied.norm > 0.0
    assert [bits(p) for p in jobs[0].groups[1].parameters] == still


@pytest.mark.parametrize(
    ("weights", "are_with_weights", "smallest", "is_one_pass"),
    [
        (torch.float32, True, 5, True),
        (torch.float32, True, 97, False),
        (torch.float32, False, 5, False),
        (torch.bfloat16, True, 5, False),
    ],
    ids=["plain", "small", "averages elsewhere", "half precision on a CPU"],
)
def test_whole_deltas_are_made_only_where_one_pass_does_not_fit(
    monkeypatch, weights, are_with_weights, smallest, is_one_pass
):
    monkeypatch.setattr(delta_module, "SMALLEST_ONE_PASS", smallest)  # the parameters have 5 to 96 weights
    job, asked = ready_job(weights=weights), []
    kind = type(job.basis.averages)
    shift = kind.shift
    monkeypatch.setattr(kind, "are_with_weights", are_with_weights)
    monkeypatch.setattr(kind, "shift", lambda self, *of: (asked.append(of[0]), shift(self, *of)))
    apply_delta(job.basis, random_coefficients(job))
    assert sorted(asked) == ([] if is_one_pass else list(range(len(job.basis.parameters))))


@pytest.mark.parametrize("group", range(3))
def test_a_row_moves_its_own_group_only(group):
    job = ready_job()
    with torch.no_grad():
        for parameter in job.basis.parameters:
            parameter.view(-1)[0] = -0.0
    coefficients = torch.zeros(len(job.groups), K)
    coefficients[group] = 0.5
    before = [[bits(p) for p in g.parameters] for g in job.groups]
    apply_delta(job.basis, coefficients)
    after = [[bits(p) for p in g.parameters] for g in job.groups]
    assert [index for index in range(len(job.groups)) if before[index] != after[index]] == [group]


def test_a_jump_keeps_the_pull_back_and_touches_no_moment_and_no_random_state():
    job = ready_job()
    before = job.state()
    pull_back = [rows[PULL_BACK] for rows in directions_by_group(job.basis)]
    apply_delta(job.basis, random_coefficients(job))
    changed = {name for name, raw in job.state().items() if before[name] != raw}
    assert not {name for name in changed if name.startswith(("optimizer", "random"))}
    for old, rows in zip(pull_back, directions_by_group(job.basis), strict=True):
        np.testing.assert_allclose(rows[PULL_BACK], old, atol=1e-6)


@pytest.mark.parametrize("sample_size", [4096, 16])
def test_the_samples_are_of_the_delta_and_of_the_weights_right_after_it(sample_size):
    job = ready_job(sample_size=sample_size)
    before_Gm = job.basis.sampled(job.basis.parameters)
    applied = apply_delta(job.basis, random_coefficients(job))
    assert torch.equal(applied.weights_Gm, job.basis.sampled(job.basis.parameters))
    torch.testing.assert_close(before_Gm + applied.sample_Gm, applied.weights_Gm, atol=1e-6, rtol=0)


def test_without_a_momentum_coefficient_the_optimizer_is_not_asked():
    job = ready_job()
    asked, same = small_job(), random_coefficients(job)
    same[:, MOMENTUM] = 0.0
    asked.window()
    asked.window()
    job.basis._optimizers = []  # asking would yield no parameter at all
    apply_delta(job.basis, same)
    for mine, other in zip(job.basis.parameters, asked.basis.parameters, strict=True):
        assert not torch.equal(mine, other)
    apply_delta(asked.basis, same)
    for mine, other in zip(job.basis.parameters, asked.basis.parameters, strict=True):
        assert bits(mine) == bits(other)


@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.4), (1.0, 0.9), (0.5, 0.0)])
def test_snoo_is_one_row_of_coefficients(rate, momentum):
    """phi + rate (D + mu b) - theta, theta = phi + D, is (rate - 1) D + rate mu b."""
    job = small_job(average_steps=0, slow_momentum=momentum)
    row = torch.zeros(K)
    row[DRIFT], row[SLOW_DRIFT] = rate - 1.0, rate * momentum
    start, updates, found = whole(job.basis.parameters), [], []
    for _ in range(3):
        job.basis.averages.begin_window()
        window, last = [], whole(job.basis.parameters)
        for _ in range(4):
            job.step()
            now = whole(job.basis.parameters)
            window.append(now - last)
            last = now
        updates.append(window)
        job.close()
        apply_delta(job.basis, row.expand(len(job.groups), K))
        found.append(whole(job.basis.parameters))
    for mine, twin in zip(found, snoo_weights(start, updates, rate=rate, momentum=momentum), strict=True):
        np.testing.assert_allclose(mine, twin, atol=1e-6)
    assert np.linalg.norm(found[-1] - start) > 0.1
