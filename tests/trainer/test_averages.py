import numpy as np
import pytest
import torch

from tests.references import average_of, slow_drift_of
from tests.trainer.small_job import bits, whole
from trainer_node.averages import CompactAverages, ExactAverages, make_averages
from trainer_node.snapshot import DiskStore

KINDS = {"fp32": ExactAverages, "bf16": CompactAverages}
BOTH = pytest.mark.parametrize("dtype", KINDS)


def parameters_of(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in ((20, 30), (50,), ())]


def walk(parameters, averages, steps, *, seed=1, size=0.01):
    """Random steps with a common trend; returns the path as whole vectors, the start included."""
    random = torch.Generator().manual_seed(seed)
    path = [whole(parameters)]
    for _ in range(steps):
        averages.before_step()
        with torch.no_grad():
            for p in parameters:
                p.add_(size * (0.3 + torch.randn(p.shape, generator=random)))
        averages.after_step()
        path.append(whole(parameters))
    return path


def all_of(direction, parameters):
    return whole([direction(i) for i in range(len(parameters))])


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("average_steps", [1, 4, 20])
def test_drift_and_pull_back_equal_the_explicit_exponential_average(average_steps):
    parameters = parameters_of()
    averages = ExactAverages(parameters, average_steps=average_steps, slow_momentum=0.5)
    path = walk(parameters, averages, 30)
    averages.begin_window()
    path += walk(parameters, averages, 10, seed=2)[1:]
    start = average_of(path[:31], average_steps=average_steps)
    end = average_of(path, average_steps=average_steps)
    # Float32 weights of about 1: an ulp of 1e-7 per step against drifts of about 0.03.
    np.testing.assert_allclose(all_of(averages.drift, parameters), end - start, atol=2e-6)
    np.testing.assert_allclose(all_of(averages.pull_back, parameters), end - path[-1], atol=2e-6)


@BOTH
def test_the_slow_drift_is_the_weighted_sum_of_the_windows_drifts(dtype):
    parameters = parameters_of()
    averages = make_averages(parameters, average_steps=4, slow_momentum=0.6, dtype=dtype)
    drifts = []
    for window in range(3):
        averages.begin_window()
        walk(parameters, averages, 5, seed=window)
        drifts.append(all_of(averages.drift, parameters))
        averages.end_window()
    twin = slow_drift_of(drifts, momentum=0.6)
    assert relative_error(all_of(averages.slow_drift, parameters), twin) < (1e-6 if dtype == "fp32" else 5e-3)


def test_the_slow_drift_takes_the_drift_over_without_rounding_it_to_the_weights():
    """Weights of 1000 and steps of 1e-3: adding the average first would lose a tenth of the drift."""
    parameters = [torch.nn.Parameter(torch.full((64,), 1000.0))]
    averages = ExactAverages(parameters, average_steps=0, slow_momentum=0.37)
    for window in range(3):
        averages.begin_window()
        before = averages.slow_drift(0).clone()
        walk(parameters, averages, 3, seed=window, size=1e-3)
        averages.end_window()
        assert torch.equal(averages.slow_drift(0), before.mul(0.37).add(averages.drift(0)))


