"""What a trial of controls was seen to bring: progress per second at equal data, where the losses say it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given

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
    seen = seen_of(judged(), before=NEUTRAL, after=HIGHER)
    assert seen == (pytest.approx(0.0), pytest.approx(0.1))


@pytest.mark.parametrize("after", [HIGHER, TWICE])
def test_half_again_the_fall_of_the_run_without_it_is_a_half_more(after: m.Controls) -> None:
    """Both took as long, whatever the batch was."""
    seen = seen_of(judged(loss_end=2.05), before=NEUTRAL, after=after)
    assert seen == (pytest.approx(0.5), pytest.approx(0.15))


@pytest.mark.parametrize("verdict", m.Verdict)
def test_it_is_kept_if_accepted_or_if_there_was_no_guard_to_undo_it(verdict: m.Verdict) -> None:
    guarded = replace(judged(), verdict=verdict, lost_steps=16)
    assert is_kept(guarded) is (verdict is m.Verdict.ACCEPTED)
    assert is_kept(replace(guarded, lost_steps=0)) is (verdict in (m.Verdict.ACCEPTED, m.Verdict.REFUSED))
    assert is_kept(replace(guarded, lost_steps=0, probation_steps=0)) is (verdict is m.Verdict.ACCEPTED)


def test_a_loss_that_rose_is_a_loss_of_more_than_all_progress() -> None:
    seen = seen_of(judged(loss_end=2.25), before=NEUTRAL, after=HIGHER)
    assert seen is not None
    assert seen.share == pytest.approx(-1.5)


@pytest.mark.parametrize(
    "told",
    [
        {"loss_forecast": 2.2}, {"loss_forecast": 2.3}, {"loss_forecast": math.inf}, {"loss_end": math.nan},
        {"loss_spread": 0.051}, {"loss_spread": math.nan}, 
    ],
)  # fmt: skip
def test_no_share_is_told_of_a_fall_that_is_none_or_within_noise(told: dict[str, float]) -> None:
    assert seen_of(judged(**told), before=NEUTRAL, after=HIGHER) is None


@pytest.mark.parametrize(
    "after",
    [m.Controls(context_tokens=64), m.Controls(decay_start=9, decay_steps=9), m.Controls(read_out="average")],
)
def test_no_share_is_told_of_changes_whose_losses_do_not_compare(after: m.Controls) -> None:
    both = replace(after, rate_factor=2.0)
    assert seen_of(judged(), before=NEUTRAL, after=both) is None
    assert seen_of(judged(), before=after, after=both) is not None


def test_in_words_it_is_a_share_or_else_the_judges_losses_or_nothing() -> None:
    assert seen_words(Seen(0.104, 0.061), judged()) == "+10 ± 6 % seen"
    assert share_words(Seen(-25.0, 31.0)) == "\N{MINUS SIGN}999 ± 999 %"
    worse = judged(loss_end=2.363)
    assert seen_words(None, worse) == "loss 0.26 ± 0.01 above the run without it"
    assert seen_words(None, judged(loss_end=2.0)) == "loss 0.1 ± 0.01 below the run without it"
    forecast = "loss 0.26 ± 0.01 above the forecast without it"
    assert seen_words(None, worse, beside_twin=False) == forecast
    assert seen_words(None, judged(loss_end=math.nan)) == ""
    ruined = judged(loss_end=7.1, loss_forecast=math.nan, loss_spread=math.nan)
    assert seen_words(None, ruined) == "loss 7.1 half-way, 2.2 before"
    assert seen_words(None, ruined, beside_twin=False) == ""


@given(values(m.Outcome), values(m.Controls), values(m.Controls))
def test_no_numbers_of_any_value_break_it(outcome: m.Outcome, before: m.Controls, after: m.Controls) -> None:
    seen = seen_of(outcome, before=before, after=after)
    assert seen is None or all(map(math.isfinite, seen))
    assert isinstance(seen_words(seen, outcome), str)
