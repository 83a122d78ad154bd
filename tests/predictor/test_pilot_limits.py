"""When the pilot goes back, holds still or does without: false alarms, climbs gone wrong, budgets, ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from common.messages import Controls, Verdict
from tests.predictor.controlled_run import World
from tests.predictor.test_control_evidence import said_of
from tests.predictor.test_pilot import BATCH, DECAY, LIVE, RATE, fly, of

# ---- no progress -----------------------------------------------------------------------------------


def flat(level: float, noise: float, count: int = 70) -> list[float]:
    draw = random.Random(1)
    return [level + draw.gauss(0.0, noise) for _ in range(count)]


@pytest.mark.parametrize("level", [4.1, 0.07])
def test_a_run_that_has_gained_a_tenth_is_not_called_stuck_under_noise(level: float) -> None:
    first = 5.5 if level > 1.0 else 2.3
    assert said_of([first, *flat(level, 0.1 * level)], is_early=True) == ""
    assert "no progress" in said_of([first, *flat(first, 0.02)], is_early=True)


@dataclass(frozen=True, kw_only=True)
class Dead(World):
    """Nothing moves, whatever the rate is."""

    def after(self, excess: float, controls: Controls) -> float:
        return excess


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rate_is_lowered_once_for_want_of_progress_and_not_down_to_its_bound(seed: int) -> None:
    flight = fly(RATE, world=Dead(), seed=seed, verdict=of(Verdict.ACCEPTED))
    stuck = [d for d in flight.trainer.proposals if "no progress" in d.reason]
    assert len(stuck) == 1
    lowest = min(controls.rate_factor for controls in flight.trainer.at_points)
    assert lowest in (0.125, 0.25)  # noise may pass for a fall once, and then a half is tried


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_a_run_that_has_nearly_arrived_keeps_its_rate(noise: float) -> None:
    arrived = World(loss_noise=noise)
    assert fly(RATE, world=arrived, excess=0.0, best=0.5, verdict=of(Verdict.ACCEPTED)).arms == []


# ---- the early tail --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [300, 900])
def test_no_tail_begins_early_while_the_fall_hides_under_noise(seed: int, steps: int) -> None:
    noisy = World(noise_scale=20.0, loss_noise=0.3)
    flight = fly(DECAY, f"trainer.steps={steps}", world=noisy, seed=seed, verdict=of(Verdict.ACCEPTED))
    assert flight.arms == []
    assert flight.trainer.step == steps


@pytest.mark.parametrize("seed", range(3))
def test_an_early_tail_leaves_half_of_what_was_left_and_comes_after_ten_windows(seed: int) -> None:
    flight = fly(DECAY, "trainer.steps=2000", world=World(loss_noise=0.002), seed=seed)
    (decision,) = flight.trainer.proposals
    assert flight.trainer.step - decision.base_step >= 0.5 * (2000 - decision.base_step)
    assert decision.base_step >= 10 * 16
    assert "nats at most" in decision.reason


@pytest.mark.parametrize("seed", range(4))
def test_a_plateau_that_could_be_a_fall_under_noise_gets_no_early_tail(seed: int) -> None:
    flight = fly(DECAY, "trainer.steps=1500", world=World(loss_noise=0.3), seed=seed, excess=0.0)
    assert flight.arms == []


def test_after_a_change_of_the_batch_a_tail_waits_for_ten_windows() -> None:
    still = World(noise_scale=16.0, fixed_seconds=12.0, loss_noise=0.0)
    more = ("trainer.steps=800", "predictor.control_share=1.0", "trainer.controls.batch_high=2.0")
    flight = fly(BATCH, DECAY, LIVE, *more, world=still, excess=0.0001, verdict=of(Verdict.ACCEPTED))
    steps = {
        arm: decision.base_step for arm, decision in zip(flight.arms, flight.trainer.proposals, strict=True)
    }
    assert list(steps) == ["batch:x2", "decay:now"]
    assert steps["decay:now"] - steps["batch:x2"] >= 10 * 16


# ---- budget, ranks, step times ---------------------------------------------------------------------


@pytest.mark.parametrize(("passes", "is_tried"), [(50.0, False), (52.0, True)])
def test_a_change_is_tried_only_where_its_checks_and_the_lost_leg_can_be_paid(
    passes: float, is_tried: bool
) -> None:
    """3 checks and 16 steps of 3 passes: 51; the run 3000."""
    flight = fly(
        RATE, f"predictor.control_share={passes / 3000.0}", world=World(best_rate=4.0), until_step=100
    )
    assert bool(flight.arms) is is_tried


def test_a_change_that_gained_brings_back_a_part_of_its_cost() -> None:
    flight = fly(RATE, "predictor.control_share=0.02", world=World(best_rate=16.0), until_step=120)
    budget = flight.pilot["trials"]["budget"]
    assert flight.trainer.proposals[0].arm == "rate:x4"
    assert flight.trainer.controls.rate_factor > 1.0
    assert budget["net_passes"] < flight.trainer.undone_passes


def test_several_ranks_never_cut_a_micro_batch_that_they_share() -> None:
    small = World(noise_scale=0.25, fixed_seconds=0.75)
    alone = fly(BATCH, LIVE, world=small, verdict=of(Verdict.ACCEPTED))
    shared = ('trainer.parallel.kind="ddp"',)
    together = fly(BATCH, LIVE, *shared, world=small, verdict=of(Verdict.ACCEPTED))
    whole = fly(
        BATCH, LIVE, *shared, "trainer.batch.accumulation=2", world=small, verdict=of(Verdict.ACCEPTED)
    )
    assert "batch:/2" in alone.arms
    assert together.arms == []
    assert whole.arms == ["batch:/2"]


def test_what_a_trial_taught_and_was_seen_to_bring_depends_on_no_median_over_two_batches() -> None:
    world = World(noise_scale=16.0, fixed_seconds=12.0)
    told = [
        fly(BATCH, LIVE, "predictor.control_share=1.0", world=world, median_steps=count, until_step=300)
        for count in (1, 64)
    ]
    exact, mixed = (flight.pilot["trials"] for flight in told)
    assert len(exact["over"]) >= 2
    assert exact["bandit"] == mixed["bandit"]
    assert [entry["seen"] for entry in exact["over"]] == [entry["seen"] for entry in mixed["over"]]
