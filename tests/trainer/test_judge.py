"""How often the judge is wrong: stage 2 on synthetic noisy curves, as the loop would run it.

Typical noise: 0.1 nats between training batches, 0.02 of one guard loss about its trend (the guard
batch is the same each time, so what batches differ by cancels). The curve is 2 + 1.5 exp(-t / 300).
"""

import math

import numpy as np
import pytest

from common.messages import Verdict
from trainer_node.verify import GuardRecord, forecast_without_jump, judge

WINDOW_STEPS = 16
BATCH_NOISE, GUARD_NOISE = 0.1, 0.02
RUNS, CYCLES = 60, 12


def curve(step):
    return 2.0 + 1.5 * math.exp(-step / 300)


def share_refused(probation_steps, *, harm, guard_noise=GUARD_NOISE, batch_noise=BATCH_NOISE, tolerance=1.0):
    """Of jumps that raise the loss by `harm` nats for good; kept or not, the run goes on as without."""
    refused = []
    for seed in range(RUNS):
        random = np.random.default_rng(seed)
        train = [curve(t) + batch_noise * random.normal() for t in range(2000)]
        record, step = GuardRecord(), 100
        for _ in range(CYCLES):
            recent = train[step - 2 * WINDOW_STEPS : step]
            before = curve(step) + guard_noise * random.normal()
            record.observe(step, before, longest_steps=8 * probation_steps)
            noise = float(np.std(np.diff(recent))) / math.sqrt(2)
            forecast = forecast_without_jump(
                recent, horizon_steps=probation_steps, guard=record, loss_noise=noise
            )
            end_step = step + probation_steps
            end = curve(end_step) + guard_noise * random.normal()
            verdict = judge(loss_before=before, loss_end=end + harm, forecast=forecast, tolerance=tolerance)
            refused.append(verdict is Verdict.REFUSED)
            record.move_to(end_step, end)
            step = end_step + WINDOW_STEPS
    return sum(refused) / len(refused)


@pytest.mark.parametrize("probation_steps", [8, 16])
def test_a_jump_without_effect_is_refused_at_most_one_time_in_five(probation_steps):
    assert share_refused(probation_steps, harm=0.0) <= 0.2


@pytest.mark.parametrize("probation_steps", [8, 16])
def test_a_lasting_harm_of_a_tenth_nat_is_refused_nine_times_in_ten(probation_steps):
    assert share_refused(probation_steps, harm=0.1) >= 0.9


@pytest.mark.parametrize("guard_noise", [0.02, 0.05, 0.2])
def test_the_spread_follows_the_noise_of_the_guard(guard_noise):
    """Unknown beforehand: learned from the guard losses. What is over a fifth is the curve that bends."""
    assert share_refused(16, harm=0.0, guard_noise=guard_noise, batch_noise=guard_noise) <= 0.3
    assert share_refused(16, harm=5 * guard_noise, guard_noise=guard_noise, batch_noise=guard_noise) >= 0.9


def test_a_higher_tolerance_refuses_less():
    assert share_refused(16, harm=0.05, tolerance=3.0) < share_refused(16, harm=0.05, tolerance=1.0)
