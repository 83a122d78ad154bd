"""What a trial of controls was seen to bring: progress per second at equal data, where the losses say it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import messages as m
from common.trial_seen import Seen, is_kept, seen_of, seen_words, share_words
from tests.common.message_samples import values

TWICE = m.Controls(batch_factor=2.0)
HIGHER = m.Controls(rate_factor=2.0)
NEUTRAL = m.Controls()


def judged(**told: float) -> m.Outcome:
    """0.1 nats fell, as forecast without the change; a step takes 0.1 s."""
    losses = {"loss_before": 2.2, "loss_end": 2.1, "loss_forecast": 2.1, "loss_spread": 0.01}
    numbers = dict.fromkeys(
        ("loss_after", "delta_norm", "delta_cosine", "passes", "waiting_seconds", "snapshot_seconds",
         "jump_seconds", "check_seconds", "restore_seconds", "lost_seconds"), 0.0,
    )  # fmt: skip
    return m.Outcome(
        decision_id="16.0", verdict=m.Verdict.ACCEPTED, base_step=16, attempt=0, horizon_steps=0,
        probation_steps=16, lost_steps=0, **{**numbers, "full_step_seconds": 0.1, **losses, **told},
    )  # fmt: skip


def test_the_same_fall_in_the_same_time_is_no_gain() -> None:
    seen = seen_of(judged(), before=NEUTRAL, after=HIGHER, step_seconds=0.1)
    assert seen == (pytest.approx(0.0), pytest.approx(0.1))


def test_twice_the_batch_in_steps_of_half_again_the_time_is_a_third_more() -> None:
    """The forecast is of the same data: for 16 of these steps, 32 ordinary ones."""
    seen = seen_of(judged(), before=NEUTRAL, after=TWICE, step_seconds=0.15)
    assert seen == (pytest.approx(1 / 3), pytest.approx(0.1 * 4 / 3))
    back = seen_of(judged(), before=TWICE, after=NEUTRAL, step_seconds=0.1)
    assert back is not None
    assert back.share == pytest.approx(-0.5)


def test_it_is_against_steps_with_the_controls_of_before_where_their_time_is_known() -> None:
    """The outcome's 0.1 s is a median of two kinds of steps for 64 steps after a kept change of the batch."""
    for ordinary_seconds, share in ((0.2, 1.0), (0.1, 0.0), (math.nan, 0.0), (0.0, 0.0), (-1.0, 0.0)):
        seen = seen_of(
            judged(), before=NEUTRAL, after=HIGHER, step_seconds=0.1, ordinary_seconds=ordinary_seconds
        )
        assert seen is not None
        assert seen.share == pytest.approx(share)


@pytest.mark.parametrize("verdict", m.Verdict)
def test_it_is_kept_if_accepted_or_if_there_was_no_guard_to_undo_it(verdict: m.Verdict) -> None:
    guarded = replace(judged(), verdict=verdict, lost_steps=16)
    assert is_kept(guarded) is (verdict is m.Verdict.ACCEPTED)
    assert is_kept(replace(guarded, lost_steps=0)) is (verdict in (m.Verdict.ACCEPTED, m.Verdict.REFUSED))
    assert is_kept(replace(guarded, lost_steps=0, probation_steps=0)) is (verdict is m.Verdict.ACCEPTED)


def test_a_loss_that_rose_is_a_loss_of_more_than_all_progress() -> None:
    seen = seen_of(judged(loss_end=2.25), before=NEUTRAL, after=HIGHER, step_seconds=0.1)
    assert seen is not None
    assert seen.share == pytest.approx(-1.5)


@pytest.mark.parametrize(
    "told",
    [
        {"loss_forecast": 2.2}, {"loss_forecast": 2.3}, {"loss_forecast": math.inf}, {"loss_end": math.nan},
        {"loss_spread": 0.051}, {"loss_spread": math.nan}, {"full_step_seconds": 0.0},
    ],
)  # fmt: skip
def test_no_share_is_told_of_a_fall_that_is_none_or_within_noise(told: dict[str, float]) -> None:
    assert seen_of(judged(**told), before=NEUTRAL, after=HIGHER, step_seconds=0.1) is None


@pytest.mark.parametrize("step_seconds", [math.nan, 0.0, -1.0, math.inf])
def test_no_share_is_told_where_the_time_of_a_step_is_not_known(step_seconds: float) -> None:
    assert seen_of(judged(), before=NEUTRAL, after=HIGHER, step_seconds=step_seconds) is None


@pytest.mark.parametrize(
    "after",
    [m.Controls(context_tokens=64), m.Controls(decay_start=9, decay_steps=9), m.Controls(read_out="average")],
)
def test_no_share_is_told_of_changes_whose_losses_do_not_compare(after: m.Controls) -> None:
    both = replace(after, rate_factor=2.0)
    assert seen_of(judged(), before=NEUTRAL, after=both, step_seconds=0.1) is None
    assert seen_of(judged(), before=after, after=both, step_seconds=0.1) is not None


def test_in_words_it_is_a_share_or_else_the_judges_losses_or_nothing() -> None:
    assert seen_words(Seen(0.104, 0.061), judged()) == "+10 ± 6 % seen"
    assert share_words(Seen(-25.0, 31.0)) == "\N{MINUS SIGN}999 ± 999 %"
    worse = judged(loss_end=2.363)
    assert seen_words(None, worse) == "loss 0.26 ± 0.01 above the forecast without it"
    assert seen_words(None, judged(loss_end=2.0)) == "loss 0.1 ± 0.01 below the forecast without it"
    assert seen_words(None, judged(loss_end=math.nan)) == ""


@given(values(m.Outcome), values(m.Controls), values(m.Controls), st.floats())
def test_no_numbers_of_any_value_break_it(
    outcome: m.Outcome, before: m.Controls, after: m.Controls, step_seconds: float
) -> None:
    seen = seen_of(outcome, before=before, after=after, step_seconds=step_seconds)
    assert seen is None or all(map(math.isfinite, seen))
    assert isinstance(seen_words(seen, outcome), str)
