"""What comes to the trainer: decisions, vetoes, orders, and whether the predictor lives.

A thread with a connection of its own keeps the newest of everything; the loop only looks, and at a
decision point waits on a condition for a bounded time. Nothing here raises because a predictor,
monitor or server is away.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable

from common.bus import STREAM_START, Bus, EntryId
from common.clock import Clock
from common.errors import BusError
from common.follower import Follower, decoded
from common.messages import (
    CheckpointRequest,
    DeadLetter,
    Heartbeat,
    MemoryOrder,
    Message,
    Order,
    PhaseDecision,
    PhaseVeto,
    StopRequest,
)
from common.streams import DECISIONS, HISTORY, MONITOR, ORDERS, PREDICTOR, notes_of
from trainer_node.answer_watch import AnswerWatch
from trainer_node.retention import CHECK_SECONDS, Retention

_READ_BLOCK_SECONDS = 0.5
MAX_DECISIONS = 4  # kept for points to come: an honest predictor sends one, and each may be 256 KiB


class Inbox:
    """The live DecisionSource."""

    def __init__(
        self,
        bus: Bus,
        *,
        generation: int,
        silent_seconds: float,
        stop: threading.Event,
        clock: Clock,
        rng: random.Random,
        asked_by: Callable[[], EntryId] = lambda: STREAM_START,
    ) -> None:
        """`generation` is the trainer's: decisions for another one are stale on arrival. Raises BusError.

        `asked_by` tells the newest entry of the history that was handed over: at a decision point, the
        question.
        """
        self._generation, self._silent_seconds, self._stop, self._clock = (
            generation,
            silent_seconds,
            stop,
            clock,
        )
        self.trims = 0  # times that old history was dropped
        self.stale = 0  # decisions that came for nothing: too late, or for another generation
        self._bus = bus
        streams = (DECISIONS, ORDERS, notes_of(PREDICTOR), notes_of(MONITOR))
        self._follower = Follower(bus, streams, clock=clock, rng=rng)
        self._follower.skip_to_end()
        self._news = threading.Condition()  # guards everything below
        self._decisions: dict[tuple[int, int], PhaseDecision] = {}  # by (attempt, step)
        self._asked = (-1, -1)  # the newest decision point that was asked for
        self._veto: PhaseVeto | None = None
        self._veto_until_seconds = 0.0
        self._orders: list[Order] = []
        self._predictor_seen_seconds: float | None = None
        self._asked_by = asked_by
        self._answer = AnswerWatch(grace_seconds=silent_seconds)
        self._is_waiting = False  # in lockstep, without a deadline
        self._retention = Retention()
        self._trim_at_seconds = clock.monotonic() + CHECK_SECONDS
        self._losses = 0  # times that the whole history was gone
        self._newest_known = bus.last_id(HISTORY)  # at the last look for that
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self._thread.start()

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        """See links.DecisionSource. A wait ends early when the run is told to stop."""
        key = (attempt, step)
        deadline = None if seconds is None else self._clock.monotonic() + seconds
        with self._news:
            self._answer.ask(self._asked_by())
            self._is_waiting = deadline is None
            while key not in self._decisions and not self._stop.is_set():
                if deadline is None:
                    if not self._predictor_lives() or self._answer.is_in_vain(self._clock.monotonic()):
                        break
                    self._news.wait(_READ_BLOCK_SECONDS)
                else:
                    left_seconds = deadline - self._clock.monotonic()
                    if left_seconds <= 0:
                        break
                    self._news.wait(left_seconds)
            self._is_waiting = False
            self._answer.end()
            decision = self._decisions.pop(key, None)
            self._asked = key
            self.stale += len(self._decisions)
            self._decisions.clear()
            return decision

    def wait_for_predictor(self, seconds: float) -> bool:
        """Wait for a first sign of life: a lockstep run should not begin without its predictor."""
        with self._news:
            return self._news.wait_for(
                lambda: self._predictor_seen_seconds is not None or self._stop.is_set(), seconds
            )

    def veto(self) -> str | None:
        with self._news:
            veto = self._veto
            in_force = veto is not None and self._clock.monotonic() < self._veto_until_seconds
            return veto.reason if veto is not None and in_force else None

    def take_orders(self) -> list[Order]:
        with self._news:
            orders, self._orders = self._orders, []
            return orders

    @property
    def resets(self) -> int:
        """Times the server was found to have lost its data; one loss may count twice."""
        return self._follower.resets + self._losses

    def close(self) -> None:
        self._closed = True
        self._thread.join(2 * _READ_BLOCK_SECONDS)

    def _predictor_lives(self) -> bool:
        seen = self._predictor_seen_seconds
        return seen is not None and self._clock.monotonic() - seen < self._silent_seconds

    def _run(self) -> None:
        while not self._closed:
            for entry, message in decoded(self._follower.read(_READ_BLOCK_SECONDS)):
                self._take(entry.stream, message)
            if self._clock.monotonic() >= self._trim_at_seconds:
                self._trim_at_seconds = self._clock.monotonic() + CHECK_SECONDS
                self._look_for_a_loss()
                self._trim()
            elif self._newest_known == STREAM_START:
                self._look_for_a_loss()  # until the run has begun
            if self._is_waiting:
                self._look_for_the_question()

    def _take(self, stream: str, message: Message) -> None:
        """A message counts on the stream of its writer only: a predictor gives no orders."""
        with self._news:
            match message:
                case PhaseDecision() if stream == DECISIONS:
                    self._keep(message)
                    self._predictor_seen_seconds = self._clock.monotonic()
                case DeadLetter(stream=unread) if unread == HISTORY and stream == notes_of(PREDICTOR):
                    self._answer.note_dead_letter(message)
                case Heartbeat(node=node) if stream == notes_of(node):
                    self._retention.note(message)
                    if node == PREDICTOR:
                        self._predictor_seen_seconds = self._clock.monotonic()
                        self._answer.note_heartbeat(message, self._predictor_seen_seconds)
                case PhaseVeto() if stream == ORDERS:
                    self._veto = message if message.active else None
                    self._veto_until_seconds = self._clock.monotonic() + message.valid_seconds
                case CheckpointRequest() | MemoryOrder() | StopRequest() if stream == ORDERS:
                    self._orders.append(message)
                case _:
                    return
            self._news.notify_all()

    def _keep(self, decision: PhaseDecision) -> None:
        key = (decision.base_attempt, decision.base_step)  # attempts rise while steps may fall
        if decision.base_generation != self._generation or key <= self._asked:
            self.stale += 1
        else:
            self._decisions[key] = decision
            if len(self._decisions) > MAX_DECISIONS:
                del self._decisions[max(self._decisions)]
                self.stale += 1

    def _look_for_a_loss(self) -> None:
        """A server that is emptied keeps its connections, and ids go on: all that was there is gone."""
        with contextlib.suppress(BusError):
            newest = self._bus.last_id(HISTORY)  # first: emptied in between is seen twice, not never
            oldest = self._bus.read_after({HISTORY: STREAM_START}, max_count=1, block_seconds=0)
            if self._newest_known > STREAM_START and (not oldest or oldest[0].id > self._newest_known):
                self._losses += 1
            self._newest_known = newest

    def _trim(self) -> None:
        """Drop history that everybody has saved. A server that is away is trimmed another time."""
        with contextlib.suppress(BusError):
            below = self._retention.trim_below(self._bus.last_id(HISTORY))
            if below is not None:
                self._bus.trim(HISTORY, below=below)
                self.trims += 1

    def _look_for_the_question(self) -> None:
        """A server that lost its data has lost it too: then nobody will ever answer."""
        with contextlib.suppress(BusError):
            newest = self._bus.last_id(HISTORY)
            with self._news:
                self._answer.note_newest(newest, self._clock.monotonic())
