"""The facade: learns a known system, knows what it does not know, and goes on bit for bit."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from common.errors import CheckpointError
from predictor_node.episodes import NUM_ACTIONS, Tick
from predictor_node.world_model import ArmForecast, WorldModel, WorldModelSettings
from tests.predictor.simulated_run import NUM_DIRECTIONS, NUM_FEATURES, Oscillator, jump

TICKS, UPDATES, AHEAD = 600, 100, 8
SMALL = WorldModelSettings(batch=4, capacity_ticks=64)


def new_model(seed: int = 0, settings: WorldModelSettings = SMALL) -> WorldModel:
    return WorldModel(NUM_DIRECTIONS, seed, settings, NUM_FEATURES)


def watch(model: WorldModel, ticks: list[Tick]) -> None:
    for tick in ticks:
        model.record(tick)
        model.observe_latest()


def plan(*first: np.ndarray, ticks: int = AHEAD) -> np.ndarray:
    """(N, T, A): arms that begin with the given actions and then do nothing."""
    actions_NTA = np.zeros((len(first), ticks, NUM_ACTIONS), dtype=np.float32)
    actions_NTA[:, 0] = first
    return actions_NTA


def forecast_errors(model: WorldModel, oscillator: Oscillator) -> tuple[list[float], list[float], float]:
    """Errors of the loss AHEAD ticks after a kick, those of "nothing changes", and the mean disagreement."""
    model, oscillator = copy.deepcopy(model), copy.deepcopy(oscillator)
    rng = np.random.default_rng(9)
    errors, lazy_errors, disagreements = [], [], []
    watch(model, oscillator.run(24))
    for _ in range(30):
        watch(model, oscillator.run(5))
        kick = float(rng.uniform(0.1, 1.0))
        (said,) = model.imagine(plan(jump(kick)))
        future = copy.deepcopy(oscillator)
        loss = [future.move(kick if tick == 0 else 0.0) for tick in range(AHEAD)][-1]
        errors.append(model.reference_loss + said.loss_change - loss)
        lazy_errors.append(model.reference_loss - loss)
        disagreements.append(said.disagreement)
    return errors, lazy_errors, float(np.mean(disagreements))


def rms(errors: list[float]) -> float:
    return math.sqrt(float(np.mean(np.square(errors))))


@pytest.fixture(scope="module")
def taught() -> tuple[WorldModel, Oscillator, dict[str, float]]:
    """A model that learned the oscillator, with the losses of its first updates."""
    model, oscillator = new_model(0, WorldModelSettings()), Oscillator(0)
    watch(model, oscillator.run(TICKS))
    first = model.learn(5)
    model.learn(UPDATES)
    return model, oscillator, dict(first.losses)


def test_learning_lowers_every_part_of_the_loss(
    taught: tuple[WorldModel, Oscillator, dict[str, float]],
) -> None:
    model, _, first = taught
    last = copy.deepcopy(model).learn(5).losses
    for part in ("total", "features", "open_features", "loss_change", "drift"):
        assert last[part] < 0.9 * first[part], part


def test_open_loop_forecasts_of_a_known_system_get_better_with_learning(
    taught: tuple[WorldModel, Oscillator, dict[str, float]],
) -> None:
    model, oscillator, _ = taught
    untaught = new_model(0, WorldModelSettings())
    watch(untaught, Oscillator(0).run(TICKS))
    errors, lazy_errors, _ = forecast_errors(model, oscillator)
    untaught_errors, _, _ = forecast_errors(untaught, oscillator)
    assert rms(errors) < 0.5 * rms(untaught_errors)
    assert rms(errors) < 0.5 * rms(lazy_errors)


def test_a_bigger_kick_is_forecast_to_do_more_and_to_be_refused_sooner(
    taught: tuple[WorldModel, Oscillator, dict[str, float]],
) -> None:
    model, _, _ = taught
    small, big = model.imagine(plan(jump(0.1), jump(1.0), ticks=3))
    assert big.loss_change > small.loss_change + 0.5
    assert big.drift[0] > small.drift[0]
    assert big.refusal > small.refusal


def test_members_disagree_more_where_they_have_never_been(
    taught: tuple[WorldModel, Oscillator, dict[str, float]],
) -> None:
    model, oscillator, _ = taught
    _, _, known = forecast_errors(model, oscillator)
    rng = np.random.default_rng(1)
    strange = 4.0 * rng.normal(size=(20, AHEAD, NUM_ACTIONS))
    unknown = float(np.mean([arm.disagreement for arm in model.imagine(strange)]))
    assert unknown > 1.5 * known


def test_arms_imagined_together_are_the_arms_imagined_alone() -> None:
    model = new_model()
    watch(model, Oscillator(1).run(30))
    together = model.imagine(plan(jump(0.2), jump(0.8), np.zeros(NUM_ACTIONS)))
    for arm, action in zip(together, (jump(0.2), jump(0.8), np.zeros(NUM_ACTIONS)), strict=True):
        (alone,) = model.imagine(plan(action))
        assert alone.loss_change == pytest.approx(arm.loss_change, abs=1e-4)
        assert alone.spread == pytest.approx(arm.spread, rel=1e-4)
        assert alone.drift == pytest.approx(arm.drift, abs=1e-4)


def test_imagining_changes_nothing() -> None:
    model = new_model()
    watch(model, Oscillator(1).run(30))
    before = model.to_bytes()
    assert model.imagine(plan(jump(0.5))) == model.imagine(plan(jump(0.5)))
    assert model.to_bytes() == before


def test_the_live_latent_is_that_of_all_ticks_encoded_at_once() -> None:
    """One step a tick against the whole run in one call, both with the final normaliser."""
    model, ticks = new_model(), Oscillator(2).run(20)
    ticks[7] = Tick(ticks[7].features, ticks[7].loss, jump(0.5), is_first=True)
    for tick in ticks:
        model.record(tick)
    model.normaliser.update = lambda encoded_F: None  # frozen from here on
    live = new_model()
    live.normaliser = model.normaliser
    watch(live, ticks)
    columns = model.episodes.windows(np.array([0]), len(ticks))
    going_on = torch.tensor(~columns["is_first"], dtype=torch.float32).unsqueeze(-1)
    with torch.no_grad():
        rssm = model.rssm
        evidence = rssm.evidence(torch.tensor(model.normaliser(columns["features"])))
        acted = rssm.acted(torch.tensor(columns["action"]), going_on)
        latents, _ = rssm.observe(rssm.sizes.initial(1), acted, evidence, going_on)
    np.testing.assert_allclose(live.latent(full=True)[:256], latents.hidden[-1, 0].numpy(), atol=1e-5)


def test_a_tick_is_observed_once() -> None:
    model = new_model()
    watch(model, Oscillator(1).run(10))
    before = model.latent(full=True)
    model.observe_latest()
    np.testing.assert_array_equal(model.latent(full=True), before)
    assert model.latent().shape == (16,)


def test_there_is_nothing_to_learn_before_a_window_is_full() -> None:
    model = new_model()
    watch(model, Oscillator(1).run(15))
    before = model.to_bytes()
    assert model.learn(3).num_updates == 0
    assert model.to_bytes() == before
    watch(model, Oscillator(1).run(1))
    assert model.learn(3).num_updates == 3


def test_losses_and_features_that_are_not_finite_do_no_harm() -> None:
    model = new_model()
    ticks = Oscillator(1).run(40)
    for number, bad in ((5, math.nan), (20, math.inf)):
        ticks[number] = Tick(np.full(NUM_FEATURES, bad), bad, ticks[number].action)
    watch(model, ticks)
    report = model.learn(4)
    assert report.skipped == 0
    assert all(map(math.isfinite, report.losses.values()))
    assert np.isfinite(model.latent(full=True)).all()
    assert math.isfinite(model.imagine(plan(jump(0.5)))[0].loss_change)


def test_an_update_whose_gradient_is_not_finite_changes_no_weight() -> None:
    model = new_model()
    watch(model, Oscillator(1).run(40))
    model.rssm.decode_out.bias.data[0] = math.inf
    weights = model.rssm.recur.detach().clone()
    assert model.learn(2).skipped == 2
    assert torch.equal(model.rssm.recur, weights)


def live_a_while(model: WorldModel, oscillator: Oscillator) -> list[ArmForecast]:
    forecasts = []
    for tick in oscillator.run(20):
        watch(model, [tick])
        model.learn(1)
        forecasts += model.imagine(plan(jump(0.5), np.zeros(NUM_ACTIONS)))
    return forecasts


def test_a_restored_model_goes_on_bit_for_bit_in_the_middle_of_learning() -> None:
    model, oscillator = new_model(), Oscillator(5)
    live_a_while(model, oscillator)
    restored = WorldModel.from_bytes(model.to_bytes(), NUM_DIRECTIONS, SMALL, NUM_FEATURES)
    assert restored.to_bytes() == model.to_bytes()
    twin = copy.deepcopy(oscillator)
    assert live_a_while(model, oscillator) == live_a_while(restored, twin)
    assert restored.to_bytes() == model.to_bytes()
    np.testing.assert_array_equal(restored.latent(), model.latent())


def test_a_model_that_never_learned_can_be_saved_and_goes_on() -> None:
    model = new_model()
    restored = WorldModel.from_bytes(model.to_bytes(), NUM_DIRECTIONS, SMALL, NUM_FEATURES)
    assert live_a_while(model, Oscillator(5)) == live_a_while(restored, Oscillator(5))


def test_the_global_random_numbers_are_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = new_model()
    live_a_while(model, Oscillator(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    twin = new_model()
    live_a_while(twin, Oscillator(5))
    assert twin.to_bytes() == model.to_bytes()


SCRIPT = """
import hashlib, torch
torch.set_num_threads(1)
from tests.predictor.test_world_model import fingerprint_of_a_life
print(fingerprint_of_a_life())
"""


def fingerprint_of_a_life() -> str:
    model = new_model(3)
    forecasts = live_a_while(model, Oscillator(5))
    return hashlib.sha256(model.to_bytes() + repr(forecasts).encode()).hexdigest()


@pytest.mark.slow
def test_another_process_learns_the_same_bits() -> None:
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        text=True,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = fingerprint_of_a_life()
        assert here == fingerprint_of_a_life()
    finally:
        torch.set_num_threads(threads)
    there, _ = process.communicate()
    assert there.strip() == here


def damaged(content: bytes, how: str) -> bytes:
    if how == "cut":
        return content[: len(content) // 2]
    if how == "noise":
        return b"\x00" * 100
    tensors = load(content)
    if how == "missing":
        del tensors["weights.recur"]
    elif how == "shape":
        tensors["live.code"] = tensors["live.code"][:, 1:].clone()
    elif how == "nan":
        tensors["weights.recur"][0, 0] = math.nan
    elif how == "dtype":
        tensors["weights.recur"] = tensors["weights.recur"].double()
    elif how == "generator":
        tensors["generator"].zero_()
    elif how == "schema":
        tensors["counts"][0] += 1
    elif how == "ticks":
        tensors["ticks.loss"] = tensors["ticks.loss"][1:].clone()
    return save(tensors)


@pytest.mark.parametrize(
    "how", ["cut", "noise", "missing", "shape", "nan", "dtype", "generator", "schema", "ticks"]
)
def test_bytes_that_are_not_a_world_model_are_refused_in_one_line(how: str) -> None:
    model = new_model()
    watch(model, Oscillator(1).run(20))
    with pytest.raises(CheckpointError) as caught:
        WorldModel.from_bytes(damaged(model.to_bytes(), how), NUM_DIRECTIONS, SMALL, NUM_FEATURES)
    assert "\n" not in str(caught.value)


def test_a_model_of_other_sizes_does_not_fit() -> None:
    with pytest.raises(CheckpointError):
        WorldModel.from_bytes(new_model().to_bytes(), NUM_DIRECTIONS + 1, SMALL, NUM_FEATURES)


def test_counted_work_grows_with_what_is_done() -> None:
    small, large = new_model(), new_model(0, WorldModelSettings(batch=8))
    assert large.flops_per_update == 2 * small.flops_per_update
    assert large.flops_per_tick == small.flops_per_tick > 2 * small.rssm.recur.numel()
