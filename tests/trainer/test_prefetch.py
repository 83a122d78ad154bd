"""Batches made in advance are the batches that would have been made: in any order, whatever was guessed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from trainer_node.data import TextBatches
from trainer_node.prefetch import Ahead

CPU = torch.device("cpu")
# Forwards, the same again (a batch that did not fit), back (a refused jump), far ahead (a resume), before 0.
WALKS = {
    "forwards": list(range(12)),
    "again": [0, 1, 1, 1, 2, 3],
    "back": [0, 1, 2, 3, 4, 2, 3, 4, 5],
    "far ahead": [0, 1, 500, 501, 502, 3],
    "backwards": [9, 8, 7, 6],
}


def text(ahead: int) -> TextBatches:
    tokens = np.random.default_rng(0).integers(0, 250, 1500).astype(np.uint16)
    shapes = {"sequences": 4, "context_tokens": 16, "seed": 3, "guard_batches": 2}
    return TextBatches(tokens, device=CPU, ahead=ahead, **shapes)


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_every_walk_over_the_batches_gives_the_batches_of_its_positions(walk: list[int]) -> None:
    plain, early = text(0), text(3)  # 22 windows: epochs end within the walk
    for position in walk:
        expected, found = plain.batch(position), early.batch(position)
        assert torch.equal(found.inputs, expected.inputs)
        assert torch.equal(found.targets, expected.targets)


def test_the_next_batches_are_made_by_another_thread_and_each_once() -> None:
    makers: list[tuple[int, str]] = []
    made = threading.Semaphore(0)

    def make(position: int) -> int:
        makers.append((position, threading.current_thread().name))
        made.release()
        return position

    ahead = Ahead(make, depth=2)
    for position in range(10):
        assert ahead.at(position) == position
    for _ in range(12):  # 0 to 9, and two that nobody has asked for yet
        assert made.acquire(timeout=10.0)
    assert sorted(position for position, _ in makers) == list(range(12))
    here = threading.current_thread().name
    assert [position for position, name in makers if name == here] == [0]


def test_an_error_is_raised_where_its_position_is_asked_for() -> None:
    def make(position: int) -> int:
        if position == 2:
            raise ValueError("no batch 2")
        return position

    ahead = Ahead(make, depth=2)
    assert [ahead.at(0), ahead.at(1)] == [0, 1]
    with pytest.raises(ValueError, match="no batch 2"):
        ahead.at(2)
    assert [ahead.at(3), ahead.at(4)] == [3, 4]


def test_what_was_guessed_wrong_is_not_kept() -> None:
    ahead = Ahead(lambda position: bytes(10), depth=3)
    for position in (0, 100, 7, 7, 50):
        ahead.at(position)
        assert set(ahead._coming) == {position + 1, position + 2, position + 3}


def test_only_a_gpu_has_a_thread_unless_it_is_asked_for() -> None:
    tokens = np.zeros(1500, np.uint16)
    batches = TextBatches(tokens, sequences=4, context_tokens=16, seed=0, guard_batches=1, device=CPU)
    assert batches._ahead is None
