"""Runs of several arms made at the same time in one process, taking turns every few steps: to be timed.

A virtual machine is not the same from minute to minute: equal runs made one after the other differed by up
to 15 %, and the median of ten ratios by 2 %, which is as much as is to be seen. Arms that take turns of a
tenth of a second meet the same machine, and one core of it: on two, equal runs differed by 1 to 3 % (lab log,
2026-11-22). Only the holder of the baton works; each thread's clock counts the time that its own thread had
a core, so runs must be of one thread on a CPU. Torch's random state changes hands with the baton. Changes
nothing of what a run computes (tests/race/test_together.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from common.clock import SystemClock

TURN_STEPS = 8

Result = TypeVar("Result")
Run = Callable[[Callable[[], None]], Result]  # a run that calls what it is given after every step


class ThreadClock(SystemClock):
    """Seconds that the calling thread has had a core."""

    def monotonic(self) -> float:
        return time.thread_time()


class Baton:
    """Goes round among `count` runners, who are numbered from 0; those who have ended are left out."""

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._runners, self._holder = list(range(count)), 0

    def take(self, runner: int) -> None:
        """Wait for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._runners[self._holder] == runner)

    def pass_on(self, runner: int) -> None:
        """To the next, and wait until it comes round again."""
        if len(self._runners) > 1:
            random_state = torch.get_rng_state()
            with self._changed:
                self._holder = (self._holder + 1) % len(self._runners)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._runners[self._holder] == runner)
            torch.set_rng_state(random_state)

    def drop_out(self, runner: int) -> None:
        """Never to take it again. Only its holder may."""
        with self._changed:
            self._runners.remove(runner)
            self._holder = self._holder % len(self._runners) if self._runners else 0
            self._changed.notify_all()


def run_together(runs: Sequence[Run[Result]]) -> list[Result]:
    """Their results, in order. Raises the first exception of a run once all have ended."""
    baton, results, errors = Baton(len(runs)), dict[int, Result](), dict[int, BaseException]()

    def work(runner: int, run: Run[Result]) -> None:
        steps = 0

        def after_step() -> None:
            nonlocal steps
            steps += 1
            if steps % TURN_STEPS == 0:
                baton.pass_on(runner)

        with _holding(baton, runner):
            try:
                results[runner] = run(after_step)
            except BaseException as error:
                errors[runner] = error

    threads = [threading.Thread(target=work, args=each, daemon=True) for each in enumerate(runs)]
    with one_core():
        for thread in threads:  # a thread keeps to the cores of the one that starts it
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[runner] for runner in range(len(runs))]


@contextmanager
def one_core() -> Iterator[None]:
    """The calling thread keeps to one of its cores, where the system lets it choose (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # interrupts mostly go to the first
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def _holding(baton: Baton, runner: int) -> Iterator[None]:
    baton.take(runner)
    try:
        yield
    finally:
        baton.drop_out(runner)
