import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from predictor_node.delta_head import DeltaHead, HeadInput, TrustRegion

G, K, D = 3, 4, 5
WIDE = TrustRegion(bound_K=(16.0, 2.0, 2.0, 1.0), norm_share=100.0)


def point(happened=None, *, seed=0, unexplained=0.2, window_steps=16, norms=10.0):
    random = np.random.default_rng(seed)
    rows_GKN = random.standard_normal((G, K, 9)) * 0.1
    return HeadInput(
        latent_D=random.standard_normal(D),
        gram_GKK=rows_GKN @ rows_GKN.transpose(0, 2, 1),
        parameter_norms_G=np.full(G, norms),
        happened_GK=np.zeros((G, K)) if happened is None else happened,
        unexplained_G=np.full(G, unexplained),
        window_steps=window_steps,
    )


def head(**options):
    return DeltaHead(**{"num_groups": G, "latent_size": D, "window_steps": 16, "seed": 0, **options})


def taught(planted_GK, *, windows=40, noise=0.05, trust=WIDE, **options):
    learner, random = head(trust=trust), np.random.default_rng(1)
    for window in range(windows):
        happened = planted_GK + noise * random.standard_normal((G, K))
        learner.observe(point(happened, seed=window), **options)
    return learner


PLANTED = np.array([[2.0, 0.5, -0.3, 0.1], [-3.0, 0.2, 0.4, -0.5], [0.0, -0.7, 0.0, 0.3]])


def test_without_history_all_coefficients_are_zero_and_all_doubt_is_left():
    learner = head()
    proposal = learner.propose(point(), horizon_steps=16)
    assert not proposal.coefficients_GK.any()
    learner.observe(point())
    proposal = learner.propose(point(), horizon_steps=16)
    assert not proposal.coefficients_GK.any()
    assert (proposal.spread_GK >= np.array(learner.trust.bound_K)).all()


def test_a_history_of_zeros_gives_zeros():
    learner = taught(np.zeros((G, K)), noise=0.0)
    assert not learner.propose(point(), horizon_steps=16).coefficients_GK.any()


def test_planted_coefficients_are_recovered_for_every_group():
    learner = taught(PLANTED)
    proposal = learner.propose(point(seed=39), horizon_steps=16)
    np.testing.assert_allclose(proposal.coefficients_GK, PLANTED, atol=0.25)
    assert np.abs(proposal.coefficients_GK - PLANTED)[:, 1:].max() < 0.12


def test_a_rule_from_the_last_window_to_the_next_is_learned():
    """Every coefficient turns its sign each window: the running mean knows nothing, the last value all."""
    learner, random, turning = head(trust=WIDE), np.random.default_rng(1), 0.8 * np.sign(PLANTED + 0.01)
    for window in range(60):
        turning = -turning
        learner.observe(point(turning + 0.02 * random.standard_normal((G, K)), seed=window))
    found = learner.propose(point(), horizon_steps=16).coefficients_GK
    assert np.abs(found + turning)[:, 1:].max() < 0.25


def test_the_spread_is_that_of_what_happens():
    noise = 0.3
    learner = taught(PLANTED, windows=80, noise=noise)
    spread = learner.propose(point(), horizon_steps=16).spread_GK
    assert (spread[:, 1:3] > 0.6 * noise).all()
    assert (spread[:, 1:3] < 1.6 * noise).all()


def test_coefficients_grow_with_the_horizon_and_the_pull_back_is_never_passed():
    learner = taught(PLANTED)
    one, three, half = (learner.propose(point(), horizon_steps=h).coefficients_GK for h in (16, 48, 8))
    np.testing.assert_allclose(three[:, :3], 3 * one[:, :3])
    np.testing.assert_allclose(three[:, 3], one[:, 3])
    np.testing.assert_allclose(half, one / 2)


def test_windows_of_another_length_teach_the_same_velocity():
    """At constant velocity half a window moves half as far along drifts that are half as long."""
    per_half_window = np.array([0.5, 1.0, 1.0, 0.5])  # momentum, drift, slow drift, pull-back
    learner, twin = head(trust=WIDE), head(trust=WIDE)
    learner.observe(point(window_steps=8))
    twin.observe(point(window_steps=16))
    for window in range(20):
        learner.observe(point(PLANTED * per_half_window, seed=window, window_steps=8))
        twin.observe(point(PLANTED, seed=window, window_steps=16))
    left, right = (h.propose(point(), horizon_steps=16).coefficients_GK for h in (learner, twin))
    np.testing.assert_allclose(left, right)