def test_compact_averages_agree_with_exact_ones_over_200_steps():
    """Within 1 % of the norm: bfloat16 has 8 bits, an error of 0.2 % per step, most of it averaged out."""
    exact_weights, compact_weights = parameters_of(), parameters_of()
    exact = make_averages(exact_weights, average_steps=20, slow_momentum=0.6, dtype="fp32")
    compact = make_averages(compact_weights, average_steps=20, slow_momentum=0.6, dtype="bf16")
    for window in range(200 // 16 + 1):
        for averages, parameters in ((exact, exact_weights), (compact, compact_weights)):
            averages.begin_window()
            walk(parameters, averages, 16, seed=window)
            averages.end_window()
        for direction in ("drift", "slow_drift", "pull_back"):
            wanted = all_of(getattr(exact, direction), exact_weights)
            found = all_of(getattr(compact, direction), compact_weights)
            assert relative_error(found, wanted) < 0.01, (window, direction)


def test_compact_averages_keep_the_tiniest_moves():
    """Steps of 1e-9, as with a small rate: float16 would make zeros of them."""
    pairs = []
    for dtype in KINDS:
        parameters = [torch.nn.Parameter(torch.zeros(500))]
        averages = make_averages(parameters, average_steps=4, slow_momentum=0.6, dtype=dtype)
        walk(parameters, averages, 8, size=1e-9)
        pairs.append((averages.drift(0), averages.pull_back(0)))
    for exact, compact in zip(*pairs, strict=True):
        assert relative_error(whole([compact]), whole([exact])) < 0.01


def test_exact_averages_hold_three_times_the_weights_and_compact_ones_one_and_a_half():
    parameters = parameters_of()
    weights_bytes = sum(p.numel() * p.element_size() for p in parameters)
    held = {
        dtype: sum(
            t.numel() * t.element_size()
            for name, t in make_averages(parameters, average_steps=9, slow_momentum=0.5, dtype=dtype)
            .tensors()
            .items()
            if name != "memory"
        )
        for dtype in KINDS
    }
    assert held == {"fp32": 3 * weights_bytes, "bf16": 1.5 * weights_bytes}


def test_the_copy_that_compact_averages_take_for_a_step_is_gone_after_it():
    averages = CompactAverages(parameters_of(), average_steps=4, slow_momentum=0.5)
    averages.before_step()
    assert averages._before
    averages.after_step()
    assert not averages._before


def test_without_averaging_the_drift_is_the_displacement_and_the_pull_back_zero():
    parameters = parameters_of()
    averages = ExactAverages(parameters, average_steps=0, slow_momentum=0.5)
    walk(parameters, averages, 3)
    averages.begin_window()
    start = [p.detach().clone() for p in parameters]
    walk(parameters, averages, 7, seed=2)
    for index, (parameter, before) in enumerate(zip(parameters, start, strict=True)):
        assert torch.equal(averages.drift(index), parameter - before)
        assert not averages.pull_back(index).any()


def test_without_averaging_compact_drift_is_the_displacement_up_to_bfloat16():
    parameters = parameters_of()
    averages = CompactAverages(parameters, average_steps=0, slow_momentum=0.5)
    averages.begin_window()
    path = walk(parameters, averages, 16)
    assert relative_error(all_of(averages.drift, parameters), path[-1] - path[0]) < 0.01
    assert not all_of(averages.pull_back, parameters).any()


@BOTH
def test_a_jump_moves_the_average_along_and_is_not_taken_for_drift_afterwards(dtype):
    parameters = parameters_of()
    averages = make_averages(parameters, average_steps=5, slow_momentum=0.5, dtype=dtype)
    walk(parameters, averages, 8)
    pull_back = all_of(averages.pull_back, parameters)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            delta = torch.full_like(parameter, 0.25)
            parameter.add_(delta)
            averages.shift(index, delta)
    np.testing.assert_allclose(all_of(averages.pull_back, parameters), pull_back, atol=1e-6)
    averages.begin_window()
    assert not all_of(averages.drift, parameters).any()


@BOTH
def test_averages_read_weights_and_never_write_them(dtype):
    parameters = parameters_of()
    averages = make_averages(parameters, average_steps=5, slow_momentum=0.5, dtype=dtype)
    before = [bits(p) for p in parameters]
    averages.begin_window()
    averages.before_step()
    averages.after_step()
    averages.end_window()
    for index in range(len(parameters)):
        averages.drift(index), averages.slow_drift(index), averages.pull_back(index)
    assert [bits(p) for p in parameters] == before


@BOTH
def test_a_restored_and_reopened_window_goes_on_as_if_the_lost_steps_had_not_been(dtype):
    """What a snapshot holds (weights and `moving_tensors`) is enough, since a window begins after it."""
    parameters = parameters_of()
    averages = make_averages(parameters, average_steps=5, slow_momentum=0.5, dtype=dtype)
    walk(parameters, averages, 8)
    averages.end_window()
    held = [*(p.detach() for p in parameters), *averages.moving_tensors()]
    copies = [t.clone() for t in held]
    averages.begin_window()
    wanted = {name: bits(t) for name, t in averages.tensors().items()}
    walk(parameters, averages, 6, seed=5)
    for tensor, copy in zip(held, copies, strict=True):
        tensor.copy_(copy)
    averages.begin_window()
    assert {name: bits(t) for name, t in averages.tensors().items()} == wanted


@BOTH
def test_the_state_under_its_names_is_the_live_state(dtype):
    parameters = parameters_of()
    averages = make_averages(parameters, average_steps=5, slow_momentum=0.5, dtype=dtype)
    twin = make_averages(parameters_of(), average_steps=5, slow_momentum=0.5, dtype=dtype)
    walk(parameters, averages, 8)
    for name, tensor in twin.tensors().items():
        tensor.copy_(averages.tensors()[name])
    for index in range(len(parameters)):
        assert bits(twin.drift(index)) == bits(averages.drift(index))
        assert bits(twin.slow_drift(index)) == bits(averages.slow_drift(index))


def test_a_window_start_parked_on_disk_gives_the_same_bits_and_takes_no_memory(tmp_path):
    """Over windows, a jump and a reload from saved tensors."""
    torch.manual_seed(5)
    weights = [torch.randn(7, 3), torch.randn(11)]
    twins = [w.clone() for w in weights]
    in_memory = ExactAverages(weights, average_steps=4, slow_momentum=0.5)
    on_disk = ExactAverages(twins, average_steps=4, slow_momentum=0.5, park=DiskStore(tmp_path))
    for step in range(24):
        for weight, twin in zip(weights, twins, strict=True):
            move = torch.randn_like(weight)
            weight += move
            twin += move
        for averages in (in_memory, on_disk):
            averages.after_step()
            if step % 6 == 5:
                averages.end_window()
                averages.begin_window()
        if step == 13:
            on_disk = ExactAverages(twins, average_steps=4, slow_momentum=0.5, park=DiskStore(tmp_path))
            on_disk.load(in_memory.tensors())
        for name, tensor in in_memory.tensors().items():
            assert torch.equal(tensor, on_disk.tensors()[name]), (step, name)
        for index in range(2):
            assert torch.equal(in_memory.drift(index), on_disk.drift(index))
    weights_bytes = sum(w.numel() * w.element_size() for w in weights)
    assert in_memory.bytes_held() == 3 * weights_bytes
    assert on_disk.bytes_held() == 2 * weights_bytes


@BOTH
def test_with_a_share_of_one_the_average_is_the_mean_of_all_iterates(dtype):
    """Polyak-Ruppert averaging: the start counts for nothing."""
    parameters = parameters_of()
    averages = make_averages(parameters, average_steps=0, slow_momentum=0.5, dtype=dtype, average_share=1.0)
    path = walk(parameters, averages, 25, size=0.1)
    wanted = np.mean(path[1:], axis=0) - path[-1]
    found = all_of(averages.pull_back, parameters)
    assert relative_error(found, wanted) < (1e-5 if dtype == "fp32" else 0.02)


@BOTH
@pytest.mark.parametrize("average_share", [0.0, 0.1, 0.5])
def test_the_time_constant_is_the_longer_of_the_fixed_one_and_the_share_of_the_steps(dtype, average_share):
    parameters = parameters_of()
    averages = make_averages(
        parameters, average_steps=6, slow_momentum=0.5, dtype=dtype, average_share=average_share
    )
    path = walk(parameters, averages, 40, size=0.1)
    average = path[0].copy()
    for step, weights in enumerate(path[1:], start=1):
        average += (weights - average) / max(6.0, average_share * step)
    found = all_of(averages.pull_back, parameters)
    assert relative_error(found, average - path[-1]) < (1e-5 if dtype == "fp32" else 0.02)


@BOTH
def test_a_restore_sets_the_length_of_the_average_back(dtype):
    parameters = parameters_of()
    averages = make_averages(
        parameters, average_steps=2, slow_momentum=0.5, dtype=dtype, average_share=0.5, every_steps=4
    )
    walk(parameters, averages, 10)
    held = [*(p.detach() for p in parameters), *averages.moving_tensors()]
    copies = [t.clone() for t in held]
    walk(parameters, averages, 6, seed=5)
    wanted = [bits(t) for t in averages.moving_tensors()]
    for tensor, copy in zip(held, copies, strict=True):
        tensor.copy_(copy)
    walk(parameters, averages, 6, seed=5)
    assert [bits(t) for t in averages.moving_tensors()] == wanted
    assert int(averages.tensors()["memory"][0]) == 16


@pytest.mark.parametrize("average_share", [0.0, 0.5])
def test_an_average_that_sees_every_fourth_step_is_the_sum_with_the_weights_of_four(average_share):
    parameters = parameters_of()
    averages = make_averages(
        parameters,
        average_steps=6,
        slow_momentum=0.5,
        dtype="fp32",
        average_share=average_share,
        every_steps=4,
    )
    path = walk(parameters, averages, 22, size=0.1)
    average = path[0].copy()
    for last in (4, 8, 12, 16, 20):
        kept = np.prod([1.0 - 1.0 / max(6.0, average_share * step) for step in range(last - 3, last + 1)])
        average = kept * average + (1.0 - kept) * path[last]
    assert relative_error(all_of(averages.pull_back, parameters), average - path[-1]) < 1e-5
    averages.end_window()  # a window that ends between two of them misses nothing
    kept = np.prod([1.0 - 1.0 / max(6.0, average_share * step) for step in (21, 22)])
    average = kept * average + (1.0 - kept) * path[-1]
    assert relative_error(all_of(averages.pull_back, parameters), average - path[-1]) < 1e-5


def test_a_mean_over_every_fourth_iterate_is_a_mean():
    parameters = parameters_of()
    averages = make_averages(
        parameters, average_steps=0, slow_momentum=0.5, dtype="fp32", average_share=1.0, every_steps=4
    )
    path = walk(parameters, averages, 24, size=0.1)
    wanted = np.mean(path[4::4], axis=0) - path[-1]
    assert relative_error(all_of(averages.pull_back, parameters), wanted) < 1e-5
