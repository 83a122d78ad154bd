"""Time as an argument. Nothing below `main` asks the operating system for the time.

SystemClock is wall time, CoreClock that of the processor; FakeClock is moved by tests. Durations that go into
messages come from trainer_node/ledger.py, which counts work instead of seconds in lockstep runs.
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


class CoreClock(SystemClock):
    """Seconds that this process has had a core: for one thread on an idle machine the same as wall time,
    and on a shared one still what the work costs."""

    def monotonic(self) -> float:
        return time.process_time()


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
