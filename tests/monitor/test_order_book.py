"""What is in force, whichever stream is read first and whatever gets lost on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import CheckpointRequest, MemoryAction, MemoryOrder, MemoryReport, OrderDone
from monitor_node import order_book
from monitor_node.memory_facts import THRASHING_REPORTS, MemoryFacts
from monitor_node.order_book import HALVE, OrderBook
from tests.monitor.fake_run import sample

BF16, HOST = MemoryAction.BASIS_BF16, MemoryAction.BASIS_HOST
OFF = MemoryAction.PREDICTION_OFF


def order(number: int, action: MemoryAction, *, undo: bool = False) -> MemoryOrder:
    return MemoryOrder(order_id=f"1.{number}", action=action, reason="", undo=undo)


def done(number: int, is_done: bool = True) -> OrderDone:
    return OrderDone(order_id=f"1.{number}", done=is_done, bytes_before=None, bytes_after=None, detail="")


def report(*in_force: MemoryAction, step: int = 1, retries: int = 0) -> MemoryReport:
    return MemoryReport(
        step=step,
        occasion="interval",
        allocated_bytes=None,
        reserved_bytes=None,
        inactive_split_bytes=None,
        peak_bytes=None,
        alloc_retries=retries,
        out_of_memory=0,
        micro_batch=8,
        accumulation=1,
        in_force=in_force,
        holders=(),
    )


def fold(*messages: MemoryOrder | OrderDone | MemoryReport, book: OrderBook | None = None) -> OrderBook:
    book = book or OrderBook()
    for message in messages:
        if isinstance(message, MemoryOrder):
            book = order_book.ordered(book, message)
        elif isinstance(message, OrderDone):
            book = order_book.answered(book, message)
        else:
            book = order_book.reported(book, message)
    return book


ACTIONS = st.sampled_from([action for action in MemoryAction if action is not MemoryAction.CLEANUP])
DIALOGUES = st.lists(st.tuples(ACTIONS, st.booleans(), st.booleans()), max_size=20)


@settings(deadline=None)
@given(DIALOGUES, st.data())
def test_in_force_does_not_depend_on_which_stream_is_read_first(dialogue: list, data: st.DataObject) -> None:
    orders = [order(n, action, undo=undo) for n, (action, undo, _) in enumerate(dialogue)]
    answers = [done(n, is_done) for n, (_, _, is_done) in enumerate(dialogue)]
    in_turn = fold(*(message for pair in zip(orders, answers, strict=True) for message in pair))
    mixed: list = []
    left: list[list] = [list(orders), list(answers)]
    while any(left):
        source = data.draw(st.sampled_from([stream for stream in left if stream]))
        mixed.append(source.pop(0))
    found = fold(*mixed)
    assert (found.in_force, found.waiting) == (in_turn.in_force, ())


def test_what_was_refused_is_not_in_force_and_what_is_not_answered_waits() -> None:
    book = fold(order(1, BF16), done(1), order(2, HOST), done(2, False), order(3, OFF))
    assert book.in_force == (BF16,)
    assert [waiting.order_id for waiting in book.waiting] == ["1.3"]


def test_an_order_that_a_later_answer_passes_over_was_lost() -> None:
    assert fold(order(1, BF16), order(2, OFF), done(2)).in_force == (OFF,)
    book = fold(order(1, BF16), done(1), order(2, BF16, undo=True), order(3, OFF), done(3))
    assert book.in_force == (BF16, OFF)


def test_an_undo_takes_the_newest_of_its_action() -> None:
    book = fold(order(1, HALVE), done(1), order(2, BF16), done(2), order(3, HALVE), done(3))
    assert fold(order(4, HALVE, undo=True), done(4), book=book).in_force == (HALVE, BF16)


def test_the_word_of_the_trainer_counts_and_the_order_in_which_things_were_given_up_is_kept() -> None:
    assert fold(report(HALVE, HALVE)).in_force == (HALVE, HALVE)
    book = fold(order(1, HALVE), done(1), order(2, BF16), done(2))
    assert fold(report(BF16, HALVE), book=book).in_force == (HALVE, BF16)
    assert fold(report(BF16), book=book).in_force == (BF16,)
    assert fold(report(BF16, HALVE, HALVE, OFF), book=book).in_force == (HALVE, BF16, HALVE, OFF)
    assert fold(report(), book=book).in_force == ()  # it went on from a checkpoint from before the orders


def test_a_report_says_nothing_of_an_order_that_is_under_way() -> None:
    assert fold(order(1, BF16), done(1), order(2, OFF), report()).in_force == (BF16,)


def test_an_order_that_the_former_trainer_left_unanswered_keeps_no_report_from_counting() -> None:
    facts = MemoryFacts(book=fold(order(1, BF16), done(1), order(2, OFF)))
    facts.fold_report(report())
    assert facts.book.in_force == (BF16,)
    facts.trainer_started()
    facts.fold_report(report(HALVE))
    assert facts.book.in_force == (HALVE,)


@settings(deadline=None)
@given(st.lists(ACTIONS, max_size=8), st.lists(ACTIONS, max_size=8))
def test_after_a_report_in_force_is_what_it_says(
    before: list[MemoryAction], said: list[MemoryAction]
) -> None:
    found = fold(report(*said), book=OrderBook(in_force=tuple(before))).in_force
    assert Counter(found) == Counter(said)


def test_only_emergency_checkpoints_count_for_the_cooldown() -> None:
    request = CheckpointRequest(request_id="1.1", emergency=True, reason="")
    assert order_book.ordered(OrderBook(), request, at_seconds=7.0).checkpoint_at_seconds == 7.0
    plain = replace(request, emergency=False)
    assert order_book.ordered(OrderBook(), plain, at_seconds=7.0).checkpoint_at_seconds is None


def thrashing(*reports: MemoryReport) -> bool:
    facts = MemoryFacts()
    for told in reports:
        facts.fold_report(told)
    return facts.is_thrashing


def test_retries_in_two_reports_running_are_thrashing_and_one_quiet_report_ends_it() -> None:
    rising = [report(step=64 * n, retries=n) for n in range(THRASHING_REPORTS + 1)]
    assert not thrashing(*rising[:-1])
    assert thrashing(*rising)
    assert thrashing(*rising, replace(rising[-1], occasion="order"))  # no step since: says nothing
    assert not thrashing(*rising, replace(rising[-1], step=1000))


def test_a_trainer_that_starts_anew_begins_its_count_anew() -> None:
    rising = [report(step=64 * n, retries=10 * n) for n in range(3)]
    assert not thrashing(*rising, report(step=32, retries=1))
    assert not thrashing(*rising, report(step=32, retries=0), report(step=96, retries=1))


def test_an_order_that_was_carried_out_ends_thrashing_until_it_shows_again() -> None:
    facts = MemoryFacts()
    for n in range(3):
        facts.fold_report(report(step=n, retries=n))
    facts.fold_order(order(1, HALVE), 0.0)
    facts.fold_done(done(1))
    assert not facts.is_thrashing


def test_a_trainer_that_starts_does_not_thrash_yet() -> None:
    facts = MemoryFacts()
    for n in range(3):
        facts.fold_report(report(step=n, retries=n))
    facts.trainer_started()
    assert not facts.is_thrashing


def test_the_outlook_begins_anew_when_memory_was_given_up_and_not_after_a_clean_up() -> None:
    facts = MemoryFacts()
    facts.fold_sample(sample(5), 100.0)
    facts.fold_order(order(1, MemoryAction.CLEANUP), 0.0)
    facts.fold_done(done(1))
    assert facts.peaks.buckets == ((10, 5),)
    facts.fold_order(order(2, HALVE), 0.0)
    facts.fold_done(done(2))
    assert facts.peaks.buckets == ()
