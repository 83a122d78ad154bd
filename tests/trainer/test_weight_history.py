import itertools

import numpy as np
import pytest
import torch

from common.errors import SettingsError
from tests.trainer.small_job import bits, small_job, whole
from trainer_node.snapshot import DiskStore
from trainer_node.weight_history import WeightHistory
from trainer_node.weight_sample import WeightSample

C = 4  # snapshots, so 3 displacements
S = 32  # sampled weights; the norms have fewer


def job_with_past(**basis):
    return small_job(history_snapshots=C, history_sample=S, **basis)


def averages_of(job):
    return whole([job.basis.average(index) for index in range(len(job.basis.parameters))])


def held_differences(job):
    """Displacements as whole vectors, newest first."""
    held = [job.basis.history.differences(index) for index in range(len(job.basis.parameters))]
    return [whole(age) for age in zip(*held, strict=True)]


def path_of(point, job):
    return np.frombuffer(point.weights, dtype="<f4").reshape(len(job.groups), S)


def move_by(job, size):
    """As a jump: weights and averages move alike."""
    with torch.no_grad():
        for index, parameter in enumerate(job.basis.parameters):
            delta = torch.full_like(parameter, size)
            parameter.add_(delta)
            job.basis.averages.shift(index, delta)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 3e-2)])
def test_the_last_snapshots_of_the_averaged_weights_are_held(dtype, tolerance):
    job, snapshots = job_with_past(dtype=dtype), []
    snapshots.append(averages_of(job))
    for window in range(6):
        assert job.basis.history.is_full == (window >= C - 1)
        job.window()
        snapshots.append(averages_of(job))
    wanted = [b - a for a, b in itertools.pairwise(snapshots)][::-1]
    for mine, twin in zip(held_differences(job), wanted[: C - 1], strict=True):
        assert np.linalg.norm(mine - twin) <= tolerance * np.linalg.norm(twin)
    assert np.linalg.norm(wanted[2] - wanted[0]) > 0.1 * np.linalg.norm(wanted[0])


def test_before_there_are_windows_the_displacements_are_zero():
    job = job_with_past()
    job.window()
    newest, *older = held_differences(job)
    assert newest.any()
    assert not any(d.any() for d in older)


def test_a_jump_is_not_taken_for_drift_neither_in_the_past_nor_in_the_path():
    jumped, plain = job_with_past(), job_with_past()
    for job in (jumped, plain):
        job.window()
        job.window()
    before, path = held_differences(jumped), path_of(plain.window(), plain)
    move_by(jumped, 5.0)
    for mine, old in zip(held_differences(jumped), before, strict=True):
        np.testing.assert_array_equal(mine, old)
    after = path_of(jumped.window(), jumped)
    assert np.nanmax(np.abs(after - path)) < 0.5
    assert np.abs(held_differences(jumped)[0]).max() < 0.5


def test_what_lies_between_two_windows_is_in_no_displacement():
    """Probation: steps whose drift is forgotten when the next window begins."""
    job = job_with_past()
    job.window()
    for _ in range(3):
        job.step()
    start = averages_of(job)
    job.window()
    np.testing.assert_allclose(held_differences(job)[0], averages_of(job) - start, atol=1e-6)


def test_the_path_is_that_of_sampled_averaged_weights_with_nan_for_padding():
    job = job_with_past()
    sampled = WeightSample(job.groups, S, seed=0)
    for _ in range(3):
        path = path_of(job.window(), job)
    out_G1S = torch.zeros(len(job.groups), 1, S)
    for index in range(len(job.basis.parameters)):
        sampled.gather(out_G1S, index, [job.basis.average(index).reshape(-1)])
    for row, wanted, size in zip(path, out_G1S[:, 0].numpy(), sampled.sizes_G, strict=True):
        np.testing.assert_allclose(row[:size], wanted[:size], atol=1e-6)
        assert np.isnan(row[size:]).all()


def test_without_snapshots_nothing_is_held_and_nothing_sent():
    job = small_job()
    assert job.basis.history is None
    assert job.window().weights == b""
    assert not any(name.startswith("history") for name in job.basis.tensors())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_restored_past_goes_on_to_the_bit(dtype):
    job, other = job_with_past(dtype=dtype), job_with_past(dtype=dtype, seed=1)
    for _ in range(5):
        job.window()
    other.window()
    saved = {name: tensor.clone() for name, tensor in job.basis.tensors().items()}
    other.basis.load(saved)
    assert {n: bits(t) for n, t in other.basis.tensors().items()} == {n: bits(t) for n, t in saved.items()}
    assert other.basis.history.path_bytes() == job.basis.history.path_bytes()
    for mine, twin in zip(held_differences(other), held_differences(job), strict=True):
        np.testing.assert_array_equal(mine, twin)


def test_the_names_and_shapes_of_the_state_do_not_depend_on_how_much_is_held():
    job = job_with_past()
    before = {name: (t.shape, t.dtype) for name, t in job.basis.tensors().items()}
    for _ in range(5):
        job.window()
    assert {name: (t.shape, t.dtype) for name, t in job.basis.tensors().items()} == before


def test_the_bytes_of_the_past_are_on_the_account():
    for dtype, width in (("fp32", 4), ("bf16", 2)):
        with_past, without = job_with_past(dtype=dtype), small_job(dtype=dtype)
        weights = sum(p.numel() for p in without.basis.parameters)
        extra = with_past.basis.bytes_held() - without.basis.bytes_held()
        assert extra == (C - 1) * width * weights + 4 * S * len(without.groups) + 8


def test_a_past_on_disk_is_the_same_and_takes_no_process_memory(tmp_path):
    job = job_with_past()
    sample = WeightSample(job.groups, S, seed=0)
    on_disk = WeightHistory(
        job.basis.parameters, sample, num_snapshots=C, sample_size=S, dtype="fp32",
        make_store=lambda: DiskStore(tmp_path),
    )  # fmt: skip
    for _ in range(5):
        job.window()
        on_disk.take(job.basis.averages.drift, job.basis.average)
    for index in range(len(job.basis.parameters)):
        for mine, twin in zip(on_disk.differences(index), job.basis.history.differences(index), strict=True):
            assert bits(mine) == bits(twin)
    assert on_disk.bytes_held() < 4 * sum(p.numel() for p in job.basis.parameters)
    on_disk.close()


def test_one_snapshot_is_no_past():
    with pytest.raises(SettingsError, match="history_snapshots"):
        small_job(history_snapshots=1)
