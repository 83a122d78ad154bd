"""The monitor: follows every stream of a run, samples memory, gives orders, feeds the page.

Thin shell around pure parts: run_view folds, enforcer decides, liveness judges. Reads with
`read_after` from the start of the streams, so it acknowledges nothing and delays nobody. When the
server is away it goes on sampling, and calls nobody lost before it has been able to read again.
Its settings come from the run itself (RunStarted); until that was read, the defaults hold.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from common import messages as m
from common.bus import Bus, EntryId
from common.clock import Clock
from common.errors import BusError, Fenced
from common.heartbeat import Heartbeats, NodeStatus
from common.log import NodeLog
from common.streams import MONITOR
from monitor_node.actions import PAUSE_REASON, ActionQueue, Operator, act
from monitor_node.checkpoint_checks import CheckpointChecks
from monitor_node.device import Device
from monitor_node.divergence import DivergenceState
from monitor_node.enforcer import (
    EnforcerState,
    Seen,
    Setting,
    enforce,
    object_to_divergence,
    pause_for_operator,
)
from monitor_node.feed import Feed
from monitor_node.health import HealthWatch
from monitor_node.provenance import ProvenanceReader
from monitor_node.run_reader import RunReader, new_view, stream_lengths
from monitor_node.run_view import AlertRow
from monitor_node.snapshot import as_dict
from monitor_node.thresholds import LevelState

_BLOCK_SECONDS = 0.2
# Between two snapshots, and the share of a core that making them may take. While somebody looks, what happens
# is to be seen within a quarter of a second; else the whole monitor is to stay below 3 % of a core.
# Never later than the longest, though: on a busy machine all that is made seems dear.
_FEED_SECONDS, _FEED_SHARE, _LONGEST_FEED_SECONDS = 0.25, 0.01, 2.0
_WATCHED_FEED_SECONDS, _WATCHED_FEED_SHARE, _LONGEST_WATCHED_FEED_SECONDS = 0.08, 0.12, 0.12
_DISK_SECONDS = 1.0
_GATHER_SECONDS = 0.5  # unwatched, what came in is read together: a read costs about 1 ms
_LENGTHS_SECONDS = 5.0
_DRAIN_SECONDS = 2.0


class Outlet(Protocol):
    """What the node needs of common.outbox.Outbox."""

    @property
    def fenced(self) -> bool: ...
    def put(self, message: m.Message) -> None: ...
    def close(self, deadline_seconds: float) -> bool: ...


class MonitorNode:
    """`turn` does one round of everything that is due; `run` repeats it until told to stop."""

    def __init__(
        self,
        *,
        bus: Bus,
        outbox: Outlet,
        run_id: str,
        generation: int,
        clock: Clock,
        choose_device: Callable[[str], Device],
        feed: Feed,
        log: NodeLog,
        recorded_up_to: Callable[[], EntryId | None] = lambda: None,
        actions: ActionQueue | None = None,
        run_folder: Path | None = None,
        tell_alert: Callable[[AlertRow], None] = lambda row: None,
    ) -> None:
        """`actions`: None = nobody may ask for any. `run_folder`: of the run, if it is on this machine."""
        self.view = new_view(run_id)
        self._reader = RunReader(bus, self.view, clock, tell=tell_alert)
        self._actions = actions
        self._operator = Operator()
        self._checks, self._provenance = CheckpointChecks(run_folder), ProvenanceReader(run_folder)
        self._bus = bus
        self._outbox = outbox
        self._generation = generation
        self._clock = clock
        self._choose_device = choose_device
        self._device: Device | None = None
        self._device_preference = ""
        self._feed = feed
        self._log = log
        self._recorded_up_to = recorded_up_to
        self._enforcer = EnforcerState()
        self._told_excursions = 0
        self._health = HealthWatch()
        self._due_seconds: dict[str, float] = {}
        self._feed_due_seconds = clock.monotonic()
        self._viewers_before = 0
        self._away_since_seconds: float | None = None

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set. Raises Fenced when a newer monitor took over."""
        heartbeats = Heartbeats(
            self._outbox,
            node=MONITOR,
            generation=self._generation,
            seconds=self.view.settings.monitor.heartbeat_seconds,
            status=self._status,
            clock=self._clock,
        )
        try:
            while not stop.is_set():
                self.turn(block_seconds=self._block_seconds())
                if self._reader.caught_up and not self._feed.viewers:
                    stop.wait(_GATHER_SECONDS)
        finally:
            heartbeats.close()
            self._outbox.close(_DRAIN_SECONDS)

    def _status(self) -> NodeStatus:
        """With a recording, also up to where the history is on disk: the trainer may trim below it."""
        saved = self._recorded_up_to()
        counters = () if saved is None else (
            m.Metric(name="saved_generation", value=float(saved.generation), unit="1"),
            m.Metric(name="saved_sequence", value=float(saved.sequence), unit="1"),
        )  # fmt: skip
        return NodeStatus(state="running", step=self.view.step, counters=counters)

    def turn(self, *, block_seconds: float) -> None:
        self._read(block_seconds)
        if self._outbox.fenced:
            raise Fenced(f"a newer monitor watches run {self.view.run_id}; this one stops")
        if self._reader.caught_up:
            sample_seconds = self.view.settings.monitor.sample_seconds
            if self.view.ended is not None:  # nobody needs the memory any more
                self._enforcer = replace(self._enforcer, memory_reason="")
            elif self._is_due("sample", sample_seconds):
                self._sample()
            self._obey()
            self._object_to_divergence()
            if self._away_since_seconds is None:
                self._tell_changes()
            if self._is_due("disk", _DISK_SECONDS):
                self._look_at_disk()
        has_come = self._feed.viewers > self._viewers_before
        self._viewers_before = self._feed.viewers
        if has_come or self._clock.monotonic() >= self._feed_due_seconds:
            self._publish_snapshot()

    def _read(self, block_seconds: float) -> None:
        self._reader.read(block_seconds=block_seconds)
        now_seconds = self._clock.monotonic()
        if not self._reader.follower.connected:
            if self._away_since_seconds is None:
                self._away_since_seconds = now_seconds
                self._log.event("server_away", level="warning", error=self._reader.follower.last_error)
            return
        if self._away_since_seconds is not None:
            self._log.event("server_back", away_seconds=round(now_seconds - self._away_since_seconds, 1))
            self._away_since_seconds = None
            self.view.watch.readable(since_seconds=now_seconds)
        if self._is_due("lengths", _LENGTHS_SECONDS):
            with contextlib.suppress(BusError):  # the next read notices a server that is away
                self.view.stream_lengths = stream_lengths(self._bus)

    def _sample(self) -> None:
        preference = self.view.settings.trainer.device
        if self._device is None:  # the first sample: go on at the level that a monitor before this one left
            self._enforcer = replace(self._enforcer, memory=LevelState(level=self.view.level.level))
        if self._device is None or preference != self._device_preference:
            self._device, self._device_preference = self._choose_device(preference), preference
        if self.view.trainer_process is None and not self._device.is_gpu:
            return  # nothing to measure before the trainer says who it is
        sample = self._device.sample(self.view.trainer_process)
        self._outbox.put(sample)
        now_seconds = self._clock.monotonic()
        seen = Seen(sample=sample, facts=self.view.guard, step=self.view.step, now_seconds=now_seconds)
        self._enforcer, messages = enforce(self._enforcer, seen, self._setting())
        for message in messages:
            self._outbox.put(message)

    def _look_at_disk(self) -> None:
        names = [row.written.name for row in reversed(self.view.checkpoints)]
        self.view.checkpoint_checks = self._checks.look(names)
        self.view.provenance = self._provenance.look()

    def _tell_changes(self) -> None:
        """Of who lives, and of what goes wrong without a node failing."""
        now_seconds = self._clock.monotonic()
        for message in self.view.watch.changes(now_seconds):
            self._outbox.put(message)
        for alert in self._health.changes(self.view, now_seconds):
            self._outbox.put(alert)

    def _object_to_divergence(self) -> None:
        """An Alert for each excursion, and a veto while one lasts: prediction pauses, training never does."""
        found = self.view.divergence
        if found.excursions != self._told_excursions:
            self._told_excursions = found.excursions
            alert = divergence_alert(found)
            if alert is not None and not any(alert == row.alert for row in self.view.alerts):
                self._outbox.put(alert)
        reason = found.critical.text if found.critical is not None and self.view.ended is None else ""
        self._enforcer, messages = object_to_divergence(
            self._enforcer, reason, self._setting(), now_seconds=self._clock.monotonic()
        )
        for message in messages:
            self._outbox.put(message)

    def _obey(self) -> None:
        """What a person asked for on the page. A pause is a veto that lapses if this monitor dies."""
        if self._actions is None:
            return
        asked = self._actions.take()
        if self.view.ended is not None:
            asked = []  # what was asked of an ended run must not reach the one that resumes it
        self._operator, messages = act(
            self._operator, asked, generation=self._generation, step=self.view.step
        )
        reason = PAUSE_REASON if self._operator.is_paused and self.view.ended is None else ""
        self._enforcer, vetoes = pause_for_operator(
            self._enforcer, reason, self._setting(), now_seconds=self._clock.monotonic()
        )
        for message in (*messages, *vetoes):
            self._outbox.put(message)

    def _setting(self) -> Setting:
        is_gpu = self._device is not None and self._device.is_gpu
        return Setting(generation=self._generation, is_gpu=is_gpu, monitor=self.view.settings.monitor)

    def _publish_snapshot(self) -> None:
        now_seconds = self._clock.monotonic()
        snapshot = as_dict(self.view, now_seconds=now_seconds)
        away_seconds = 0.0 if self._away_since_seconds is None else now_seconds - self._away_since_seconds
        snapshot["server"] = {
            "connected": self._away_since_seconds is None,
            "away_seconds": int(away_seconds),
        }
        snapshot["actions"] = {"enabled": self._actions is not None, "paused": self._operator.is_paused}
        self._feed.publish(snapshot)
        cost_seconds = self._clock.monotonic() - now_seconds
        seconds, share, longest_seconds = _FEED_SECONDS, _FEED_SHARE, _LONGEST_FEED_SECONDS
        if self._feed.viewers:
            seconds, share = _WATCHED_FEED_SECONDS, _WATCHED_FEED_SHARE
            longest_seconds = _LONGEST_WATCHED_FEED_SECONDS
        self._feed_due_seconds = now_seconds + min(longest_seconds, max(seconds, cost_seconds / share))

    def _block_seconds(self) -> float:
        """How long to wait for entries: no longer than until the next snapshot is due."""
        return min(_BLOCK_SECONDS, max(0.0, self._feed_due_seconds - self._clock.monotonic()))

    def _is_due(self, what: str, every_seconds: float) -> bool:
        now_seconds = self._clock.monotonic()
        if now_seconds < self._due_seconds.get(what, now_seconds):
            return False
        self._due_seconds[what] = now_seconds + every_seconds
        return True


def divergence_alert(found: DivergenceState) -> m.Alert | None:
    """Of the newest excursion: equal for equal runs, so that a second monitor does not repeat it."""
    signal = found.newest_critical
    if signal is None:
        return None
    text = f"{signal.text}; prediction pauses while this lasts"
    return m.Alert(node=MONITOR, severity="error", kind=signal.kind, text=text, step=found.critical_step)
