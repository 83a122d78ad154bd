"""A thread that says twice a second that this node lives, where it is and what it counts.

Puts Heartbeat messages into an outbox, which never blocks. Never raises: a status that cannot be
told leaves the last one standing, counted as `status_errors`. Beats once at the start and once,
as "stopping", on close. Decides nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from common.clock import Clock
from common.messages import Heartbeat, Message, Metric


class MessageSink(Protocol):
    def put(self, message: Message) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeStatus:
    state: str  # "starting", "running", "stopping"
    step: int  # last step this node knows of
    counters: tuple[Metric, ...] = ()


class Heartbeats:
    """Beats from construction to `close`. `status` is called from the thread."""

    def __init__(
        self,
        outbox: MessageSink,
        *,
        node: str,
        generation: int,
        seconds: float,
        status: Callable[[], NodeStatus],
        clock: Clock,
    ) -> None:
        self._outbox = outbox
        self._node = node
        self._generation = generation
        self._seconds = seconds
        self._status = status
        self._clock = clock
        self._started_seconds = clock.monotonic()
        self._last_status = NodeStatus(state="starting", step=0)
        self._status_errors = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Last beat, then the end of the thread. May be called again."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        self._beat()
        while not self._closed.wait(self._seconds):
            self._beat()
        self._beat(state="stopping")

    def _beat(self, state: str = "") -> None:
        try:
            self._last_status = self._status()
        except Exception:  # a node whose counters cannot be read is still alive
            self._status_errors += 1
        status = self._last_status
        counters = status.counters
        if self._status_errors:
            counters += (Metric(name="status_errors", value=float(self._status_errors), unit="1"),)
        heartbeat = Heartbeat(
            node=self._node,
            generation=self._generation,
            process_id=os.getpid(),
            state=state or status.state,
            step=status.step,
            uptime_seconds=self._clock.monotonic() - self._started_seconds,
            counters=counters,
        )
        self._outbox.put(heartbeat)
