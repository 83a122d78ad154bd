"""Time as an argument. Nothing below `main` asks the operating system for the time.

SystemClock is wall time. CountedClock is the clock of lockstep runs: it moves only when work is
done, by the forward-equivalents of that work (forward 1, training step 3), so that every duration
inside a message, and therefore everything that learns from messages, is reproducible.
FakeClock is moved by tests.
"""

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since an arbitrary origin; never goes back."""
        ...

    def unix(self) -> float:
        """Seconds since 1970-01-01 UTC; may jump."""
        ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def monotonic(self) -> float:
        return time.perf_counter()

    def unix(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class FakeClock:
    """Moves only by `advance` and `sleep`."""

    def __init__(self, start_seconds: float = 0.0) -> None:
        self._now_seconds = start_seconds

    def monotonic(self) -> float:
        return self._now_seconds

    def unix(self) -> float:
        return self._now_seconds

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"a clock cannot go back ({seconds} s)")
        self._now_seconds += seconds


class Stopwatch:
    """Durations for messages: wall time, or forward-equivalents when `counted` is true.

    `measure(passes)` is told how many forward-equivalents the work stands for; a wall stopwatch
    ignores it, a counted one ignores the wall. One counted forward pass is one "second".
    """

    def __init__(self, clock: Clock, *, counted: bool) -> None:
        self._clock = clock
        self._counted = counted
        self._last_seconds = clock.monotonic()

    def restart(self) -> None:
        self._last_seconds = self._clock.monotonic()

    def lap(self, *, passes: float) -> float:
        """Seconds since the last lap or restart."""
        now_seconds = self._clock.monotonic()
        elapsed_seconds = now_seconds - self._last_seconds
        self._last_seconds = now_seconds
        return passes if self._counted else elapsed_seconds
