"""Counts of streams: holes and repeats are seen, and what nobody says stays unknown."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from common.streams import HISTORY, ORDERS, STREAMS
from monitor_node.stream_health import StreamBook, StreamFacts, stream_rows

NO_FACTS = StreamFacts(entries={}, trainer_step=0, node_steps={}, dead_letters={}, unanswered_orders=0)


def read(*ids: tuple[int, int], stream: str = HISTORY) -> StreamBook:
    book = StreamBook()
    for generation, sequence in ids:
        book.read(stream, generation, sequence)
    return book


def row_of(stream: str, book: StreamBook, facts: StreamFacts = NO_FACTS) -> dict:
    (row,) = (row for row in stream_rows(book, facts) if row["stream"] == stream)
    return row


@given(st.integers(1, 9), st.integers(1, 1000), st.integers(1, 50))
def test_a_stream_without_holes_has_none_wherever_reading_began(
    generation: int, first: int, count: int
) -> None:
    row = row_of(HISTORY, read(*((generation, first + n) for n in range(count))))
    assert (row["gaps"], row["duplicates"], row["fenced"]) == (0, 0, 0)


@given(st.sets(st.integers(1, 60), min_size=1))
def test_every_hole_is_counted_once(kept: set[int]) -> None:
    ids = sorted(kept)
    holes = sum(later - earlier > 1 for earlier, later in itertools.pairwise(ids))
    assert row_of(HISTORY, read(*((1, n) for n in ids)))["gaps"] == holes


def test_a_newer_start_fences_the_older_one_and_numbers_from_one() -> None:
    row = row_of(HISTORY, read((1, 1), (1, 2), (2, 1), (2, 2), (5, 1)))
    assert (row["fenced"], row["gaps"], row["duplicates"]) == (2, 0, 0)
    assert row_of(HISTORY, read((1, 1), (2, 4)))["gaps"] == 1


def test_what_is_read_again_is_a_duplicate_and_no_hole() -> None:
    row = row_of(HISTORY, read((1, 1), (1, 2), (1, 2), (1, 1), (1, 3)))
    assert (row["duplicates"], row["gaps"]) == (2, 0)


def test_what_nobody_says_is_unknown_and_not_zero() -> None:
    for row in stream_rows(StreamBook(), NO_FACTS):
        unknown = {name for name, value in row.items() if value is None}
        known = {"stream", "dead_letters"} | ({"pending"} if row["stream"] == ORDERS else set())
        assert unknown == set(row) - known


def test_lag_is_of_the_reader_of_the_history_and_of_the_writer_of_notes() -> None:
    facts = StreamFacts(
        entries={HISTORY: 7},
        trainer_step=100,
        node_steps={"trainer": 98, "predictor": 60, "monitor": 101},
        dead_letters={HISTORY: 2},
        unanswered_orders=3,
    )
    rows = {row["stream"]: row for row in stream_rows(StreamBook(), facts)}
    assert list(rows) == list(STREAMS)
    assert {name: row["lag_steps"] for name, row in rows.items()} == {
        "history": 40, "decisions": None, "orders": None,
        "notes.trainer": 2, "notes.predictor": 40, "notes.monitor": 0,
    }  # fmt: skip
    assert (rows["history"]["entries"], rows["history"]["dead_letters"]) == (7, 2)
    assert rows["orders"]["pending"] == 3


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(0, 9), st.integers(0, 9))))
def test_no_name_from_a_stream_makes_the_book_grow(ids: list[tuple[str, int, int]]) -> None:
    book = StreamBook()
    for stream, generation, sequence in ids:
        book.read(stream, generation, sequence)
    assert set(book.counts) <= set(STREAMS)
