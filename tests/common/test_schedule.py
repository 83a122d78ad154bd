import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.schedule import decay_start_step, rate_factor
from common.settings import ScheduleSettings
from tests.trainer.references_optim import slow_rates

NAMES = ("constant", "cosine", "linear", "one-cycle", "wsd")


@st.composite
def runs(draw):
    total = draw(st.integers(1, 200))
    schedule = ScheduleSettings(
        name=draw(st.sampled_from(NAMES)),
        warmup_steps=draw(st.integers(0, total)),
        decay_share=draw(st.floats(0, 1)),
        final_share=draw(st.floats(0, 1)),
    )
    return total, schedule


def curve(total, schedule):
    return [rate_factor(step, total, schedule) for step in range(total)]


@given(runs())
def test_factor_equals_the_slow_twin_at_every_step(run):
    total, schedule = run
    twin = slow_rates(
        total,
        name=schedule.name,
        warmup=schedule.warmup_steps,
        decay_share=schedule.decay_share,
        final_share=schedule.final_share,
    )
    assert curve(total, schedule) == pytest.approx(twin, abs=1e-12)


@given(runs())
def test_factor_stays_between_zero_and_one_and_falls_after_warmup(run):
    total, schedule = run
    factors = curve(total, schedule)
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    after = factors[schedule.warmup_steps :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


@given(runs())
def test_rate_is_full_until_the_step_where_the_decay_starts(run):
    total, schedule = run
    start = decay_start_step(total, schedule)
    assert all(
        rate_factor(step, total, schedule) == 1.0
        for step in range(schedule.warmup_steps, min(start + 1, total))
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "one-cycle", "wsd"])
def test_last_step_has_the_final_share_and_no_step_beyond_it_differs(name):
    schedule = ScheduleSettings(name=name, warmup_steps=10, final_share=0.1)
    assert rate_factor(99, 100, schedule) == pytest.approx(0.1)
    assert rate_factor(150, 100, schedule) == pytest.approx(0.1)


def test_first_step_of_a_warmup_already_moves_and_its_last_step_has_the_full_rate():
    schedule = ScheduleSettings(name="wsd", warmup_steps=4)
    assert [rate_factor(step, 100, schedule) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_wsd_spends_the_stated_share_of_the_steps_below_the_full_rate():
    schedule = ScheduleSettings(name="wsd", warmup_steps=0, decay_share=0.2)
    assert sum(factor < 1.0 for factor in curve(1000, schedule)) == 200


@pytest.mark.parametrize(("total", "warmup", "final_share"), [(100, 30, 0.01), (50, 10, 0.2), (7, 2, 0.5)])
def test_one_cycle_is_the_curve_of_torch(total, warmup, final_share):
    peak = 0.3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=peak,
        total_steps=total,
        pct_start=warmup / total,
        final_div_factor=1 / (25 * final_share),
        cycle_momentum=False,
    )
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < total:
            torchs.step()
    schedule = ScheduleSettings(name="one-cycle", warmup_steps=warmup, final_share=final_share)
    assert [peak * factor for factor in curve(total, schedule)] == pytest.approx(rates, rel=1e-12)


def test_one_cycle_rises_from_a_25th_of_the_peak_which_one_step_has():
    schedule = ScheduleSettings(name="one-cycle", warmup_steps=30)
    factors = curve(100, schedule)
    assert factors[0] == pytest.approx(1 / 25)
    assert factors[:30] == sorted(factors[:30])
    assert [step for step, factor in enumerate(factors) if factor == 1.0] == [29]
