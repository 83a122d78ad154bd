"""Records a run into one file: by itself (`monitor-node record`) or beside a serving monitor.

Owns when a recording begins and ends; common/recorder.py does the work on a bus connection of its
own. Beside a monitor a recording that fails is told to people and the monitor goes on: memory has
to be watched whether or not a file can be written.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from common.bus import Bus
from common.clock import Clock
from common.errors import EnvironmentFault, HybridError, RecordingError
from common.log import NodeLog
from common.messages import RunEnded
from common.recorder import Recorder
from common.recording import read_recording
from common.recording_writer import RecordingWriter
from common.streams import HISTORY, STREAMS

_BLOCK_SECONDS = 0.3
_LATE_SECONDS = 1.0  # the other nodes' last words after RunEnded
_STOP_SECONDS = 12.0  # less than what `up` waits for a node; a busy disk takes seconds to sync


def record_run(bus: Bus, run_id: str, file: Path, stop: threading.Event, clock: Clock, log: NodeLog) -> int:
    """Record until the run has ended or `stop`; the number of entries in the sealed file.

    Raises RecordingError when `file` is finished, damaged or of another run, EnvironmentFault when
    server or disk fail. Nothing is written unless the server answers.
    """
    bus.length(HISTORY)
    if file.exists() and file.stat().st_size and read_recording(file).sealed:
        raise RecordingError(f"{file}: is a finished recording; give another file name with --out")
    writer = RecordingWriter(file, run_id=run_id, created_unix_seconds=clock.unix())
    with contextlib.closing(writer):
        recorder = _recorder(bus, writer, clock, log)
        ended_at_seconds: float | None = None
        while not stop.is_set():
            recorder.run_once(_BLOCK_SECONDS)
            ended_at_seconds = (ended_at_seconds or clock.monotonic()) if _has_ended(bus) else None
            if ended_at_seconds is not None and clock.monotonic() - ended_at_seconds >= _LATE_SECONDS:
                break
        recorder.drain()
        recorder.seal()
        return writer.num_entries


@contextlib.contextmanager
def recording_beside(
    open_bus: Callable[[], Bus],
    writer: RecordingWriter,
    clock: Clock,
    log: NodeLog,
    *,
    on_failure: Callable[[str], None],
) -> Iterator[None]:
    """Record in a thread while the body runs, then drain and seal. Never raises for the recording."""
    stop = threading.Event()

    def record() -> None:
        try:
            with contextlib.closing(open_bus()) as bus, contextlib.closing(writer):
                recorder = _recorder(bus, writer, clock, log)
                recorder.run(stop)
                recorder.drain()
                recorder.seal()
                log.event("recorded", file=str(writer.path), entries=writer.num_entries)
        except HybridError as error:
            log.event("recording_failed", level="error", error=str(error))
            on_failure(str(error))

    thread = threading.Thread(target=record, name="recorder", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_STOP_SECONDS)
        if thread.is_alive():
            log.event("recording_not_sealed", level="error", file=str(writer.path))


def _recorder(bus: Bus, writer: RecordingWriter, clock: Clock, log: NodeLog) -> Recorder:
    last_text = ""

    def on_error(error: Exception) -> None:
        nonlocal last_text
        if str(error) != last_text:  # the same fault comes back with every try
            log.event("recording_interrupted", level="warning", error=str(error))
        last_text = str(error)

    return Recorder(bus, writer, tuple(STREAMS), clock=clock, on_error=on_error)


def _has_ended(bus: Bus) -> bool:
    with contextlib.suppress(EnvironmentFault):
        newest = bus.latest(HISTORY)
        return newest is not None and newest.kind == RunEnded.__name__
    return False
