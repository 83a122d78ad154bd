"""What counts as a spike: never what a healthy run does, always what does not come back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.features import INDEX
from common.messages import Observation
from common.recording import messages_of, read_recording
from common.settings import SpikeSettings
from common.streams import HISTORY
from trainer_node.spikes import CHECK_STEPS, MIN_USUAL_STEPS, Spike, find_spike
from trainer_node.window_statistics import LONG

SETTINGS = SpikeSettings()
FIXTURE = Path(__file__).parents[1] / "fixtures" / "digits-lockstep.hpt"


def first_spike(losses: list[float], settings: SpikeSettings = SETTINGS) -> tuple[int, Spike] | None:
    """(step of the look, what it found) of a run that is looked at as housekeeping does."""
    for step in range(CHECK_STEPS, len(losses) + 1, CHECK_STEPS):
        told = losses[max(0, step - LONG) : step]
        spike = find_spike(told, last_step=step, first_loss=losses[0], settings=settings)
        if spike is not None:
            return step, spike
    return None


def language_run(rng: random.Random, noise: Callable[[], float], steps: int = 600) -> list[float]:
    """From ln(vocabulary) down a power law, as small GPTs go."""
    return [
        1.5 + 5.4 * (1 + step / 20) ** -0.6 * (1 + 0.01 * rng.random()) + noise() for step in range(steps)
    ]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 0.4]))
def test_a_noisy_healthy_run_has_no_spike(seed: int, deviation: float) -> None:
    rng = random.Random(seed)
    assert first_spike(language_run(rng, lambda: rng.gauss(0.0, deviation))) is None


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_heavy_tails_are_no_spike(seed: int) -> None:
    """Student's t with two degrees of freedom: now and then a single loss far out."""
    rng = random.Random(seed)
    losses = language_run(rng, lambda: 0.1 * rng.gauss(0, 1) / math.sqrt(rng.gammavariate(1.0, 1.0)))
    assert first_spike(losses) is None


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.025, 0.1))
def test_hard_documents_in_a_row_are_no_spike(seed: int, height: float) -> None:
    """Noise that stays for about 30 steps and swings by up to a fifth of the ground that was gained."""
    rng, level = random.Random(seed), 0.0
    losses = language_run(rng, lambda: 0.0)
    hard = []
    for loss in losses:
        level = max(-1.0, min(1.0, 0.97 * level + 0.25 * rng.gauss(0, 1)))
        hard.append(loss + height * level * (losses[0] - loss) + 0.05 * rng.gauss(0, 1))
    assert first_spike(hard) is None


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_a_squared_error_that_falls_over_decades_has_no_spike(seed: int) -> None:
    """Its noise grows with its level: chi-squared with few degrees of freedom."""
    rng = random.Random(seed)
    losses = [10.0 ** (-step / 150) * rng.gammavariate(4.0, 0.25) for step in range(600)]
    assert first_spike(losses) is None


@pytest.mark.parametrize("warmup_bump", [0.0, 0.3])
def test_a_warm_up_bump_is_no_spike(warmup_bump: float) -> None:
    losses = language_run(random.Random(0), lambda: 0.0)
    bumped = [loss + warmup_bump * math.exp(-((step - 40) ** 2) / 200) for step, loss in enumerate(losses)]
    assert first_spike(bumped) is None


def test_a_recorded_run_has_no_spike() -> None:
    observations = [m for m in messages_of(read_recording(FIXTURE), HISTORY) if isinstance(m, Observation)]
    kept = {o.step: o.features[INDEX["loss"]] for o in observations}
    assert len(kept) > LONG
    assert first_spike([kept[step] for step in sorted(kept)]) is None


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(120, 300), st.floats(6.0, 1e4))
def test_a_loss_that_stays_up_is_found_soon_and_where_it_began(seed: int, at: int, rise: float) -> None:
    rng = random.Random(seed)
    losses = language_run(rng, lambda: rng.gauss(0.0, 0.05))[:at] + [
        1.5 + rise + rng.gauss(0.0, 0.05) for _ in range(40)
    ]
    found = first_spike(losses)
    assert found is not None
    step, spike = found
    assert step <= at + SETTINGS.steps + CHECK_STEPS
    assert spike.first_step == at + 1
    assert spike.usual_loss < spike.loss


@settings(deadline=None)
@given(st.integers(60, 300), st.floats(2.5, 20.0))
def test_a_loss_that_comes_down_by_itself_is_left_alone(at: int, rise: float) -> None:
    losses = language_run(random.Random(1), lambda: 0.0)
    spiked = [loss + rise * math.exp(-(step - at) / 6) * (step >= at) for step, loss in enumerate(losses)]
    assert first_spike(spiked) is None


def test_a_loss_that_comes_down_too_slowly_is_not_waited_for() -> None:
    losses = language_run(random.Random(1), lambda: 0.0)
    spiked = [loss + 1e5 * math.exp(-(step - 200) / 12) * (step >= 200) for step, loss in enumerate(losses)]
    found = first_spike(spiked)
    assert found is not None
    assert found[0] <= 200 + 24 + CHECK_STEPS
    assert found[1].first_step == 201


@settings(deadline=None)
@given(st.integers(1, 300), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_loss_may_fail_to_be_finite_but_not_the_newest_two(at: int, rotten: float) -> None:
    losses = language_run(random.Random(2), lambda: 0.0)
    assert first_spike([*losses[:at], rotten, *losses[at + 1 :]]) is None
    found = first_spike([*losses[:at], *[rotten] * 32])
    assert found is not None
    assert found[0] <= at + CHECK_STEPS + 1
    assert found[1].first_step == at + 1


def test_a_blow_up_begins_where_the_loss_left_its_bounds_not_where_it_overflowed() -> None:
    losses = [2.0] * 64 + [50.0, 1e4, 1e9, math.inf, math.nan]
    spike = find_spike(losses[-LONG:], last_step=69, first_loss=7.0, settings=SETTINGS)
    assert spike is not None
    assert spike.first_step == 65


def test_too_few_losses_tell_of_no_bound() -> None:
    short = [7.0] * (MIN_USUAL_STEPS - 1) + [1e6] * SETTINGS.steps
    settings = {"last_step": len(short), "settings": SETTINGS}
    assert find_spike(short, first_loss=7.0, **settings) is None
    assert find_spike([7.0, *short], first_loss=7.0, **settings) is not None
    assert find_spike([7.0, *short], first_loss=math.inf, **settings) is None
    assert find_spike([], first_loss=math.nan, last_step=0, settings=SETTINGS) is None


def test_the_thresholds_are_those_of_the_settings() -> None:
    losses = [2.0] * 56 + [3.0] * 8
    assert find_spike(losses, last_step=64, first_loss=7.0, settings=SETTINGS) is None
    low = SpikeSettings(share=0.1)
    assert find_spike(losses, last_step=64, first_loss=7.0, settings=low) is not None
    assert (
        find_spike(losses, last_step=64, first_loss=7.0, settings=SpikeSettings(share=0.1, steps=9)) is None
    )
    noisy = [2.0 + 0.1 * (-1) ** step for step in range(56)] + [3.0] * 8
    assert find_spike(noisy, last_step=64, first_loss=7.0, settings=low) is None
    calm = SpikeSettings(share=0.1, deviations=5.0)
    assert find_spike(noisy, last_step=64, first_loss=7.0, settings=calm) is not None
