import itertools
import tracemalloc

import numpy as np
import pytest
import torch

from common.errors import SettingsError
from tests.references import cosine_of, gram_of, happened_of
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
from trainer_node.basis import K
from trainer_node.groups import ParameterGroup
from trainer_node.weight_sample import WeightSample

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def plain_group(*sizes):
    parameters = tuple(torch.nn.Parameter(torch.empty(size)) for size in sizes)
    return ParameterGroup("group", tuple(str(i) for i in range(len(sizes))), parameters)


def as_table(values, *shape):
    return np.asarray(values).reshape(shape)


@OPTIMIZERS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gram_and_norms_equal_the_slow_twin(optimizer, dtype):
    job = small_job(optimizer=optimizer, dtype=dtype)
    job.window()
    point = job.window()
    gram = as_table(point.gram, len(job.groups), K, K)
    for index, vectors_KN in enumerate(directions_by_group(job.basis)):
        twin = np.asarray(gram_of(vectors_KN))
        scale = np.sqrt(np.outer(twin.diagonal(), twin.diagonal()))
        assert (np.abs(gram[index] - twin) <= 1e-5 * scale).all()
        assert point.displacement_norms[index] == pytest.approx(twin[DRIFT, DRIFT] ** 0.5, rel=1e-5)
        norm = np.linalg.norm(whole(job.groups[index].parameters))
        assert point.parameter_norms[index] == pytest.approx(norm, rel=1e-5)


def test_gram_is_symmetric_and_no_direction_of_it_is_idle():
    job = small_job()
    job.window()
    gram = as_table(job.window().gram, len(job.groups), K, K)
    assert (gram == gram.transpose(0, 2, 1)).all()
    assert (gram.diagonal(axis1=1, axis2=2) > 0).all()


@OPTIMIZERS
def test_what_happened_equals_least_squares_over_whole_vectors(optimizer):
    """The sample holds all weights here, so sample and whole agree."""
    job = small_job(optimizer=optimizer)
    job.window()
    former = directions_by_group(job.basis)
    point = job.window(steps=5)
    drifts = [rows[DRIFT] for rows in directions_by_group(job.basis)]
    happened = as_table(point.happened, len(job.groups), K)
    for index, (basis_KN, drift_N) in enumerate(zip(former, drifts, strict=True)):
        coefficients, unexplained = happened_of(basis_KN, drift_N)
        expressed, wanted = happened[index] @ basis_KN, coefficients @ basis_KN
        assert np.linalg.norm(expressed - wanted) < 1e-3 * np.linalg.norm(wanted)
        assert point.unexplained_share[index] == pytest.approx(unexplained, abs=1e-3)


@pytest.mark.parametrize("sample_size", [4096, 16])
def test_a_planted_combination_is_recovered_and_nothing_is_unexplained(sample_size):
    job = small_job(average_steps=0, sample_size=sample_size)
    job.window()
    job.window()
    planted = torch.randn(len(job.groups), K, generator=torch.Generator().manual_seed(3))
    planted[:, PULL_BACK] = 0.0  # without averaging it is no direction
    former = [(index, [d.clone() for d in directions]) for index, directions in job.basis.directions()]
    job.basis.averages.begin_window()
    job.basis.averages.before_step()
    with torch.no_grad():
        for index, directions in former:
            for coefficient, direction in zip(planted[job.basis.group_of[index]], directions, strict=True):
                job.basis.parameters[index].add_(coefficient * direction)
    job.basis.averages.after_step()
    point = job.close()
    happened = as_table(point.happened, len(job.groups), K)
    np.testing.assert_allclose(happened, planted.numpy(), atol=5e-3)
    assert max(point.unexplained_share) < 1e-5


def test_an_idle_direction_gets_no_coefficient():
    job = small_job(average_steps=0)
    job.window()
    happened = as_table(job.window().happened, len(job.groups), K)
    assert (happened[:, PULL_BACK] == 0).all()


def test_the_first_window_has_no_former_basis_and_explains_nothing():
    point = small_job().window()
    assert set(point.happened) == {0.0}
    assert set(point.unexplained_share) == {1.0}


@pytest.mark.parametrize("rotten", [float("nan"), float("inf")])
def test_a_group_with_non_finite_weights_explains_nothing_and_spoils_no_other(rotten):
    points = []
    for value in (rotten, 0.5):
        job = small_job()
        job.window()
        job.basis.averages.begin_window()
        job.step()
        job.basis.averages.before_step()
        with torch.no_grad():
            job.model.head.bias[0] = value
        job.basis.averages.after_step()
        points.append(job.close())
    point, twin = points
    head = [group.name for group in job.groups].index("head")
    assert point.happened[head * K :] == (0.0,) * K
    assert point.unexplained_share[head] == 1.0
    assert point.happened[: head * K] == twin.happened[: head * K]
    assert point.gram[: head * K * K] == twin.gram[: head * K * K]


