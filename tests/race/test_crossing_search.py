"""The search over planned lengths finds what trying all of them would find."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_node.race.crossing_search import Ask, Found, Lattice, Missed, bracket, search

LOW, HIGH = -20, 12
INDICES = range(LOW, HIGH + 1)


def searched(verdict: Callable[[int], bool]) -> tuple[Found | Missed, dict[int, bool]]:
    known: dict[int, bool] = {}
    while isinstance(state := search(known, LOW, HIGH), Ask):
        assert state.k not in known
        assert LOW <= state.k <= HIGH
        known[state.k] = verdict(state.k)
    return state, known


@pytest.mark.parametrize("first", range(LOW, HIGH + 2))
def test_on_a_monotone_curve_the_search_equals_brute_force(first: int) -> None:
    state, known = searched(lambda k: k >= first)
    expected = next((k for k in INDICES if k >= first), None)
    assert state == (Missed() if expected is None else Found(expected))
    distance = abs(first if expected is not None else HIGH)
    assert len(known) <= 2 * distance.bit_length() + 2


@given(st.lists(st.booleans(), min_size=len(INDICES), max_size=len(INDICES)))
def test_on_a_noisy_curve_the_answer_lies_between_the_first_pass_and_the_end_of_failures(
    verdicts: list[bool],
) -> None:
    passes = dict(zip(INDICES, verdicts, strict=True))
    state, known = searched(passes.__getitem__)
    after_failures = max((k for k in INDICES if not passes[k]), default=LOW - 1) + 1
    if isinstance(state, Missed):
        assert not passes[HIGH]
        return
    assert passes[state.k]
    assert state.k == LOW or not passes[state.k - 1]
    assert min(k for k in INDICES if passes[k]) <= state.k <= after_failures
    assert not any(known[k] for k in known if k < state.k)


@given(
    st.lists(st.booleans(), min_size=len(INDICES), max_size=len(INDICES)), st.sets(st.sampled_from(INDICES))
)
def test_verdicts_known_for_other_reasons_do_not_change_the_answer(
    verdicts: list[bool], others: set[int]
) -> None:
    passes = dict(zip(INDICES, verdicts, strict=True))
    alone, _ = searched(passes.__getitem__)
    known = {k: passes[k] for k in others}
    while isinstance(state := search(known, LOW, HIGH), Ask):
        known[state.k] = passes[state.k]
    assert state == alone


@given(st.integers(1, 5000), st.floats(1.02, 1.5))
def test_the_lattice_rises_strictly_and_ends_below_its_cap(base_steps: int, ratio: float) -> None:
    lattice = Lattice(base_steps, ratio=ratio)
    lengths = [lattice.steps(k) for k in range(lattice.low, 1)]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == base_steps
    assert lattice.steps(lattice.high) <= lattice.longest_steps + 1
    assert base_steps * ratio ** (lattice.high + 1) > lattice.longest * base_steps


@given(st.lists(st.integers(LOW - 3, HIGH + 3), min_size=1, max_size=6))
def test_a_bracket_places_every_seed_or_reaches_the_ends_of_the_lattice(firsts: list[int]) -> None:
    seeds = set(range(len(firsts)))

    def passing_at(k: int) -> set[int]:
        return {seed for seed in seeds if k >= firsts[seed]}

    state, known = searched(lambda k: 2 * len(passing_at(k)) >= len(seeds))
    if isinstance(state, Missed):
        return
    passing = {k: passing_at(k) for k in known}
    while (ask := bracket(passing, seeds, state.k, LOW, HIGH)) is not None:
        assert ask.k not in passing
        passing[ask.k] = passing_at(ask.k)
    for seed in seeds:
        assert any(seed in those for those in passing.values()) or HIGH in passing
        assert seed not in passing[min(passing)] or LOW in passing