def test_a_drift_that_a_stretched_window_made_gets_that_much_less_of_a_coefficient():
    learner = taught(PLANTED)
    usual, stretched = (
        learner.propose(point(seed=39, window_steps=steps), horizon_steps=16).coefficients_GK
        for steps in (16, 128)
    )
    np.testing.assert_allclose(stretched[:, 1:3], usual[:, 1:3] / 8)
    np.testing.assert_allclose(stretched[:, [0, 3]], usual[:, [0, 3]])


def test_a_refused_window_teaches_less_and_an_unexplained_one_nothing():
    def after_one(**options):
        learner = taught(PLANTED, windows=20, noise=0.0)
        unexplained = options.pop("unexplained", 0.2)
        learner.observe(point(-PLANTED, unexplained=unexplained), **options)
        return learner._state["mean_GK"]

    before = taught(PLANTED, windows=20, noise=0.0)._state["mean_GK"]
    kept, refused, blind = after_one(), after_one(weight=0.25), after_one(unexplained=1.0)
    moved_by_kept, moved_by_refused = np.abs(kept - before), np.abs(refused - before)
    assert (moved_by_refused < 0.5 * moved_by_kept + 1e-12).all()
    assert moved_by_refused.any()
    np.testing.assert_array_equal(blind, before)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=3 * G * K, max_size=3 * G * K
    ),
    scale=st.floats(0.0, 1e6),
    norm=st.floats(0.0, 1e6),
    horizon=st.integers(1, 5000),
)
def test_the_trust_region_is_never_left(values, scale, norm, horizon):
    learner = head()
    newest = None
    for happened in np.array(values).reshape(3, G, K):
        newest = point(happened, norms=norm)
        object.__setattr__(newest, "gram_GKK", newest.gram_GKK * scale)
        learner.observe(newest)
    found = learner.propose(newest, horizon_steps=horizon)
    reach = horizon / 16
    bound = np.array(learner.trust.bound_K) * np.array([reach, reach, reach, min(1.0, reach)])
    assert np.isfinite(found.coefficients_GK).all()
    assert (np.abs(found.coefficients_GK) <= bound * (1 + 1e-12)).all()
    norms = np.einsum("gk,gkl,gl->g", found.coefficients_GK, newest.gram_GKK, found.coefficients_GK)
    assert (norms <= (learner.trust.norm_share * norm) ** 2 * (1 + 1e-9) + 1e-12).all()


def test_the_norm_bound_scales_a_group_and_keeps_its_direction():
    learner = taught(PLANTED, trust=TrustRegion(bound_K=WIDE.bound_K, norm_share=1e-3))
    free = taught(PLANTED).propose(point(), horizon_steps=16).coefficients_GK
    tight = learner.propose(point(), horizon_steps=16).coefficients_GK
    norms = np.sqrt(np.einsum("gk,gkl,gl->g", tight, point().gram_GKK, tight))
    np.testing.assert_allclose(norms, 1e-3 * 10.0)
    np.testing.assert_allclose(tight / tight[:, :1], free / free[:, :1])


@pytest.mark.parametrize("rotten", [np.nan, np.inf])
def test_a_group_without_finite_directions_is_left_alone_and_spoils_no_other(rotten):
    learner, spoiled = taught(PLANTED), point()
    spoiled.gram_GKK[1, 0, 0] = rotten
    found = learner.propose(spoiled, horizon_steps=16).coefficients_GK
    assert not found[1].any()
    np.testing.assert_array_equal(
        found[[0, 2]], learner.propose(point(), horizon_steps=16).coefficients_GK[[0, 2]]
    )


def test_an_idle_direction_gets_no_coefficient():
    learner, idle = taught(PLANTED), point()
    idle.gram_GKK[:, 2], idle.gram_GKK[:, :, 2] = 0.0, 0.0
    found = learner.propose(idle, horizon_steps=16).coefficients_GK
    assert not found[:, 2].any()
    assert found[:2, 1].all()


def test_a_restored_head_goes_on_to_the_bit():
    learner, resumed = taught(PLANTED, windows=10), head(trust=WIDE)
    resumed.load(learner.to_bytes())
    for each in (learner, resumed):
        each.observe(point(PLANTED * 1.1, seed=77))
    assert learner.to_bytes() == resumed.to_bytes()
    pair = [h.propose(point(), horizon_steps=20).coefficients_GK.tobytes() for h in (learner, resumed)]
    assert pair[0] == pair[1]


@pytest.mark.parametrize("content", [b"", b"not a state", head(num_groups=G + 1).to_bytes()])
def test_a_state_that_is_damaged_or_of_another_basis_is_refused_and_changes_nothing(content):
    learner = taught(PLANTED, windows=5)
    before = learner.to_bytes()
    with pytest.raises(CheckpointError):
        learner.load(content)
    assert learner.to_bytes() == before
