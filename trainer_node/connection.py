"""One trainer's side of the bus: its generation, outbox, inbox, heartbeats and listeners.

Opens no files of its own but the generation's; what is heard and said elsewhere (metrics, terminal) joins as
a listener. Used by the trainer process (node.py) and by other people's loops (hybrid.py). Touches no weights.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from common import features
from common.bus import Bus, EntryId
from common.clock import SystemClock
from common.config import dump_settings
from common.errors import EnvironmentFault, Fenced
from common.heartbeat import Heartbeats, NodeStatus
from common.messages import Alert, Message, Metric, RunStarted
from common.open_bus import open_bus
from common.outbox import Outbox
from common.publisher import Publisher
from common.settings import RunSettings
from common.streams import HISTORY, TRAINER, notes_of
from trainer_node import run_folder
from trainer_node.assembly import run_started
from trainer_node.cycle import Cycle
from trainer_node.inbox import Inbox
from trainer_node.run_folder import RunFolder

OUTBOX_ENTRIES = 20_000  # about 30 MB; at 10 steps a second, half an hour without a server
LAST_WORDS_SECONDS = 5.0
PREDICTOR_START_SECONDS = 60.0


class Connection:
    """Raises BusError when the server cannot be reached at the start; later it may be away for ever."""

    def __init__(
        self,
        run: RunFolder,
        settings: RunSettings,
        redis_url: str | None,
        open_things: ExitStack,
        stop: threading.Event,
        *,
        step: int = 0,
        saved_generation: int = 0,
    ) -> None:
        """`step` and `saved_generation` are those of the checkpoint that the run goes on from."""
        self._run, self._settings, self._url = run, settings, redis_url
        self._open, self._stop, self.step = open_things, stop, step
        self.fenced: Fenced | None = None
        self.inbox: Inbox | None = None
        self._started: RunStarted | None = None
        self._resets = 0
        self._clock = SystemClock()
        self._bus = self._open_bus()
        at_least = self._newest_generation(saved_generation) + 1
        self.generation = self._bus.next_generation(TRAINER, at_least=at_least)
        publisher = Publisher(
            self._bus, writer=TRAINER, generation=self.generation, clock=self._clock, rng=random.Random()
        )
        self._outbox = Outbox(publisher, capacity=OUTBOX_ENTRIES, on_fenced=self._on_fenced)
        self._listeners: list[Callable[[Message], None]] = [self._outbox.put]

    def _newest_generation(self, saved_generation: int) -> int:
        """That anybody knows of: a server may have lost its counter, a start may have left no checkpoint."""
        written = max(self._bus.last_id(stream).generation for stream in (HISTORY, notes_of(TRAINER)))
        return max(written, saved_generation, run_folder.last_generation(self._run))

    def open_inbox(self) -> Inbox:
        """The live DecisionSource."""
        self.inbox = Inbox(
            self._open_bus(),
            generation=self.generation,
            silent_seconds=self._settings.monitor.silent_seconds,
            stop=self._stop,
            clock=self._clock,
            rng=random.Random(),
            asked_by=lambda: EntryId(self.generation, self._outbox.next_sequences.get(HISTORY, 1) - 1),
        )
        self._open.callback(self.inbox.close)
        return self.inbox

    def wait_for_predictor(self) -> None:
        """In lockstep a run should not begin without it. Raises EnvironmentFault."""
        if self.inbox and not self.inbox.wait_for_predictor(PREDICTOR_START_SECONDS):
            raise EnvironmentFault(
                f"no predictor answered within {PREDICTOR_START_SECONDS:.0f} s and decision_mode is lockstep;"
                " start `predictor-node serve`, or set trainer.decision_mode = live"
            )

    def begin(
        self, cycle: Cycle, *, resumed_from: str, listeners: Sequence[Callable[[Message], None]] = ()
    ) -> None:
        """From here on messages are sent; `listeners` hear all of them too."""
        run_folder.remember_generation(self._run, self.generation)
        self._listeners += listeners
        self._open.callback(self._say_last_words)
        self._started = run_started(
            cycle,
            run_id=self._run.run_id,
            settings_toml=dump_settings(self._settings),
            resumed_from=resumed_from,
            feature_version=features.VERSION,
        )
        self.emit(self._started)
        heartbeats = Heartbeats(
            self._outbox,
            node=TRAINER,
            generation=self.generation,
            seconds=self._settings.monitor.heartbeat_seconds,
            clock=self._clock,
            status=self._status,
        )
        self._open.callback(heartbeats.close)

    def repeat_start_if_lost(self) -> None:
        """A server that lost or trimmed its data no longer says which run this is: say it again."""
        resets = self.inbox.resets + self.inbox.trims if self.inbox else 0
        if resets > self._resets and self._started is not None:
            self._resets = resets
            self.emit(replace(self._started, first_step=self.step))

    def emit(self, message: Message) -> None:
        for listener in self._listeners:
            listener(message)

    def alarm(self, text: str, *, kind: str = "trainer_fault", severity: str = "error") -> None:
        self.emit(Alert(node=TRAINER, severity=severity, kind=kind, text=text, step=self.step))

    @property
    def late(self) -> int:
        """Decisions that came for nothing."""
        return self.inbox.stale if self.inbox else 0

    def _say_last_words(self) -> None:
        """What the server never got is lost with this process: people are told, in terminal and metrics."""
        if not self._outbox.close(LAST_WORDS_SECONDS) and self.fenced is None:
            self.alarm(f"{self._outbox.counters().queued} entries never reached a server", kind="unpublished")

    def _status(self) -> NodeStatus:
        outbox = self._outbox.counters()
        counts = (
            ("outbox_queued", outbox.queued, "entries"),
            ("outbox_dropped_observations", outbox.dropped_observations, "entries"),
            ("outbox_dropped_notes", outbox.dropped_notes, "entries"),
            ("outbox_dropped_points", outbox.dropped_points, "entries"),
            ("outbox_dropped_outcomes", outbox.dropped_outcomes, "entries"),
            ("late_decisions", self.late, "decisions"),
        )
        metrics = tuple(Metric(name=name, value=value, unit=unit) for name, value, unit in counts)
        state = "stopping" if self._stop.is_set() else "running"
        return NodeStatus(state=state, step=self.step, counters=metrics)

    def _open_bus(self) -> Bus:
        bus = open_bus(self._url, self._run.run_id)
        self._open.callback(bus.close)
        return bus

    def _on_fenced(self, error: Fenced) -> None:
        self.fenced = error
        self._stop.set()
