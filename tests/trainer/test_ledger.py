import dataclasses
import json
import math

import pytest

from common.messages import APPLIED_VERDICTS, Verdict
from trainer_node import ledger as purposes
from trainer_node.jump import blank_outcome
from trainer_node.ledger import Ledger


def outcome(verdict, **changes):
    return dataclasses.replace(blank_outcome("1.0", verdict, step=1, attempt=0), **changes)


@pytest.mark.parametrize("counted", [True, False])
def test_spans_tell_passes_when_counted_and_seconds_otherwise_and_book_both(fake_clock, counted):
    ledger = Ledger(fake_clock, counted=counted)
    with ledger.span(purposes.STEPS, passes=6.0) as span:
        fake_clock.advance(2.5)
    assert span.seconds == (6.0 if counted else 2.5)
    assert span.wall_seconds == 2.5
    assert dict(ledger.wall_seconds) == {"steps": 2.5}
    assert dict(ledger.passes) == {"steps": 6.0}


def test_counted_messages_do_not_depend_on_the_clock(fake_clock):
    ledger, told = Ledger(fake_clock, counted=True), []
    for seconds in (0.1, 50.0):
        with ledger.span(purposes.CHECKS, passes=1.0) as span:
            fake_clock.advance(seconds)
        told.append(span.seconds)
    assert told == [1.0, 1.0]


def test_work_that_fails_is_booked_all_the_same(fake_clock):
    ledger = Ledger(fake_clock, counted=False)
    with pytest.raises(RuntimeError), ledger.span(purposes.SNAPSHOTS) as span:  # noqa: PT012
        fake_clock.advance(3.0)
        raise RuntimeError
    assert span.seconds == ledger.wall_seconds["snapshots"] == 3.0


def test_reading_data_is_a_part_of_the_steps_and_not_counted_twice(fake_clock):
    ledger = Ledger(fake_clock, counted=False)
    with ledger.span(purposes.STEPS):
        with ledger.span(purposes.DATA):
            fake_clock.advance(1.0)
        fake_clock.advance(2.0)
    with ledger.span(purposes.WAITING):
        fake_clock.advance(0.5)
    assert ledger.wall_seconds["data"] == 1.0
    assert ledger.total_seconds == 3.5


def test_applied_counts_the_verdicts_that_moved_weights(fake_clock):
    ledger = Ledger(fake_clock, counted=True)
    for verdict in Verdict:
        ledger.note(outcome(verdict))
    assert ledger.applied == len(APPLIED_VERDICTS) == 4


def test_only_kept_jumps_stand_for_virtual_steps_and_all_lost_steps_are_counted(fake_clock):
    ledger = Ledger(fake_clock, counted=True)
    ledger.note(outcome(Verdict.ACCEPTED, horizon_steps=10, delta_cosine=0.5))
    ledger.note(outcome(Verdict.REFUSED, horizon_steps=100, lost_steps=16, delta_cosine=-0.25))
    ledger.note(outcome(Verdict.RUINED, horizon_steps=1000, delta_cosine=math.nan))
    ledger.note(outcome(Verdict.VETOED, horizon_steps=5))
    assert (ledger.virtual_steps, ledger.lost_steps) == (10, 16)
    assert ledger.cosines == [0.5, -0.25]


def test_a_ledger_read_back_from_json_goes_on_counting(fake_clock):
    ledger = Ledger(fake_clock, counted=False)
    with ledger.span(purposes.STEPS, passes=3.0):
        fake_clock.advance(2.0)
    ledger.note(outcome(Verdict.ACCEPTED, horizon_steps=10, delta_cosine=0.5))
    again = Ledger(fake_clock, counted=False)
    again.load(json.loads(json.dumps(ledger.to_json())))
    assert again.to_json() == ledger.to_json()
    for each in (ledger, again):
        each.note(outcome(Verdict.REFUSED, lost_steps=4, delta_cosine=0.1))
        with each.span("a new purpose", passes=1.0):
            fake_clock.advance(1.0)
    assert again.to_json() == ledger.to_json()
    assert again.verdicts[Verdict.ACCEPTED] == again.verdicts[Verdict.REFUSED] == 1
