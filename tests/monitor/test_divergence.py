"""Divergence: healthy noise raises no alarm, every injected fault does, and a good forecast is good."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Phase
from monitor_node.divergence import (
    CALM_STEPS,
    DivergenceState,
    KindState,
    Level,
    next_kind,
    observed,
)
from tests.monitor.watched_run import Watched, curve

LEVELS = st.sampled_from(list(Level))


NOISE: dict[str, Callable[[int, random.Random], float]] = {
    "a power law": lambda step, rng: curve(step) + rng.gauss(0.0, 0.08),
    "a level": lambda step, rng: 2.3 + rng.gauss(0.0, 0.02),
    "a slow line": lambda step, rng: 3.0 - 1e-4 * step + rng.gauss(0.0, 0.1),
    "losses below zero": lambda step, rng: -1.0 + rng.gauss(0.0, 0.3),
    "small losses, skewed": lambda step, rng: 0.05 * math.exp(rng.gauss(0.0, 0.8)),
}


@pytest.mark.parametrize("name", NOISE)
def test_ten_thousand_healthy_noisy_steps_raise_almost_no_alarm(name: str) -> None:
    """At most 0.2 %; a Warning of a normal deviate above 3 has a share of 0.135 %."""
    steps = 10_000 if name == "a power law" else 4_000
    run = Watched(seed=7)
    for step in range(steps):
        run.take(NOISE[name](step, run.random))
    assert run.warnings <= 0.002 * steps
    assert run.state.excursions == 0


def test_white_noise_about_a_trend_is_no_oscillation() -> None:
    """Two thirds of its differences change sign: bounds of 0.5 and 0.8 on that share would fire."""
    run = Watched(seed=3)
    losses = [curve(step) + run.random.gauss(0.0, 0.1) for step in range(5000)]
    differences = [b - a for a, b in itertools.pairwise(losses)]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(differences))
    assert 0.6 < turns / len(differences) < 0.73
    for loss in losses:
        run.take(loss)
    assert run.of("oscillation", Level.WARNING) == []


def test_a_noiseless_and_a_constant_loss_are_healthy() -> None:
    run, flat = Watched(), Watched()
    for step in range(500):
        run.take(curve(step))
        flat.take(2.3, 1.0)
    assert run.warnings == flat.warnings == 0


def test_a_falling_loss_is_no_alarm() -> None:
    run = Watched()
    run.healthy(100)
    falls = [signal for loss in (1.5, 1.0, 0.5, 0.1, 0.01) for signal in run.take(loss)]
    assert {signal.level for signal in falls} == {Level.NORMAL}


def test_the_loss_is_watched_from_the_ninth_step_on() -> None:
    """The original took its spread from the first loss and was blind for a hundred steps."""
    run = Watched()
    for _ in range(8):
        assert all(signal.kind == "not_finite" for signal in run.take(2.3 + run.random.gauss(0.0, 0.02)))
    levels = [s.level for _ in range(3) for s in run.take(5.0) if s.kind == "loss"]
    assert levels[0] >= Level.WARNING
    assert levels[2] is Level.CRITICAL


def faults(run: Watched, name: str) -> Iterable[tuple[float, float | None]]:
    """Losses and norms of a run in trouble, without end."""
    for n in range(1, 400):
        healthy = curve(run.step) + run.random.gauss(0.0, 0.05)
        yield {
            "spike": (3.0 * healthy, None),
            "rising two per cent a step": (healthy * 1.02**n, None),
            "not a number": (math.nan, None),
            "infinite": (math.inf, None),
            "infinite gradient": (healthy, math.inf),
            "exploding gradient": (healthy, 5000.0),
            "large gradient": (healthy, 300.0),
            "vanishing gradient": (healthy, 1e-4),
            "no gradient": (healthy, 0.0),
            "swinging": (healthy + 0.5 * (-1) ** n, None),
        }[name]


@pytest.mark.parametrize(
    ("name", "kind", "within_steps"),
    [
        ("spike", "loss", 1),
        ("rising two per cent a step", "loss", 30),
        ("not a number", "not_finite", 1),
        ("infinite", "not_finite", 1),
        ("infinite gradient", "not_finite", 1),
        ("exploding gradient", "gradient_high", 1),
        ("large gradient", "gradient_high", 3),
        ("vanishing gradient", "gradient_low", 3),
        ("no gradient", "gradient_low", 3),
        ("swinging", "oscillation", 160),
    ],
)
@pytest.mark.parametrize("healthy_steps", [20, 300])
def test_an_injected_fault_is_critical_soon(
    name: str, kind: str, within_steps: int, healthy_steps: int
) -> None:
    run = Watched()
    run.healthy(healthy_steps)
    assert run.state.excursions == 0
    start = run.step
    for loss, norm in faults(run, name):
        run.take(loss, norm)
        if run.of(kind, Level.CRITICAL):
            break
    assert run.of(kind, Level.CRITICAL)[0] - start <= within_steps
    assert run.state.critical is not None
    assert run.state.excursions == 1


def test_the_baseline_follows_the_run() -> None:
    """Norms that fall a hundredfold over a run are healthy; the first fifty steps are no yardstick."""
    run = Watched()
    for step in range(3000):
        run.take(curve(step), 10.0 * math.exp(-step / 400) * math.exp(run.random.gauss(0.0, 0.3)))
    assert run.of("gradient_low", Level.WARNING) == []


def test_an_excursion_is_one_and_ends_when_the_run_has_been_calm() -> None:
    run = Watched()
    run.healthy(100)
    for _ in range(5):
        run.take(math.nan)
    run.healthy(CALM_STEPS - 1)
    assert run.state.critical is not None
    run.healthy(1)
    assert run.state.critical is None
    assert run.state.excursions == 1
    run.take(math.nan)
    assert run.state.excursions == 2
    assert run.state.critical_step == run.step


def test_probation_may_lift_the_loss_but_not_make_it_infinite() -> None:
    run = Watched()
    run.healthy(100)
    for _ in range(16):
        run.take(9.0, phase=Phase.CORRECT)
    assert run.warnings == 0
    run.healthy(30)
    assert run.warnings == 0, "the steps of probation became the standard"
    run.take(math.inf, phase=Phase.CORRECT)
    assert run.state.critical is not None


def test_steps_that_were_undone_leave_no_trace() -> None:
    run, twin = Watched(), Watched()
    run.healthy(64)
    twin.healthy(64)
    rng_state = run.random.getstate()
    run.healthy(10, noise=0.5)
    run.step = 64
    run.random.setstate(rng_state)
    for one in (run, twin):
        one.healthy(1)
    for name in ("healthy", "norms", "trail"):
        left, right = getattr(run.state, name), getattr(twin.state, name)
        assert len(left) > 20
        assert left == right[-len(left) :]


# ---- hysteresis ----------------------------------------------------------------------------------


@given(st.lists(LEVELS, max_size=60))
def test_critical_comes_at_once_or_after_three_warnings_and_goes_after_calm(levels: list[Level]) -> None:
    state, held = KindState(), []
    for level in levels:
        state = next_kind(state, "loss", level)
        held.append(state.level)
    for place, level in enumerate(held):
        last_three = levels[max(0, place - 2) : place + 1]
        becomes = levels[place] is Level.CRITICAL or (
            len(last_three) == 3 and min(last_three) >= Level.WARNING
        )
        calm = all(one < Level.WARNING for one in levels[max(0, place - CALM_STEPS + 1) : place + 1])
        if becomes:
            assert level is Level.CRITICAL
        elif level is Level.CRITICAL:
            assert held[place - 1] is Level.CRITICAL
            assert not (calm and place + 1 >= CALM_STEPS)
        else:
            assert level is levels[place]


def test_calm_ends_critical_exactly_then() -> None:
    state = next_kind(KindState(), "loss", Level.CRITICAL)
    for _ in range(CALM_STEPS - 1):
        state = next_kind(state, "loss", Level.CAUTION)
        assert state.level is Level.CRITICAL
    assert next_kind(state, "loss", Level.CAUTION).level is Level.CAUTION


@given(
    st.lists(
        st.tuples(
            st.integers(1, 40),
            st.sampled_from([Phase.WARMUP, Phase.FULL, Phase.CORRECT]),
            st.floats(),
            st.floats().map(abs),
        ),
        max_size=60,
    )
)
def test_no_run_whatever_breaks_the_fold(steps: list[tuple[int, Phase, float, float]]) -> None:
    state = DivergenceState()
    for step, phase, loss, norm in steps:
        former = state
        state, signals = observed(state, step=step, phase=phase, loss=loss, gradient_norm=norm)
        again, same = observed(former, step=step, phase=phase, loss=loss, gradient_norm=norm)
        assert repr((state, signals)) == repr((again, same)), "the fold is not pure"
        assert (state.critical is not None) == any(k.level is Level.CRITICAL for k in state.kinds.values())
