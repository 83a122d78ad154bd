import math

import numpy as np
import pytest
import torch

from common.errors import CheckpointError
from common.messages import DecisionPoint
from predictor_node.phi import PhiLearner, PhiShape
from predictor_node.phi_net import LIMIT
from predictor_node.phi_runs import HORIZON_WINDOWS, SampledRun, WindowSample, window_sample
from trainer_node.weight_forecast import MAX_BYTES, read_forecaster

SIZES = (64, 1000, 40)  # weights per group; the last has fewer than are sampled
G, S, J = len(SIZES), 64, 4
SHAPE = PhiShape(group_sizes=SIZES, hidden_units=8)


def learner(*, seed=0, shape=SHAPE, **options):
    return PhiLearner(shape, total_steps=800, mean_rate=lambda done, ahead: 1.0, seed=seed, **options)


def sample(window, weights_GS, *, window_steps=16, rate=1.0):
    weights_GS = weights_GS.astype(np.float32).copy()
    for row, size in zip(weights_GS, SIZES, strict=True):
        row[size:] = np.nan
    return WindowSample(
        window=window, window_steps=window_steps, steps_done=16 * window, rate=rate, weights_GS=weights_GS
    )


def planted_run(windows, *, seed=0, keep=(0.9, 0.5, -0.6), noise=0.0):
    """Each group's velocity keeps a share of itself every window: predictable by the newest displacement."""
    random = np.random.default_rng(seed)
    weights_GS = random.standard_normal((G, S))
    velocity_GS = 0.01 * random.standard_normal((G, S)) * np.exp(random.standard_normal((G, S)))
    found = []
    for window in range(1, windows + 1):
        weights_GS = weights_GS + velocity_GS
        found.append(sample(window, weights_GS))
        kick_GS = 0.01 * random.standard_normal((G, S))
        velocity_GS = np.array(keep)[:, None] * velocity_GS + np.maximum(noise, 0.05) * kick_GS
    return found


def test_a_learner_that_has_seen_nothing_offers_nothing_and_then_the_zero_forecast():
    phi = learner(updates_per_window=0)
    for each in planted_run(J + 1):
        assert phi.export(16) == b""
        assert not phi.is_ready
        phi.observe(each)
    forecaster = read_forecaster(phi.export(16), num_groups=G, num_differences=J)
    weights = torch.randn(10)
    assert (
        read_forecaster(phi.export(16, pull_back=0.5), num_groups=G, num_differences=J).pull_back_G.tolist()
        == [0.5] * G
    )
    assert not forecaster.pull_back_G.any()
    assert not forecaster.displacement(0, weights, [torch.randn(10) for _ in range(J)]).any()


@pytest.mark.parametrize("horizon_steps", [7, 16, 100])
def test_both_sides_compute_the_same_forecast(horizon_steps):
    """The trainer's forward pass on exported bytes against the network's, on windows of unequal length."""
    random = np.random.default_rng(3)
    phi = learner()
    for parameter in phi._net.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    run = [
        sample(w, random.standard_normal((G, S)) * np.exp(random.standard_normal((G, S))),
               window_steps=10 + 3 * w, rate=1.0 / w)
        for w in range(1, J + 3)
    ]  # fmt: skip
    phi._updates_per_window = 0
    for each in run:
        phi.observe(each)
    content = phi.export(horizon_steps)
    assert len(content) < MAX_BYTES
    forecaster = read_forecaster(content, num_groups=G, num_differences=J)
    past = phi._run.past([len(run) - 1], J)
    wanted_GN = phi._net.displacement(past, phi._ahead_of_newest(float(horizon_steps)))[0]
    for group, size in enumerate(SIZES):
        rows = [torch.from_numpy(each.weights_GS[group, :size]) for each in run]
        differences = [rows[-1 - age] - rows[-2 - age] for age in range(J)]
        found = forecaster.displacement(group, rows[-1], differences)
        torch.testing.assert_close(found, wanted_GN[group, : len(found)], rtol=1e-4, atol=1e-6)
        assert found.abs().max() > 1e-3


def test_the_export_fits_the_trainer_for_many_groups_and_the_default_size():
    shape = PhiShape(group_sizes=(1000,) * 40)
    phi = PhiLearner(shape, total_steps=100, mean_rate=lambda done, ahead: 1.0, seed=0, updates_per_window=0)
    for window in range(1, J + 2):
        weights_GS = np.random.default_rng(window).standard_normal((40, 16)).astype(np.float32)
        phi.observe(
            WindowSample(window=window, window_steps=4, steps_done=window, rate=1.0, weights_GS=weights_GS)
        )
    read_forecaster(phi.export(16), num_groups=40, num_differences=J)


def test_planted_dynamics_are_learned_online_and_shares_are_told_per_group():
    phi = learner(updates_per_window=12)
    for each in planted_run(40):
        phi.observe(each)
    assert phi.explained_share(1) > 0.7
    for share, keep in zip(phi.explained_by_group(1), (0.9, 0.5, -0.6), strict=True):
        assert 0.6 * keep**2 < share < keep**2 + 0.1  # no forecast can know more than the share kept, squared


def test_an_offline_fit_pays_from_the_first_forecast_on():
    cold, warm = learner(updates_per_window=0), learner(updates_per_window=0)
    warm.fit([planted_run(30, seed=s) for s in (1, 2)], total_steps=800, updates=250)
    for phi in (cold, warm):
        for each in planted_run(16, seed=9):
            phi.observe(each)
    assert cold.explained_share(1) == 0.0
    assert warm.explained_share(1) > 0.8


