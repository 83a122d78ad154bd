"""What is in force, whichever stream is read first and whatever gets lost on the way."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import CheckpointRequest, MemoryAction, MemoryOrder, MemoryReport, OrderDone
from monitor_node import order_book
from monitor_node.memory_facts import THRASHING_REPORTS, MemoryFacts
from monitor_node.order_book import HALVE, MAX_FAILED_UNDOS, OrderBook
from tests.monitor.fake_run import sample

BF16, HOST = MemoryAction.BASIS_BF16, MemoryAction.BASIS_HOST
OFF, RECOMPUTE = MemoryAction.PREDICTION_OFF, MemoryAction.RECOMPUTE


def order(number: int, action: MemoryAction, *, undo: bool = False) -> MemoryOrder:
    return MemoryOrder(order_id=f"1.{number}", action=action, reason="", undo=undo)


def done(number: int, is_done: bool = True) -> OrderDone:
    return OrderDone(order_id=f"1.{number}", done=is_done, bytes_before=None, bytes_after=None, detail="")


def report(*, step: int = 1, micro_batch: int = 8, retries: int = 0, shortages: int = 0) -> MemoryReport:
    return MemoryReport(
        step=step,
        occasion="interval",
        allocated_bytes=None,
        reserved_bytes=None,
        inactive_split_bytes=None,
        peak_bytes=None,
        alloc_retries=retries,
        out_of_memory=shortages,
        micro_batch=micro_batch,
        accumulation=1,
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
            book = order_book.reported(book, message, batch_sequences=8)
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


def test_an_order_that_a_later_answer_passes_over_counts_as_in_force() -> None:
    assert fold(order(1, BF16), order(2, OFF), done(2)).in_force == (BF16, OFF)
    book = fold(order(1, BF16), done(1), order(2, BF16, undo=True), order(3, OFF), done(3))
    assert (book.in_force, book.failed_undos) == ((BF16, OFF), 0)


def test_an_undo_takes_the_newest_of_its_action() -> None:
    book = fold(order(1, HALVE), done(1), order(2, BF16), done(2), order(3, HALVE), done(3))
    assert fold(order(4, HALVE, undo=True), done(4), book=book).in_force == (HALVE, BF16)


def test_an_undo_that_fails_again_and_again_ends_the_matter() -> None:
    book = fold(order(0, BF16), done(0))
    for number in range(1, MAX_FAILED_UNDOS + 1):
        assert book.in_force == (BF16,)
        book = fold(order(number, BF16, undo=True), done(number, False), book=book)
    assert book.in_force == ()


def test_an_undo_that_fails_for_want_of_memory_is_tried_again_as_often_as_need_be() -> None:
    facts = MemoryFacts(book=fold(order(0, BF16), done(0)), report=report())
    for number in range(1, 3 * MAX_FAILED_UNDOS):
        facts.fold_order(order(number, BF16, undo=True), 0.0)
        facts.fold_done(done(number, False))
        facts.fold_report(report(step=number, shortages=number), batch_sequences=8)
        assert facts.book.in_force == (BF16,)


def test_after_a_start_of_the_trainer_one_failed_undo_ends_the_matter() -> None:
    book = order_book.trainer_started(fold(order(0, BF16), done(0)))
    assert book.doubtful == {BF16}
    assert fold(order(1, BF16), done(1), book=book).doubtful == frozenset()
    assert fold(order(1, BF16, undo=True), done(1, False), book=book).in_force == ()


def test_halvings_are_those_that_the_trainer_reports() -> None:
    assert fold(report(micro_batch=2)).in_force == (HALVE, HALVE)
    book = fold(order(1, HALVE), done(1), order(2, BF16), done(2))
    assert fold(report(micro_batch=8), book=book).in_force == (BF16,)
    assert fold(report(micro_batch=1), book=book).in_force == (HALVE, BF16, HALVE, HALVE)
    under_way = fold(order(3, HALVE), report(micro_batch=8), book=book)
    assert under_way.in_force == (HALVE, BF16)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 14))
def test_halvings_are_read_from_the_micro_batch_as_the_trainer_cuts_it(batch: int, halvings: int) -> None:
    def cut(count: int) -> int:
        return max(1, -(-batch // 2**count))  # trainer_node/memory_state.py

    found = order_book.halvings_of(cut(halvings), batch)
    assert cut(found) == cut(halvings)
    assert found <= halvings


def test_only_emergency_checkpoints_count_for_the_cooldown() -> None:
    request = CheckpointRequest(request_id="1.1", emergency=True, reason="")
    assert order_book.ordered(OrderBook(), request, at_seconds=7.0).checkpoint_at_seconds == 7.0
    plain = replace(request, emergency=False)
    assert order_book.ordered(OrderBook(), plain, at_seconds=7.0).checkpoint_at_seconds is None


def thrashing(*reports: MemoryReport) -> bool:
    facts = MemoryFacts()
    for told in reports:
        facts.fold_report(told, batch_sequences=8)
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
        facts.fold_report(report(step=n, retries=n), batch_sequences=8)
    facts.fold_order(order(1, HALVE), 0.0)
    facts.fold_done(done(1))
    assert not facts.is_thrashing


def test_a_trainer_that_starts_does_not_thrash_yet() -> None:
    facts = MemoryFacts()
    for n in range(3):
        facts.fold_report(report(step=n, retries=n), batch_sequences=8)
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


def test_last_resorts_of_the_trainer_itself_can_be_taken_back() -> None:
    facts = MemoryFacts()
    facts.fold_report(report(step=1, micro_batch=1), batch_sequences=1)
    assert facts.book.in_force == ()
    facts.fold_report(report(step=2, micro_batch=1, shortages=1), batch_sequences=1)
    assert set(facts.book.in_force) == {OFF, RECOMPUTE} == facts.book.doubtful
