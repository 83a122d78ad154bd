"""Each row of coefficients equals its method's own slow twin on a small job."""

import itertools

import numpy as np
import pytest
import torch

from common.messages import DIRECTIONS
from predictor_node import rows
from tests.references import snoo_weights
from tests.trainer.small_job import directions_by_group, small_job, whole
from trainer_node.optim.directions import momentum_directions


@torch.no_grad()
def jump(job, row):
    """The delta of a row, spelled out; how the trainer applies it is its own tests' business."""
    for index, directions in job.basis.directions():
        delta = sum(c * d for c, d in zip(row, directions, strict=True))
        job.basis.parameters[index].add_(delta)
        job.basis.averages.shift(index, delta)


def run_window(job, steps=4):
    """(displacement of the window, its updates) as whole vectors."""
    job.basis.averages.begin_window()
    path = [whole(job.basis.parameters)]
    for _ in range(steps):
        job.step()
        path.append(whole(job.basis.parameters))
    job.close()
    return path[-1] - path[0], [b - a for a, b in itertools.pairwise(path)]


@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.4), (1.0, 0.9), (0.5, 0.0)])
def test_snoo(rate, momentum):
    job = small_job(average_steps=0, slow_momentum=momentum)
    start, updates, found = whole(job.basis.parameters), [], []
    for _ in range(3):
        updates.append(run_window(job)[1])
        jump(job, rows.snoo(rate, momentum))
        found.append(whole(job.basis.parameters))
    for mine, twin in zip(found, snoo_weights(start, updates, rate=rate, momentum=momentum), strict=True):
        np.testing.assert_allclose(mine, twin, atol=1e-6)
    assert np.linalg.norm(found[-1] - start) > 0.1


def test_snoo_without_momentum_is_lookahead():
    assert rows.snoo(0.4, 0.0) == rows.lookahead(0.4)


def test_lookahead_goes_back_a_share_of_the_way():
    job = small_job(average_steps=0)
    slow = whole(job.basis.parameters)
    for _ in range(2):
        run_window(job)
        fast = whole(job.basis.parameters)
        jump(job, rows.lookahead(0.3))
        slow = slow + 0.3 * (fast - slow)
        np.testing.assert_allclose(whole(job.basis.parameters), slow, atol=1e-6)


@pytest.mark.parametrize(("push", "momentum"), [(1.5, 0.5), (0.7, 0.9)])
def test_ema_nesterov_takes_every_gradient_at_the_pushed_point_of_an_unpushed_path(push, momentum):
    job = small_job(average_steps=0, slow_momentum=momentum)
    unpushed, average = whole(job.basis.parameters), 0.0
    for window in range(4):
        displacement, _ = run_window(job)
        unpushed = unpushed + displacement
        average = momentum * average + (1.0 - momentum) * displacement
        row = rows.ema_push(push, momentum) if window == 0 else rows.ema_push_moved(push, momentum)
        jump(job, row)
        np.testing.assert_allclose(whole(job.basis.parameters), unpushed + push * average, atol=2e-6)
    assert np.linalg.norm(push * average) > 0.01


@pytest.mark.parametrize("average_steps", [0, 4])
def test_the_line_fit_is_the_line_through_the_ends_of_the_window(average_steps):
    job = small_job(average_steps=average_steps)
    run_window(job)
    share, steps, ends = 1.0 / max(1, average_steps), 4, []
    average = whole([job.basis.average(i) for i in range(len(job.basis.parameters))])
    job.basis.averages.begin_window()
    ends.append(average)
    for _ in range(steps):
        job.step()
        average = average + share * (whole(job.basis.parameters) - average)
    job.close()
    slope_per_step = (average - ends[0]) / steps
    before = whole(job.basis.parameters)
    jump(job, rows.line_fit(10, steps))
    np.testing.assert_allclose(whole(job.basis.parameters), before + 10 * slope_per_step, atol=1e-5)


def test_pull_back_goes_a_share_of_the_way_to_the_average_of_the_path():
    job = small_job(average_steps=4)
    average = whole(job.basis.parameters)
    for _ in range(5):
        job.step()
        average = average + (whole(job.basis.parameters) - average) / 4
    before = whole(job.basis.parameters)
    jump(job, rows.pull_back(0.8))
    np.testing.assert_allclose(whole(job.basis.parameters), before + 0.8 * (average - before), atol=1e-6)


def test_the_nesterov_look_ahead_is_so_many_steps_of_the_momentum():
    job = small_job()
    run_window(job)
    before = {p: p.detach().clone() for p in job.basis.parameters}
    step = {p: d.clone() for p, d in momentum_directions(job.optimizers)}
    jump(job, rows.nesterov_look_ahead(3.0))
    for p, old in before.items():
        torch.testing.assert_close(p.detach(), old + 3.0 * step[p])


def test_every_group_gets_the_same_row_in_the_order_of_the_directions():
    row = rows.row_of(momentum=1.0, drift=2.0, slow_drift=3.0, pull_back=4.0)
    assert row == (1.0, 2.0, 3.0, 4.0)
    assert rows.for_groups(row, 3) == row * 3
    assert rows.row_of(drift=2.0, directions=("pull_back", "drift")) == (0.0, 2.0)
    with pytest.raises(ValueError, match="slow_drift"):
        rows.row_of(slow_drift=1.0, directions=("drift",))


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.1])
def test_a_push_that_cannot_be_moved_is_refused(momentum):
    with pytest.raises(ValueError):
        rows.ema_push_moved(1.0, momentum)


def test_the_rows_have_one_coefficient_per_direction_that_the_trainer_holds():
    assert len(directions_by_group(small_job().basis)[0]) == len(rows.snoo(0.7, 0.4)) == len(DIRECTIONS)
