"""Ticks kept in order, laid into windows, normalised and coded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from predictor_node.episodes import (
    BAG_TICKS,
    NUM_ACTIONS,
    SCALE_CLIP,
    Episodes,
    LossScale,
    Normaliser,
    Tick,
    bags,
    encode_features,
)
from predictor_node.symlog import TwoHot, symexp, symlog
from tests.predictor.simulated_run import NUM_DIRECTIONS, NUM_FEATURES, Oscillator

FINITE = st.floats(-1e6, 1e6)


def tick(loss: float, *, is_jump: bool = False, is_first: bool = False) -> Tick:
    action = np.zeros(NUM_ACTIONS)
    action[0] = is_jump
    return Tick(np.full(NUM_FEATURES, loss), loss, action, is_first)


def filled(ticks: int, capacity: int = 64, *, jumps: tuple[int, ...] = ()) -> Episodes:
    episodes = Episodes(capacity, NUM_FEATURES, NUM_DIRECTIONS)
    for number in range(ticks):
        episodes.append(tick(float(number), is_jump=number in jumps))
    return episodes


@given(FINITE)
def test_symexp_undoes_symlog(x: float) -> None:
    assert float(symexp(symlog(np.float64(x)))) == pytest.approx(x, rel=1e-12, abs=1e-12)


@given(FINITE, FINITE)
def test_symlog_keeps_order_and_sign(x: float, y: float) -> None:
    a, b = float(symlog(np.float64(x))), float(symlog(np.float64(y)))
    assert (x < y) <= (a <= b)
    assert math.copysign(1.0, a) == math.copysign(1.0, x)


@settings(deadline=None)  # the first call of torch is slow
@given(st.lists(st.floats(-1000.0, 1000.0, width=32), min_size=1, max_size=20))
def test_two_hot_code_has_mass_one_on_at_most_two_neighbours_and_its_mean_is_the_number(
    numbers: list[float],
) -> None:
    two_hot = TwoHot(41, 7.0)
    x = torch.tensor(numbers)
    code = two_hot.encode(x)
    assert (code >= 0.0).all()
    torch.testing.assert_close(code.sum(-1), torch.ones(len(numbers)))
    torch.testing.assert_close(two_hot.mean(code), x, rtol=1e-5, atol=1e-5)
    for row in code:
        used = row.nonzero().flatten()
        assert len(used) <= 2
        assert int(used[-1] - used[0]) <= 1


def test_two_hot_means_rise_with_the_number_and_stop_at_the_last_bin() -> None:
    two_hot = TwoHot(9, 2.0)
    means = two_hot.mean(two_hot.encode(torch.linspace(-20.0, 20.0, 401)))
    assert (means.diff() >= 0.0).all()
    assert means[0] == two_hot.bins[0]
    assert means[-1] == two_hot.bins[-1]


def test_variance_of_a_bin_is_zero_and_of_two_equal_bins_the_squared_half_distance() -> None:
    two_hot = TwoHot(3, math.log(3.0))  # bins -2, 0, 2
    chances = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    torch.testing.assert_close(two_hot.variance(chances), torch.tensor([0.0, 4.0]))


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=40))
def test_the_running_normaliser_equals_mean_and_variance_of_all_at_once(values: list[float]) -> None:
    normaliser = Normaliser(1)
    for value in values:
        normaliser.update(np.array([value]))
    assert normaliser.mean_F[0] == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert normaliser.squares_F[0] == pytest.approx(np.var(values) * len(values), rel=1e-6, abs=1e-6)


def test_features_that_are_not_finite_become_finite_numbers() -> None:
    encoded_F = encode_features(np.array([math.nan, math.inf, -math.inf, 1.0]))
    assert encoded_F.tolist() == [0.0, 20.0, -20.0, math.log(2.0)]


def test_the_reference_follows_the_loss_and_starts_again_with_a_new_beginning() -> None:
    scale = LossScale()
    for loss in (5.0, 3.0):
        scale.update(loss, is_first=False)
    assert scale.reference == 4.0
    scale.update(math.nan, is_first=False)
    assert scale.reference == 4.0
    scale.update(9.0, is_first=True)
    assert scale.reference == 9.0


def test_one_catastrophe_moves_the_noise_scale_by_little() -> None:
    scale = LossScale()
    for number in range(200):
        scale.update(2.0 + 0.01 * (number % 2), is_first=False)
    before = scale.scale
    scale.update(1000.0, is_first=False)
    assert before == pytest.approx(0.01, rel=0.01)
    assert before < scale.scale <= before * (1.0 + SCALE_CLIP / 64.0)


def test_the_oldest_ticks_go_first_and_windows_keep_the_order() -> None:
    episodes = filled(100, capacity=64)
    assert len(episodes) == 64
    windows = episodes.windows(np.array([0, 60]), 4)
    assert windows["loss"].tolist() == [[36.0, 96.0], [37.0, 97.0], [38.0, 98.0], [39.0, 99.0]]
    assert windows["serial"].tolist() == windows["loss"].astype(int).tolist()
    assert windows["features"].shape == (4, 2, NUM_FEATURES)


@given(st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=8, max_size=8))
def test_windows_lie_inside_and_every_second_one_shows_a_jump_where_a_rollout_begins(
    uniform: list[float],
) -> None:
    episodes = filled(100, capacity=64, jumps=(2, 60, 70))  # the first is forgotten by now
    starts_B = episodes.starts(np.array(uniform).reshape(2, 4), 16, 4)
    assert ((starts_B >= 0) & (starts_B <= 48)).all()
    jumped = episodes.windows(starts_B, 16)["action"][4, 1::2, 0]
    assert (jumped == 1.0).all()


def test_saved_ticks_are_the_same_and_go_on_the_same() -> None:
    episodes = Episodes(32, NUM_FEATURES, NUM_DIRECTIONS)
    ticks = Oscillator(3).run(80)
    for one in ticks[:50]:
        episodes.append(one)
    twin = Episodes(32, NUM_FEATURES, NUM_DIRECTIONS)
    twin.load_arrays(episodes.to_arrays())
    for one in ticks[50:]:
        episodes.append(one)
        twin.append(one)
    for name, array in episodes.to_arrays().items():
        np.testing.assert_array_equal(array, twin.to_arrays()[name])


@pytest.mark.parametrize("broken", ["missing", "dtype", "rows", "counts"])
def test_arrays_that_do_not_fit_are_refused(broken: str) -> None:
    arrays = filled(10).to_arrays()
    if broken == "missing":
        del arrays["loss"]
    elif broken == "dtype":
        arrays["loss"] = arrays["loss"].astype(np.float32)
    elif broken == "rows":
        arrays["action"] = arrays["action"][1:]
    else:
        arrays["counts"] = -arrays["counts"]
    with pytest.raises(CheckpointError):
        Episodes(64, NUM_FEATURES, NUM_DIRECTIONS).load_arrays(arrays)


def test_bags_give_each_member_half_of_the_blocks_and_no_two_the_same() -> None:
    bags_TM = bags(np.arange(8000), 5)
    assert set(np.unique(bags_TM)) == {0.0, 2.0}
    assert (bags_TM.reshape(-1, BAG_TICKS, 5).std(1) == 0.0).all()
    assert np.abs(bags_TM.mean(0) - 1.0).max() < 0.1
    assert np.abs(np.corrcoef(bags_TM[::BAG_TICKS].T) - np.eye(5)).max() < 0.1