def test_a_non_finite_former_basis_explains_nothing():
    job = small_job()
    job.window()
    job.basis._former_GKm[0, MOMENTUM, 0] = float("inf")
    point = job.window()
    assert point.happened[:K] == (0.0,) * K
    assert point.unexplained_share[0] == 1.0
    assert all(share < 1.0 for share in point.unexplained_share[1:])


def test_a_window_in_which_nothing_moved_is_described_by_zeros():
    job = small_job()
    job.window()
    job.basis.averages.begin_window()
    point = job.close()
    assert set(point.displacement_norms) == {0.0}
    assert set(point.happened) == {0.0}
    assert set(point.unexplained_share) == {1.0}


def test_momentum_is_free_when_it_is_not_asked_for_and_the_rest_is_the_same():
    job = small_job()
    job.window()
    full = dict(job.basis.directions())
    cheap = dict(job.basis.directions(with_momentum=False))
    assert full.keys() == cheap.keys() == set(range(len(job.basis.parameters)))
    for index, directions in cheap.items():
        assert directions[MOMENTUM].untyped_storage().nbytes() <= 4
        assert not directions[MOMENTUM].any()
        for k in (DRIFT, SLOW_DRIFT, PULL_BACK):
            assert bits(directions[k]) == bits(full[index][k])


def test_closing_a_window_moves_no_weight_no_moment_and_draws_no_random_number():
    job = small_job()
    job.window()
    before = job.state()
    job.close()
    changed = {name for name, raw in job.state().items() if before[name] != raw}
    assert {name.split(".")[1] for name in changed} <= {"slow", "former", "has_former"}


def test_the_sample_is_fixed_by_the_seed_sorted_within_a_group_and_without_repeats():
    groups = [plain_group(100, 50), plain_group(5)]
    samples = [WeightSample(groups, 40, seed=seed) for seed in (1, 1, 2)]
    places = [[(g, first, tuple(p.tolist())) for g, first, p in sample._places] for sample in samples]
    assert places[0] == places[1] != places[2]
    flat = [position + (100 if index == 1 else 0) for index in (0, 1) for position in places[0][index][2]]
    assert flat == sorted(set(flat))
    assert len(flat) == 40
    assert places[0][2] == (1, 0, (0, 1, 2, 3, 4))


def test_sampled_values_are_the_weights_at_their_places():
    job = small_job(sample_size=16)
    found_Gm = job.basis.sampled(job.basis.parameters)
    for group, row in zip(job.groups, found_Gm.tolist(), strict=True):
        values = set(torch.cat([p.detach().reshape(-1) for p in group.parameters]).tolist())
        assert set(row) <= values | {0.0}


def test_choosing_a_small_sample_of_a_big_group_takes_little_memory():
    groups = [plain_group(4_000_000)]
    tracemalloc.start()
    try:
        WeightSample(groups, 64, seed=0)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_the_sampled_cosine_is_near_the_exact_one_for_4096_of_100_000_weights():
    """Groups of unequal size and scale, so that a missing weight for a sample's share would show."""
    random = torch.Generator().manual_seed(0)
    groups = [plain_group(90_000), plain_group(9_000), plain_group(1_000)]
    sample = WeightSample(groups, 4096, seed=0)
    # The groups disagree, so their shares of the whole decide.
    for wanted in itertools.product((-0.9, 0.3, 1.0), repeat=3):
        left = [torch.randn(n, generator=random) * s for n, s in ((90_000, 1), (9_000, 2), (1_000, 8))]
        noise = [torch.randn(t.shape, generator=random) * t.std() for t in left]
        right = [w * t + (1 - w**2) ** 0.5 * e for w, t, e in zip(wanted, left, noise, strict=True)]
        tables = []
        for tensors in (left, right):
            out_GKm = torch.zeros(3, 1, 4096)
            for index, tensor in enumerate(tensors):
                sample.gather(out_GKm, index, [tensor])
            tables.append(out_GKm[:, 0])
        basis = small_job().basis
        basis._sample = sample
        assert abs(basis.cosine(*tables) - cosine_of(whole(left), whole(right))) < 0.05


def test_the_cosine_of_nothing_is_unknown_and_not_zero():
    basis = small_job().basis
    assert np.isnan(basis.cosine(basis.empty_sample(), basis.sampled(basis.parameters)))


def test_the_bytes_held_are_those_of_all_its_tensors_and_within_the_bars():
    for dtype, copies in (("fp32", 3.0), ("bf16", 1.5)):
        job = small_job(dtype=dtype, sample_size=16)
        weights_bytes = 4 * sum(p.numel() for p in job.basis.parameters)
        former_bytes = 4 * len(job.groups) * K * 16 + 8
        assert job.basis.bytes_held() == copies * weights_bytes + former_bytes


def test_a_sample_that_fits_into_no_message_is_refused_in_one_line() -> None:
    with pytest.raises(SettingsError, match=r"history_sample .* the largest is"):
        small_job(history_snapshots=3, history_sample=65_000)
