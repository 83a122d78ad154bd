"""Follows all streams of a run and brings them into one file.

Reads without a group, from the last ids that the file holds, so a recorder that died goes on
where it was. Outlives a bus that is away and a disk that is full: what it cannot write it does
not read, and the streams keep it. A damaged entry is left out: the recording then has a gap, and
says so on replay. Decides nothing and looks into no message.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.bus import DAMAGED, STREAM_START, Bus, Entry
from common.clock import Clock
from common.errors import BodyTooLarge, BusError, BusUnavailable, CodecError, EnvironmentFault
from common.publisher import Backoff
from common.recording_writer import RecordingWriter

BATCH_ENTRIES = 500  # per stream; read + unpack in 500s reaches 377 k entries/s (systems.md 1.6)
BLOCK_SECONDS = 0.5  # how late `run` notices `stop`


@dataclass(frozen=True, kw_only=True, slots=True)
class RecorderCounters:
    recorded: int = 0  # since this recorder started
    too_large: int = 0  # entries left out because no reader would take them
    damaged: int = 0  # entries left out because they are not what their writer sent
    disconnects: int = 0
    failed_writes: int = 0


class Recorder:
    """`run` until told, then `drain` and `seal`. Not thread-safe."""

    def __init__(
        self,
        bus: Bus,
        writer: RecordingWriter,
        streams: Sequence[str],
        *,
        clock: Clock,
        sync_seconds: float = 1.0,
        on_error: Callable[[Exception], None] = lambda error: None,
        rng: random.Random | None = None,
    ) -> None:
        """`sync_seconds` is what a power cut may cost; `on_error` hears of every lost bus or full disk."""
        self._bus = bus
        self._writer = writer
        self._positions = {stream: writer.last_ids.get(stream, STREAM_START) for stream in streams}
        self._clock = clock
        self._sync_seconds = sync_seconds
        self._next_sync_seconds = clock.monotonic() + sync_seconds
        self._on_error = on_error
        self._backoff = Backoff(rng or random.Random())
        self._counters = RecorderCounters()

    @property
    def counters(self) -> RecorderCounters:
        return self._counters

    def run(self, stop: threading.Event) -> None:
        """Record until `stop`. Raises BusRefused; outlives everything else."""
        while not stop.is_set():
            self.run_once(BLOCK_SECONDS)

    def run_once(self, block_seconds: float) -> int:
        """Record one batch; how many entries. Pauses, by the clock, when bus or disk fails."""
        try:
            if self._writer.waiting_bytes:
                self._writer.flush(sync=False)  # failed before: nothing new until it is in the file
            num_entries = self._read(block_seconds)
            self._flush_when_due()
        except BusUnavailable as error:
            self._count(disconnects=1)
            self._pause(error)
            return 0
        except BusError:
            raise
        except EnvironmentFault as error:  # the disk
            self._count(failed_writes=1)
            self._pause(error)
            return 0
        self._backoff.reset()
        return num_entries

    def drain(self) -> int:
        """Record what is on the streams now; how many entries. Gives up quietly when the bus is away.

        Raises EnvironmentFault when the disk refuses it.
        """
        recorded = self._counters.recorded
        try:
            targets = {stream: self._bus.last_id(stream) for stream in self._positions}
            while any(self._positions[stream] < target for stream, target in targets.items()):
                if not self._read(0.0):
                    break
                self._writer.flush(sync=False)
        except BusUnavailable as error:
            self._on_error(error)
        self._writer.flush()
        return self._counters.recorded - recorded

    def seal(self) -> None:
        """End the file with its digest. Raises EnvironmentFault."""
        self._writer.seal()

    def _read(self, block_seconds: float) -> int:
        entries = self._bus.read_after(self._positions, max_count=BATCH_ENTRIES, block_seconds=block_seconds)
        for entry in entries:
            self._record(entry)
        return len(entries)

    def _record(self, entry: Entry) -> None:
        try:
            if entry.kind == DAMAGED:
                raise CodecError(
                    f"{entry.stream} {entry.id} is damaged on the server; the recording lacks it"
                )
            self._count(recorded=int(self._writer.append(entry)))
        except CodecError as error:
            too_large = isinstance(error, BodyTooLarge)
            self._count(too_large=int(too_large), damaged=int(not too_large))
            self._on_error(error)
        self._positions[entry.stream] = entry.id

    def _flush_when_due(self) -> None:
        due = self._clock.monotonic() >= self._next_sync_seconds
        self._writer.flush(sync=due)
        if due:
            self._next_sync_seconds = self._clock.monotonic() + self._sync_seconds

    def _pause(self, error: Exception) -> None:
        self._on_error(error)
        self._clock.sleep(self._backoff.next_seconds())

    def _count(self, **more: int) -> None:
        changes = {name: getattr(self._counters, name) + number for name, number in more.items()}
        self._counters = dataclasses.replace(self._counters, **changes)
