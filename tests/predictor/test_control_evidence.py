"""Signs of ruin, the batch law, what a trial was worth, which controls are in force: each by itself."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import features
from common.control_rules import NEUTRAL
from common.errors import CheckpointError
from common.messages import Controls, Observation, Phase, Verdict
from predictor_node.batch_law import StepTime, StepTimes, gain_of
from predictor_node.control_reward import worth_of
from predictor_node.controls_in_force import InForce, in_force_from_json, told_by
from predictor_node.evidence import evidence_of, ruin_words
from predictor_node.history import History
from predictor_node.world_model import WorldModel
from tests.predictor.controlled_run import controlled_settings
from tests.predictor.scripted import observed, outcome, point
from tests.predictor.test_learned import a_decision


def rows_of(losses: list[float], **told: float) -> History:
    history, first, best = History(), losses[0], math.inf
    for step, loss in enumerate(losses, start=1):
        best = min(best, loss) if math.isfinite(loss) else best
        values = [0.0] * len(features.NAMES)
        given = {"loss": loss, "loss_over_first": loss / first, "loss_over_best": loss / best, **told}
        for name, value in given.items():
            values[features.INDEX[name]] = value
        history = history.append(dataclasses.replace(observed(step), features=tuple(values)))
    return history


def said_of(losses: list[float], *, is_early: bool = False, **told: float) -> str:
    return ruin_words(evidence_of(rows_of(losses, **told).rows, since_step=0), is_early=is_early)


def falling(count: int, noise: float = 0.02, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [2.0 + 4.0 / math.sqrt(1 + step) + draw.gauss(0.0, noise) for step in range(count)]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("clipped", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_shows_no_sign_of_ruin(noise: float, clipped: float, seed: int) -> None:
    losses = falling(300, noise, seed)
    signs = {said_of(losses[:end], clipped_share_64=clipped) for end in range(16, 300, 8)}
    assert signs == {""}
    assert said_of(losses[:80], is_early=True) == ""


@pytest.mark.parametrize("rise", [0.02, 0.1, 1.0])
def test_a_run_that_diverges_shows_it_within_a_window(rise: float) -> None:
    losses = falling(100)
    ruined = losses + [losses[-1] + rise * (step + 1) ** 2 for step in range(16)]
    assert said_of(ruined) != ""
    assert "not finite" in said_of([*losses, math.nan])


def test_a_slope_needs_less_significance_where_every_gradient_is_clipped() -> None:
    draw = random.Random(3)
    rising = [6.0, *(5.0 + 0.004 * step + draw.gauss(0.0, 0.15) for step in range(64))]
    assert said_of(rising) == ""
    assert "every gradient is clipped" in said_of(rising, clipped_share_64=1.0)


def test_a_rise_from_which_the_run_is_on_its_way_back_is_no_ruin() -> None:
    losses = falling(100)
    leapt = losses + [losses[-1] + 3.0 - 0.15 * step for step in range(12)]
    evidence = evidence_of(rows_of(leapt).rows, since_step=100)
    assert ruin_words(evidence, is_early=False) == ""


def test_only_an_early_run_is_called_stuck() -> None:
    draw = random.Random(1)
    flat = [8.0 + draw.gauss(0.0, 0.1) for _ in range(70)]
    assert "no progress" in said_of(flat, is_early=True)
    assert said_of(flat) == ""


@given(st.floats(0.0, 50.0), st.floats(0.1, 10.0), st.floats(0.05, 100.0))
def test_no_neighbour_of_the_best_batch_gains_more_than_it(fixed: float, slope: float, scale: float) -> None:
    time = StepTime(fixed, slope)
    best = math.sqrt(fixed * scale / slope)
    assert gain_of(time, noise_scale=scale, now=max(best, 1e-6), then=2.0 * max(best, 1e-6)) <= 1e-9
    if best > 1e-3:
        assert gain_of(time, noise_scale=scale, now=best, then=best / 2.0) <= 1e-9


def test_step_times_find_both_parts_and_survive_their_state() -> None:
    times = StepTimes(is_lockstep=False)
    for factor in (1.0, 2.0, 4.0):
        for _ in range(5):
            times.observe(Controls(batch_factor=factor), math.log10(12.0 + 3.0 * factor))
    times.observe(Controls(batch_factor=8.0, context_tokens=32), 0.0)  # another context: not of this line
    again = StepTimes(is_lockstep=False)
    again.load(times.state())
    for each in (times, again):
        found = each.fit(Controls(batch_factor=2.0))
        assert found is not None
        assert (found.fixed, found.per_batch) == (pytest.approx(12.0), pytest.approx(3.0))
    assert times.fit(Controls(context_tokens=64)) is None
    with pytest.raises(CheckpointError, match="step times"):
        again.load({"0:0": [1.0]})


def test_a_lockstep_step_costs_its_data() -> None:
    times = StepTimes(is_lockstep=True)
    times.observe(NEUTRAL, math.log10(3.0))
    assert times.fit(NEUTRAL) == StepTime(0.0, pytest.approx(3.0))


def test_a_trial_is_worth_what_it_gained_on_the_run_without_it() -> None:
    """Eight steps; the run without it fell by 0.08. The steps that it lost are no part of the worth."""
    kept = dataclasses.replace(
        outcome(a_decision(), Verdict.ACCEPTED, 0),
        loss_before=2.0, loss_end=1.92, loss_forecast=1.92, loss_spread=0.0, full_step_seconds=3.0,
        lost_seconds=24.0,
    )  # fmt: skip
    assert worth_of(kept)[0] == pytest.approx(0.0)
    twice = dataclasses.replace(kept, loss_end=1.84)
    assert worth_of(twice) == (pytest.approx(1.0), pytest.approx(math.tanh(1.0)))
    shaky = dataclasses.replace(twice, loss_spread=0.16)  # a fall of 0.08 is none to be told
    assert worth_of(shaky)[0] == pytest.approx(0.5)
    paid = dataclasses.replace(twice, check_seconds=12.0)
    assert worth_of(paid)[1] == pytest.approx(math.tanh(1.0 - 4.0 / 8.0))
    assert worth_of(paid, ordinary_seconds=6.0)[1] == pytest.approx(math.tanh(1.0 - 2.0 / 8.0))
    assert worth_of(dataclasses.replace(kept, verdict=Verdict.REFUSED))[1] == -1.0
    assert worth_of(dataclasses.replace(kept, verdict=Verdict.ABORTED))[1] is None
    unknown = worth_of(dataclasses.replace(kept, loss_forecast=math.nan))
    assert math.isnan(unknown[0])
    assert unknown[1] is None


@given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), max_size=8), st.integers(0, 300))
def test_the_clock_is_the_sum_of_the_batch_factors_of_the_steps(factors: list[float], back: int) -> None:
    in_force, factor_of, step, now = InForce(), {}, 0, 1.0
    for factor in factors:
        for _ in range(20):
            step += 1
            factor_of[step] = now
        base, now = step, factor
        for _ in range(10):
            step += 1
            factor_of[step] = now
        in_force = in_force.kept(Controls(batch_factor=factor), base_step=base, kept_step=step)
    assert in_force.clock_at(step) == math.fsum(factor_of.values())
    behind = in_force.set_back(back)
    assert behind.controls.batch_factor == next(
        (change.controls.batch_factor for change in reversed(in_force.changes) if change.kept_step <= back),
        1.0,
    )
    assert in_force_from_json(in_force.to_json()) == in_force


def test_the_features_tell_what_is_in_force() -> None:
    settings = controlled_settings().trainer
    whole = settings.model.context_tokens
    told = {"log2_rate_factor": -2.0, "log2_batch_factor": 1.0, "context_share": 0.25, "progress": 0.5}
    values = [0.0] * len(features.NAMES)
    for name, value in told.items():
        values[features.INDEX[name]] = value
    seen = Observation(
        step=300,
        attempt=0,
        phase=Phase.FULL,
        features=tuple(values),
        gradient_norms=(),
        decision_point=point(1),
    )
    found = told_by(seen, settings, Controls(read_out="average"))
    assert found.controls == Controls(
        rate_factor=0.25, batch_factor=2.0, context_tokens=whole // 4, read_out="average"
    )
    assert found.clock_at(300) == 500.0


def test_a_world_model_of_the_former_features_is_refused_in_one_line() -> None:
    former = WorldModel(4, 0, num_features=len(features.NAMES) - len(features.CONTROLS)).to_bytes()
    with pytest.raises(CheckpointError, match="world model"):
        WorldModel.from_bytes(former, 4)
