"""Controls as arithmetic: clock, data, rate and windows of a step, whatever the factors were before it."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.control_rules import NEUTRAL, breach, schedule_of
from common.errors import SettingsError
from common.messages import Controls
from common.schedule import decay_start_step, rate_factor
from common.settings import TrainerSettings
from tests.trainer.small_job import bits
from tests.trainer.tiny import tiny_settings
from trainer_node.controls import (
    MicroBatches,
    as_allowed,
    check_own_loop,
    check_place,
    cut_context,
    most_steps,
    objection_to,
    pieces_of,
    plan_step,
    steps_left,
)
from trainer_node.data import Batch, TextBatches, in_pieces
from trainer_node.phases import PhaseRules
from trainer_node.progress import first_progress, is_over, needs_averages, plan_of
from trainer_node.step_taken import StepTaken

SWITCHES = ("rate", "batch", "context", "decay", "read_out")
ALL_ON = (*(f"trainer.controls.{name}=true" for name in SWITCHES), "trainer.controls.trial_steps=6")
RULES = PhaseRules(statistics_steps=4, window_steps=6, probation_steps=5, total_steps=60)
FACTORS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 16.0])


def trainer(*overrides: str) -> TrainerSettings:
    return tiny_settings(*ALL_ON, *overrides).trainer


def numbered(sequences: int):
    """Items that say which they are."""

    def batch_at(position: int) -> Batch:
        numbers = torch.arange(position * sequences, (position + 1) * sequences)
        return Batch(numbers[:, None], numbers)

    return batch_at


def taken(nominal_steps: float) -> StepTaken:
    return StepTaken(
        tensors=None, rate_factor=1.0, passes=3.0, seconds=1.0, wall_seconds=1.0, data_seconds=0.0,
        nominal_steps=nominal_steps,
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(FACTORS, max_size=90), st.sampled_from([4, 8]), st.integers(1, 3), st.integers(0, 3))
@example([0.25, 0.25, 0.25, 1.0, 2.0, 0.25], 4, 1, 0)  # the clock stands between the last two of the warm-up
def test_every_item_is_used_once_in_order_and_the_run_ends_after_the_same_number(
    factors, sequences, accumulation, skipped
):
    given_settings = trainer(
        f"trainer.batch.sequences={sequences}", f"trainer.batch.accumulation={accumulation}"
    )
    progress, micro_batches = first_progress(RULES), MicroBatches(numbered(sequences))
    progress.skipped_steps = skipped
    used, clocks = [], []
    for number in range(61 * 4):
        if is_over(progress, given_settings):
            break
        factor = factors[number] if number < len(factors) else 1.0
        progress.controls = Controls(batch_factor=factor)
        plan = plan_of(progress, given_settings)
        batches = micro_batches.of(plan)
        assert all(len(batch.inputs) == sequences for batch in batches[:-1])
        pieces = pieces_of(batches, size=3)
        assert all(divisor == plan.items / len(piece.inputs) for piece, divisor in pieces)
        used += [int(n) for batch in batches for n in batch.targets]
        clocks.append(progress.clock)
        scheduled = rate_factor(progress.clock, 60, given_settings.schedule)
        assert plan.rate_factor == scheduled * math.sqrt(factor)
        progress.count(taken(plan.nominal_steps))
    items_per_step = sequences * accumulation
    assert used == list(range(skipped * items_per_step, (skipped + 60) * items_per_step))
    assert (progress.clock, progress.data_step) == (60, 60 + skipped)
    scheduled = [rate_factor(clock, 60, given_settings.schedule) for clock in clocks]
    # Continuous: nowhere steeper than the line of the decay or of the warm-up.
    for (c1, r1), (c2, r2) in zip(
        zip(clocks, scheduled, strict=True), list(zip(clocks, scheduled, strict=True))[1:], strict=False
    ):
        assert abs(r2 - r1) <= (c2 - c1) / 4 + 1e-12


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "one-cycle", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 7])
def test_between_two_steps_the_rate_is_between_theirs(name: str, warmup_steps: int) -> None:
    """Small batches bring the clock there. At the end of a warm-up it once was above the peak."""
    schedule = replace(trainer().schedule, name=name, warmup_steps=warmup_steps)
    rates = [rate_factor(step / 64, 20, schedule) for step in range(64 * 20 + 1)]
    for step in range(20):
        whole = rates[64 * step], rates[64 * step + 64]
        assert all(min(whole) - 1e-12 <= rate <= max(whole) + 1e-12 for rate in rates[64 * step :][:64])
    assert max(rates) == 1.0


def test_amounts_are_exact_over_the_longest_run():
    """Floats against exact fractions, at the far end of what settings allow."""
    progress, twin = first_progress(RULES), Fraction(1 << 40)
    progress.step = 1 << 40
    random = np.random.default_rng(0)
    for factor in random.choice([1 / 64, 0.25, 1.0, 2.0, 1024.0], size=4000):
        progress.count(taken(float(factor)))
        twin += Fraction(float(factor))
    assert Fraction(progress.clock) == Fraction(progress.data_step) == twin


def test_a_neutral_step_is_the_step_that_it_always_was():
    given_settings = trainer("trainer.batch.accumulation=3")
    plan = plan_step(NEUTRAL, given_settings, step=17, clock=17.0, data_step=19.0)
    assert plan.rate_factor == rate_factor(17, 60, given_settings.schedule)
    batches = MicroBatches(numbered(16)).of(plan)
    assert [int(batch.targets[0]) // 16 for batch in batches] == [57, 58, 59]
    assert [divisor for _, divisor in pieces_of(batches, size=16)] == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("size", [1, 3, 5, 16])
def test_the_monitors_smaller_pieces_hold_whatever_the_batch_and_the_context(size):
    progress = first_progress(RULES)
    for factor in (0.5, 0.25, 4.0, 1.0):
        progress.controls = Controls(batch_factor=factor)
        plan = plan_of(progress, trainer())
        batches = [
            Batch(b.inputs.expand(-1, 8), b.inputs.expand(-1, 8)) for b in MicroBatches(numbered(16)).of(plan)
        ]
        for context in (0, 4):
            pieces = pieces_of(batches, size=size, context_tokens=context)
            assert max(piece.inputs.numel() for piece, _ in pieces) <= size * 8
            assert sum(piece.inputs.numel() for piece, _ in pieces) == round(16 * factor) * 8
        progress.count(taken(plan.nominal_steps))


def test_a_context_cut_has_the_same_tokens_with_the_same_targets_in_the_same_order():
    data = TextBatches(
        np.random.default_rng(0).integers(0, 1000, size=2000, dtype=np.uint16),
        sequences=3, context_tokens=12, seed=0, guard_batches=1, device=torch.device("cpu"),
    )  # fmt: skip
    for position in range(4):
        batch = data.batch(position)
        for context in (2, 3, 4, 6, 12):
            cut = cut_context(batch, context)
            assert cut.inputs.shape == cut.targets.shape == (3 * 12 // context, context)
            assert torch.equal(cut.inputs.flatten(), batch.inputs.flatten())
            assert torch.equal(cut.targets.flatten(), batch.targets.flatten())


def test_pieces_of_a_cut_context_weigh_every_token_alike():
    values = torch.arange(48.0).view(4, 12)
    batches = [Batch(values[:3], values[:3]), Batch(values[3:], values[3:])]
    for context in (0, 3, 6):
        pieces = pieces_of(batches, size=2, context_tokens=context)
        assert sum(float(piece.inputs.mean()) / divisor for piece, divisor in pieces) == pytest.approx(23.5)


def test_equal_batches_in_pieces_are_the_batches_to_the_last_bit():
    batches = [Batch(torch.rand(8, 3), torch.arange(8)) for _ in range(3)]
    for (piece, divisor), batch in zip(in_pieces(batches, 8), batches, strict=True):
        assert (bits(piece.inputs), divisor) == (bits(batch.inputs), 3.0)


WSD = ("trainer.steps=100", "trainer.schedule.name=wsd", "trainer.schedule.decay_share=0.2")


@pytest.mark.parametrize(("start", "length"), [(30, 20), (5, 1), (50, 50), (78, 22)])
def test_a_chosen_tail_begins_without_a_leap_and_ends_the_run_at_its_final_share(start, length):
    given_settings = trainer(*WSD, "trainer.schedule.final_share=0.1")
    tail = Controls(decay_start=start, decay_steps=length)
    rates, progress = [], first_progress(RULES)
    while not is_over(progress, given_settings):
        progress.controls = tail if progress.clock >= min(start, 20) else NEUTRAL
        rates.append(plan_of(progress, given_settings).rate_factor)
        progress.count(taken(1.0))
    assert len(rates) == start + length
    assert rates[start - 1] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    falls = np.diff(rates[start - 1 :])
    assert falls == pytest.approx(-0.9 / length)


@pytest.mark.parametrize("clock", [79.0, 80.0, 80.5, 95.0])
def test_a_tail_that_has_begun_is_never_moved(clock):
    """Neither the configured one (step 79 of 100 is the last at the full rate) nor one that was chosen."""
    given_settings = trainer(*WSD)
    assert decay_start_step(100, given_settings.schedule) == 79
    chosen, later = Controls(decay_start=70, decay_steps=20), Controls(decay_start=96, decay_steps=4)
    for now in (NEUTRAL, chosen):
        wrong = breach(later, now=now, settings=given_settings, clock=clock)
        assert bool(wrong) == (now == chosen or clock > 80)
    # Back to the configured tail, whose rate would be below 1 by now.
    wrong = breach(NEUTRAL, now=later, settings=given_settings, clock=clock)
    assert bool(wrong) == (clock > 80)
    # One that begins with the very next step.
    if clock <= 80:
        at_once = Controls(decay_start=80, decay_steps=9)
        assert not breach(at_once, now=NEUTRAL, settings=given_settings, clock=clock)


def test_the_steps_that_are_left_are_real_ones():
    given_settings = trainer()
    assert steps_left(NEUTRAL, given_settings, 20) == 40
    assert steps_left(Controls(batch_factor=4.0), given_settings, 21) == 10
    assert steps_left(Controls(batch_factor=0.25), given_settings, 59.5) == 2
    assert steps_left(Controls(decay_start=30, decay_steps=10), given_settings, 20) == 20
    assert most_steps(given_settings) == 240
    assert most_steps(tiny_settings().trainer) == 60


def test_averages_are_kept_where_a_window_or_a_choice_may_want_them():
    given_settings = trainer("trainer.controls.read_out=false")
    progress = first_progress(RULES)
    progress.step, progress.phase = 56, replace(progress.phase, phase=type(progress.phase.phase).FULL)
    progress.phase = replace(progress.phase, steps_left=6)
    assert not needs_averages(progress, given_settings)
    progress.controls = Controls(batch_factor=0.5)  # eight real steps are left
    assert needs_averages(progress, given_settings)
    progress.controls = NEUTRAL
    assert needs_averages(progress, trainer())


def test_several_ranks_never_share_a_cut_micro_batch():
    given_settings = trainer("trainer.batch.accumulation=2")

    def why(factor: float, ranks: int) -> str:
        return objection_to(
            Controls(batch_factor=factor), NEUTRAL, given_settings, clock=0.0, num_ranks=ranks
        )

    assert (why(0.5, 1), why(0.5, 2), why(2.0, 2)) == ("", "", "")
    given_settings = trainer("trainer.batch.accumulation=1")
    assert why(0.5, 1) == ""
    assert "ranks" in why(0.5, 2)
    check_place(10.5, given_settings, 1)
    check_place(10.0, given_settings, 2)
    with pytest.raises(ValueError, match="2 ranks"):
        check_place(10.5, given_settings, 2)
    for senseless in (math.nan, math.inf, 10.01):
        with pytest.raises(ValueError):
            check_place(senseless, given_settings, 1)


def test_a_control_whose_switch_is_off_is_where_the_settings_have_it():
    saved = Controls(rate_factor=2.0, batch_factor=2.0, decay_start=30, decay_steps=10, read_out="average")
    assert as_allowed(saved, trainer()) == saved
    off = trainer("trainer.controls.rate=false", "trainer.controls.decay=false")
    assert as_allowed(saved, off) == Controls(batch_factor=2.0, read_out="average")
    assert as_allowed(saved, tiny_settings().trainer) == NEUTRAL
    for senseless in ({"batch_factor": 0.3}, {"rate_factor": math.nan}, {"batch_factor": 0.0}):
        with pytest.raises(ValueError):
            as_allowed(replace(saved, **senseless), trainer())


@pytest.mark.parametrize(
    ("tail", "today"),
    [
        ((40, 15), ("trainer.steps=50",)),  # it would end after the run
        ((40, 15), ("trainer.schedule.name=cosine",)),
        ((3, 15), ("trainer.schedule.warmup_steps=4",)),
        ((-9, 1), ()),
        ((40, 0), ()),
        ((40, -3), ()),
    ],
)
def test_a_tail_of_a_checkpoint_that_is_none_under_todays_settings_is_as_configured(tail, today):
    """breach() lets a tail be that stays as it is: a resume is where it may have ceased to be one."""
    start, steps = tail
    saved = Controls(rate_factor=2.0, decay_start=start, decay_steps=steps)
    given_settings = trainer(*today)
    assert as_allowed(saved, given_settings) == Controls(rate_factor=2.0)
    assert schedule_of(as_allowed(saved, given_settings), given_settings)[0] == given_settings.steps
    fitting = replace(saved, decay_start=40, decay_steps=15)
    assert as_allowed(fitting, trainer()) == fitting


HOSTILE = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, -1.0, 5e-324, 1e308, 3.0, 0.75])
)


@settings(deadline=None, max_examples=150)
@given(
    HOSTILE,
    HOSTILE,
    st.integers(-5, 1 << 62),
    st.integers(-5, 1 << 62),
    st.integers(-5, 1 << 62),
    st.text(max_size=9),
)
def test_whatever_is_asked_for_is_refused_or_makes_a_run_that_ends(
    rate, batch, context, start, length, read_out
):
    wanted = Controls(
        rate_factor=rate, batch_factor=batch, context_tokens=context, decay_start=start, decay_steps=length,
        read_out=read_out,
    )  # fmt: skip
    given_settings = trainer()
    if objection_to(wanted, NEUTRAL, given_settings, clock=10.0, num_ranks=1):
        return
    assert 0 < steps_left(wanted, given_settings, 10.0) <= 200
    plan = plan_step(wanted, given_settings, step=10, clock=10.0, data_step=10.0)
    assert plan.items >= 1
    assert 0.0 < plan.rate_factor < math.inf


def test_an_own_loop_has_no_controls_and_no_packing():
    check_own_loop(tiny_settings().trainer)
    switches = [f"trainer.controls.{switch}=true" for switch in SWITCHES]
    for switch in (*switches, "trainer.data.packing=document"):
        with pytest.raises(SettingsError, match="loop of your own"):
            check_own_loop(tiny_settings(switch).trainer)


def test_the_schedule_in_force_is_the_configured_one_without_a_chosen_tail():
    given_settings = trainer()
    assert schedule_of(Controls(rate_factor=2.0, batch_factor=4.0), given_settings) == (
        60,
        given_settings.schedule,
    )
