"""The trainer's account of its time: shares, verdicts, and what a long run keeps of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import monitor_node.page
from common import messages as m
from monitor_node.timing import (
    BOUND_SHARE,
    MAX_ACCOUNTS,
    NOTHING_SPENT,
    PURPOSES,
    Account,
    TimeBook,
    account_of,
    shares_between,
    timing_section,
    verdict_of,
)
from tests.monitor import fake_run as fake


def told(step: int, total_seconds: float, *, generation: int = 1, lost_steps: int = 0, **seconds: float):
    found = account_of(
        fake.account(
            step, total_seconds=total_seconds, generation=generation, lost_steps=lost_steps, **seconds
        )
    )
    assert found is not None
    return found


def book_of(*accounts: Account) -> TimeBook:
    book = TimeBook()
    for account in accounts:
        book.add(account)
    return book


SECONDS = st.dictionaries(st.sampled_from(PURPOSES), st.floats(0.0, 1e6))


@given(SECONDS, SECONDS, st.floats(0.0, 1e7), st.floats(0.0, 1e7))
def test_shares_are_of_one_whole_whatever_is_told(
    before: dict[str, float], more: dict[str, float], total: float, more_total: float
) -> None:
    after = {name: before.get(name, 0.0) + more.get(name, 0.0) for name in {*before, *more}}
    older = Account(step=0, generation=1, total_seconds=total, seconds=before, lost_steps=0)
    newer = Account(step=9, generation=1, total_seconds=total + more_total, seconds=after, lost_steps=0)
    shares = shares_between(older, newer)
    if shares:
        assert all(share >= 0.0 for share in shares.values())
        assert sum(shares.values()) == pytest.approx(1.0)
    else:
        assert newer.of("steps") <= older.of("steps")


def test_data_is_a_part_of_a_step_and_not_beside_it() -> None:
    shares = shares_between(
        NOTHING_SPENT, told(9, 10.0, steps=8.0, data=3.0, corrections=1.0, evaluation=1.0)
    )
    assert shares["compute"] == pytest.approx(0.4)
    assert shares["data"] == pytest.approx(0.3)
    assert shares["verification"] == pytest.approx(0.1)  # a correction is spent on the jump
    assert shares["evaluation"] == pytest.approx(0.1)
    assert shares["other"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        ({"steps": 9.0, "data": 0.5}, "compute-bound"),
        ({"steps": 9.0, "data": 4.0}, "input-bound"),
        ({"steps": 6.0, "verification": 2.0, "snapshots": 1.5}, "verification-bound"),
        ({"steps": 6.0, "checkpoints": 3.0}, "checkpoint-bound"),
        ({"steps": 6.0, "waiting": 3.0}, "waiting-bound"),
        ({"steps": 4.0}, None),  # most of the time is nobody's
        ({"evaluation": 4.0}, None),  # before the first step
    ],
)
def test_the_verdict_names_what_to_look_at_first(seconds: dict[str, float], verdict: str | None) -> None:
    section = timing_section(book_of(told(9, 10.0, **seconds)))
    assert section["verdict"] == verdict
    if verdict:
        assert section["words"].lower().startswith(verdict)


@given(st.floats(0.0, 0.99))
def test_a_share_below_the_bound_gets_no_verdict_of_its_own(data_share: float) -> None:
    verdict = verdict_of(shares_between(NOTHING_SPENT, told(9, 10.0, steps=10.0, data=10.0 * data_share)))
    assert (verdict == "input-bound") == (data_share >= BOUND_SHARE)


def test_the_shares_are_of_the_last_minutes() -> None:
    slow_start = told(100, 1000.0, steps=100.0, evaluation=900.0)
    later = [told(100 + n, 1000.0 + 10 * n, steps=100.0 + 10 * n, evaluation=900.0) for n in range(1, 31)]
    assert timing_section(book_of(slow_start, *later))["shares"]["evaluation"] == 0.0
    assert timing_section(book_of(slow_start))["shares"]["evaluation"] == 0.9


def test_nothing_is_known_before_the_first_account() -> None:
    section = timing_section(TimeBook())
    assert section["shares"] == {}
    assert section["verdict"] is None
    assert "Not known yet" in section["words"]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0, 1e300])
@pytest.mark.parametrize("name", ["wall_seconds_total", "wall_seconds_data", "generation", "lost_steps"])
def test_an_account_that_is_no_number_is_none(name: str, value: float | None) -> None:
    sample = fake.account(5, total_seconds=9.0, steps=8.0, data=1.0)
    metrics = tuple(replace(x, value=value) if x.name == name else x for x in sample.metrics)
    found = account_of(replace(sample, metrics=metrics))
    if (name, value) == ("wall_seconds_data", None):
        assert found is not None
        assert found.of("data") == 0.0  # a purpose that is not told has taken nothing
    else:
        assert found is None
    assert account_of(m.HealthSample(node="trainer", step=5, metrics=())) is None


def test_a_newer_start_of_the_trainer_begins_a_new_book_and_an_older_one_is_left_out() -> None:
    first, second = told(50, 60.0), told(40, 50.0, generation=2)
    assert book_of(first, second).accounts == [second]
    assert book_of(second, first).accounts == [second]


def test_a_rollback_forgets_the_steps_and_keeps_the_time() -> None:
    accounts = [told(0, 1.0), told(50, 60.0), told(100, 120.0), told(60, 150.0)]
    assert [a.step for a in book_of(*accounts).accounts] == [0, 50, 60]


OLDER_OR_NEWER = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 5000), st.integers(1, 3)), min_size=1, max_size=400
)


@settings(max_examples=60, deadline=None)
@given(OLDER_OR_NEWER)
def test_a_book_is_bounded_and_in_order_whatever_comes(samples: list[tuple[int, int, int]]) -> None:
    book = TimeBook()
    for step, total, generation in samples:
        book.add(told(step, float(total), generation=generation))
        assert len(book.accounts) <= MAX_ACCOUNTS
    accounts = book.accounts
    assert accounts == sorted(accounts, key=lambda a: a.total_seconds)
    assert [a.step for a in accounts] == sorted(a.step for a in accounts)
    assert {a.generation for a in accounts} <= {max(generation for *_, generation in samples)}


def test_of_a_long_run_the_first_and_the_newest_accounts_are_kept() -> None:
    book = book_of(*(told(step, float(step + 1)) for step in range(5000)))
    steps = [a.step for a in book.accounts]
    assert len(steps) <= MAX_ACCOUNTS
    assert steps[0] == 0
    assert steps[-20:] == list(range(4980, 5000))


def test_the_page_has_a_colour_of_its_own_for_every_purpose() -> None:
    """A bar that colours by rank would change them as the shares change."""
    page = Path(monitor_node.page.__file__).parent
    listed = re.search(r"const PURPOSES = \[(.*?)\];", (page / "timing.js").read_text("utf-8"), re.DOTALL)
    assert listed is not None
    purposes = re.findall(r'"(\w+)"', listed[1])
    assert set(purposes) == set(shares_between(told(0, 1.0), told(10, 9.0, steps=5.0)))
    style = (page / "style.css").read_text("utf-8")
    for theme in style.split("prefers-color-scheme: dark")[:2]:
        colours = re.findall(r"--c(\d+): (#\w+)", theme.split("* {")[0])
        assert len({colour for _, colour in colours}) == len(purposes) == len(colours)