def test_what_is_noise_is_not_claimed_to_be_explained():
    random, phi = np.random.default_rng(0), learner(updates_per_window=4)
    weights_GS = random.standard_normal((G, S))
    for window in range(1, 40):
        weights_GS = weights_GS + 0.01 * random.standard_normal((G, S))
        phi.observe(sample(window, weights_GS))
    assert -0.3 < phi.explained_share(1) < 0.1


def test_forecasts_are_scored_before_anything_was_learned_from_their_future():
    """A learner that sees another newest window gets another score, but from the same forecasts."""
    run = planted_run(12)
    left, right = learner(), learner()
    for each in run[:-1]:
        left.observe(each)
        right.observe(each)
    key = (12, 4)
    forecast_GN = left._forecasts[key]
    assert torch.equal(forecast_GN, right._forecasts[key])
    before = left._scores_HG2.clone()
    left.observe(run[-1])
    row = HORIZON_WINDOWS.index(4)
    moved_GN = np.nan_to_num(run[-1].weights_GS - run[-5].weights_GS).astype(np.float64)
    residual = ((moved_GN - forecast_GN.double().numpy()) ** 2).sum(axis=1) * np.array(SIZES) / [64, 64, 40]
    found, wanted = left._scores_HG2[row, :, 0].numpy(), 0.9 * before[row, :, 0].numpy() + residual
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_no_score_before_a_forecast_came_due():
    phi = learner()
    for each in planted_run(J + 1):
        phi.observe(each)
    assert all(math.isnan(phi.explained_share(h)) for h in HORIZON_WINDOWS)


def test_a_window_that_comes_again_drops_all_from_there_on_and_a_gap_starts_anew():
    run = SampledRun(800, limit=50)
    windows = planted_run(9)
    for each in windows[:6]:
        run.add(each)
    assert not run.add(windows[3])
    assert [s.window for s in run.samples] == [1, 2, 3, 4]
    assert run.add(windows[4])
    assert not run.add(windows[8])
    assert [s.window for s in run.samples] == [9]


def test_only_the_newest_windows_are_held():
    run = SampledRun(800, limit=3)
    for each in planted_run(7):
        run.add(each)
    assert [s.window for s in run.samples] == [5, 6, 7]


def test_after_a_set_back_no_forecast_of_the_undone_is_scored():
    phi = learner()
    for each in planted_run(9):
        phi.observe(each)
    assert phi._forecasts
    before = phi._scores_HG2.clone()
    phi.observe(planted_run(7, seed=5)[6])
    assert torch.equal(phi._scores_HG2, before)
    assert {end - windows for end, windows in phi._forecasts} == {7}


def test_a_run_that_diverged_spoils_nothing():
    phi = learner()
    run = planted_run(12)
    for each in run[:8]:
        phi.observe(each)
    run[8].weights_GS[0, :30] = np.inf
    run[9].weights_GS[1, :] = 3e38
    for each in run[8:]:
        phi.observe(each)
    assert all(bool(p.isfinite().all()) for p in phi._net.parameters())
    assert bool(phi._scores_HG2.isfinite().all())


def test_the_same_samples_and_seed_give_the_same_bytes_and_another_seed_others():
    states = []
    for seed in (0, 0, 1):
        phi = learner(seed=seed)
        for each in planted_run(10):
            phi.observe(each)
        states.append((phi.to_bytes(), phi.export(16)))
    assert states[0] == states[1]
    assert states[0][1] != states[2][1]


def test_a_restored_learner_goes_on_to_the_bit():
    run = planted_run(14)
    phi, resumed = learner(), learner(seed=0)
    for each in run[:9]:
        phi.observe(each)
    resumed.load(phi.to_bytes())
    assert resumed.to_bytes() == phi.to_bytes()
    for each in run[9:]:
        phi.observe(each)
        resumed.observe(each)
    assert resumed.to_bytes() == phi.to_bytes()
    assert resumed.export(40) == phi.export(40)


def test_a_warm_start_takes_over_what_was_learned_and_not_the_run():
    old, new = learner(), learner()
    for each in planted_run(12):
        old.observe(each)
    new.load(old.to_bytes(), same_run=False)
    assert not new.is_ready
    assert math.isnan(new.explained_share(1))
    for mine, theirs in zip(new._net.parameters(), old._net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", learner(shape=PhiShape(group_sizes=(1, 2), hidden_units=8)).to_bytes(),
     learner(shape=PhiShape(group_sizes=SIZES, hidden_units=9)).to_bytes()],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(content):
    phi = learner()
    before = phi.to_bytes()
    with pytest.raises(CheckpointError):
        phi.load(content)
    assert phi.to_bytes() == before


def decision_point(weights, window_steps=0):
    return DecisionPoint(
        window=3, fingerprint="", gram=(), parameter_norms=(), displacement_norms=(), happened=(),
        unexplained_share=(), window_steps=window_steps, weights=weights,
    )  # fmt: skip


def test_a_sample_is_read_row_by_row_and_the_windows_own_length_counts():
    table = np.arange(6, dtype="<f4").reshape(2, 3)
    options = {"num_groups": 2, "window_steps": 16, "steps_done": 48, "rate": 0.5}
    found = window_sample(decision_point(table.tobytes()), **options)
    np.testing.assert_array_equal(found.weights_GS, table)
    assert (found.window, found.window_steps, found.steps_done, found.rate) == (3, 16, 48, 0.5)
    assert window_sample(decision_point(table.tobytes(), window_steps=20), **options).window_steps == 20
    assert window_sample(decision_point(b""), **options) is None
    assert window_sample(decision_point(table.tobytes()[:-4]), **options) is None


def test_the_limit_leaves_room_for_a_long_straight_line():
    assert math.sqrt(100) <= LIMIT
