"""Curves over time, over steps and by holder: true to what was told, and bounded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages as m
from monitor_node.curves import MAX_HOLDERS, STACKING, HolderStack, RunCurves
from monitor_node.order_log import OrderLog
from monitor_node.proposal_book import ProposalBook, proposal_mark, said_by
from monitor_node.series import append_bounded
from tests.monitor import fake_run as fake

V = m.Verdict


def test_holders_are_stacked_in_one_order_with_the_rest_on_top() -> None:
    stack = HolderStack()
    stack.add(5, fake.report(1, {"rest": 7, "weights": 1, "cache": 3, "optimizer": 2}))
    assert stack.names == [*STACKING, "cache", "rest"]
    assert stack.rows() == [(5, [1, 2, 0, 0, 0, 0, 3, 7])]


def test_what_is_not_on_the_device_is_not_stacked() -> None:
    stack, report = HolderStack(), fake.report(1, {"weights": 4})
    host = m.Holder(name="snapshot", num_bytes=9, place="host")
    stack.add(5, replace(report, holders=(*report.holders, host)))
    assert sum(stack.rows()[0][1]) == 4
    stack.add(6, replace(report, holders=(host,)))
    assert len(stack.rows()) == 1  # of a device that is not told of nothing is known
    assert HolderStack().names == []


REPORTS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.dictionaries(st.text(max_size=60), st.integers(0, 1 << 40), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=120,
)


@settings(max_examples=60, deadline=None)
@given(REPORTS)
def test_a_stack_is_bounded_and_keeps_the_highest_moment(reports: list[tuple[int, dict[str, int]]]) -> None:
    stack = HolderStack(max_rows=8)
    for at, holders in reports:
        stack.add(at, fake.report(1, holders))
    rows = stack.rows()
    assert len(rows) <= 8
    assert len(stack.names) <= MAX_HOLDERS
    assert all(len(held) == len(stack.names) for _, held in rows)
    assert [at for at, _ in rows] == sorted(at for at, _ in rows)
    assert max(sum(held) for _, held in rows) == max(sum(h.values()) for _, h in reports)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=60))
def test_units_so_far_depend_on_the_step_alone_however_often_it_was_undone(
    moves: list[tuple[int, int]],
) -> None:
    curves, step = RunCurves(), 0
    for forward, back in moves:
        for _ in range(forward):
            step += 1
            curves.used(step, 2048.0)
        step = max(0, step - back)
        curves.cut_above(step)
    for at, units in curves.units.points():
        assert units == pytest.approx(2048.0 * at)


def test_steps_that_were_not_seen_are_counted_and_an_unknown_size_changes_nothing() -> None:
    curves = RunCurves()
    curves.used(100, 10.0)  # the first step that this monitor sees
    curves.used(101, math.nan)
    curves.used(102, 20.0)
    assert curves.units.points() == [(100, 1000.0), (102, 1040.0)]


def test_a_proposal_shows_both_losses_and_says_why() -> None:
    kept = proposal_mark(fake.outcome(16, V.ACCEPTED), said_by(fake.decision(16, 10, reason="line fit")))
    assert kept[:5] == (16, 10, "accepted", pytest.approx(1.99), pytest.approx(1.97))
    assert "1.97 with it, 1.99 without" in kept[5]
    assert "line fit" in kept[5]
    vetoed = proposal_mark(fake.outcome(16, V.VETOED), None)
    assert vetoed[3:5] == (None, None)  # nothing was measured
    assert "vetoes" in vetoed[5]


@pytest.mark.parametrize("verdict", list(V))
def test_every_verdict_has_its_words(verdict: V) -> None:
    assert proposal_mark(fake.outcome(16, verdict), None)[5]


def test_a_rest_is_no_proposal() -> None:
    curves, book = RunCurves(), ProposalBook()
    curves.settled(fake.outcome(16, V.REST, 0))
    book.settled(fake.outcome(16, V.REST, 0), 1.0)
    assert book.marks == book.rows == []
    assert curves.jumps == []


@given(st.integers(2, 20), st.integers(1, 200))
def test_bounded_rows_keep_the_newest_and_seldom_move(most: int, count: int) -> None:
    rows: list[int] = []
    moves = 0
    for row in range(count):
        before = list(rows)
        append_bounded(rows, row, most)
        assert len(rows) <= most
        moves += rows[: len(before)] != before
    assert rows == list(range(count - len(rows), count))
    assert moves <= count / max(1, most // 2)


def test_an_order_is_marked_when_it_is_asked_for_and_once_when_it_is_answered() -> None:
    log = OrderLog()
    order = m.MemoryOrder(order_id="1.1", action=m.MemoryAction.RECOMPUTE, reason="full", undo=True)
    done = m.OrderDone(order_id="1.1", done=False, bytes_before=None, bytes_after=None, detail="cannot")
    log.asked(order, 10.0)
    assert log.unanswered == 1
    log.answered(replace(done, order_id="9.9"), 11.0)
    log.answered(done, 12.0)
    log.answered(done, 13.0)
    assert log.marks == [(10.0, "undo recompute", "asked"), (12.0, "undo recompute", "refused")]
    assert log.unanswered == 0


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (m.CheckpointRequest(request_id="1", emergency=True, reason=""), "emergency checkpoint"),
        (m.CheckpointRequest(request_id="1", emergency=False, reason=""), "checkpoint"),
        (m.StopRequest(request_id="1", reason=""), "stop"),
        (m.MemoryOrder(order_id="1", action=m.MemoryAction.CLEANUP, reason=""), "cleanup"),
    ],
)
def test_every_kind_of_order_has_a_name(order: m.Order, text: str) -> None:
    log = OrderLog()
    log.asked(order, 1.0)
    assert log.marks == [(1.0, text, "asked")]
