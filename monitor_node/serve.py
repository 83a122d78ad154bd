"""The monitor as a process: bus, outbox, page and recorder around node.MonitorNode.

Each of the three threads that talk to the server (node, outbox, recorder) has a connection of its
own, because a blocking reader must not hold up a writer. The page is bound before anything else,
so that a port in use is the user's error and not a monitor without a page. Decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.routing import Route

from common.bus import STREAM_START, Bus, EntryId
from common.clock import Clock
from common.errors import BusUnavailable, EnvironmentFault, HybridError, UserError
from common.log import NodeLog
from common.messages import Alert
from common.outbox import Outbox
from common.publisher import Backoff, Publisher
from common.recording_writer import RecordingWriter
from common.streams import HISTORY, MONITOR, ORDERS, notes_of
from monitor_node.actions import ActionQueue, Token
from monitor_node.checkpoint_checks import CheckpointChecks
from monitor_node.device import Device
from monitor_node.feed import Feed
from monitor_node.node import MonitorNode
from monitor_node.provenance import ProvenanceReader
from monitor_node.record import recording_beside
from monitor_node.run_reader import RunReader, lengths_of_run, new_view
from monitor_node.run_view import RunView
from monitor_node.runs import RunsFolder
from monitor_node.runs_server import RunsTable, page_routes
from monitor_node.web import PageServer
from monitor_node.webhook import Webhook

OPEN_SECONDS = 10.0  # for a server that is still starting; afterwards it may be away for ever
OUTBOX_CAPACITY = 2000
WEBHOOK_STOP_SECONDS = 3.0  # for the last alerts; a receiver that hangs must not hold up the end


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a test replaces."""

    clock: Clock
    log: NodeLog
    choose_device: Callable[[str], Device]


@dataclass(frozen=True, kw_only=True)
class PageAddress:
    host: str
    port: int  # 0 = any free one
    file: Path | None  # receives the address really bound


def serve(
    open_bus: Callable[[], Bus],
    run_id: str,
    stop: threading.Event,
    around: Surroundings,
    *,
    page: PageAddress | None,
    record_file: Path | None,
    token: Token | None = None,
    webhook_url: str | None = None,
) -> None:
    """Watch one run until `stop`; with a `token` the page also acts. Raises UserError when the page or the
    webhook cannot be had, BusUnavailable and BusRefused at the start only, Fenced when a newer monitor
    takes over.
    """
    feed = Feed(boot_id=uuid.uuid4().hex[:8])
    actions = ActionQueue() if token is not None and page is not None else None
    with contextlib.ExitStack() as opened:
        if page is not None:
            beside = comparison_routes(record_file, around.clock)
            opened.enter_context(_page(feed, page, around.log, token, actions, beside))
        webhook = None if webhook_url is None else Webhook(webhook_url, run_id, around.log)
        if webhook is not None:
            opened.callback(webhook.close, WEBHOOK_STOP_SECONDS)
        reading, writing = (opened.enter_context(contextlib.closing(open_bus())) for _ in range(2))
        writer, failure = _open_recording(record_file, run_id, around)
        if writer is not None:
            opened.callback(writer.close)
        recorded = {} if writer is None else writer.last_ids
        generation = _next_generation(reading, recorded, stop, around.clock)
        if stop.is_set():
            return
        outbox = Outbox(_publisher(writing, generation, around.clock), capacity=OUTBOX_CAPACITY)

        def tell(failure: str) -> None:
            text = f"the run is not recorded: {failure}"
            outbox.put(Alert(node=MONITOR, severity="error", kind="recording_failed", text=text, step=0))

        if failure:
            tell(failure)
        if writer is not None:
            recording = recording_beside(open_bus, writer, around.clock, around.log, on_failure=tell)
            opened.enter_context(recording)
        node = MonitorNode(
            bus=reading,
            outbox=outbox,
            run_id=run_id,
            generation=generation,
            clock=around.clock,
            choose_device=around.choose_device,
            feed=feed,
            log=around.log,
            recorded_up_to=lambda: writer.last_ids.get(HISTORY) if writer is not None else None,
            actions=actions,
            run_folder=record_file.parent if record_file is not None else None,
            tell_alert=webhook.put if webhook is not None else lambda row: None,
        )
        around.log.event("serving", generation=generation)
        node.run(stop)
        around.log.event("stopped", step=node.view.step)


def read_run(bus: Bus, run_id: str, clock: Clock, *, run_folder: Path | None = None) -> RunView:
    """What the streams say now, and the run's folder where it is given.

    Raises BusUnavailable, BusRefused; EnvironmentFault without such a run.
    """
    lengths = lengths_of_run(bus, run_id)
    view = new_view(run_id)
    reader = RunReader(bus, view, clock)
    while not reader.caught_up:
        reader.read(block_seconds=0.0)
        if not reader.follower.connected:
            raise BusUnavailable(reader.follower.last_error)
    view.stream_lengths = lengths
    names = [row.written.name for row in reversed(view.checkpoints)]
    view.checkpoint_checks = CheckpointChecks(run_folder).look_at_all(names)
    view.provenance = ProvenanceReader(run_folder).look_now()
    return view


def _publisher(bus: Bus, generation: int, clock: Clock) -> Publisher:
    return Publisher(bus, writer=MONITOR, generation=generation, clock=clock, rng=random.Random())


def _open_recording(
    file: Path | None, run_id: str, around: Surroundings
) -> tuple[RecordingWriter | None, str]:
    """The writer, or why there is none. A file that holds the beginning of this run is gone on with:
    the run was resumed, or an earlier monitor was killed.
    """
    if file is None:
        return None, ""
    try:
        _make_folder(file)  # the trainer may not have made the run's folder yet
        return RecordingWriter(file, run_id=run_id, created_unix_seconds=around.clock.unix()), ""
    except HybridError as error:
        around.log.event("recording_failed", level="error", error=str(error))
        return None, str(error)


def _make_folder(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"{file.parent}: cannot be made: {error.strerror}") from None


def _next_generation(bus: Bus, recorded: Mapping[str, EntryId], stop: threading.Event, clock: Clock) -> int:
    """Our fencing number, as soon as the server answers; above all that we ever wrote or recorded."""
    own = (ORDERS, notes_of(MONITOR))
    backoff = Backoff(random.Random(), longest_seconds=1.0)
    deadline_seconds = clock.monotonic() + OPEN_SECONDS
    while not stop.is_set():
        try:
            # A server that lost its counters, or a new one for a resumed run, starts again from 1.
            written = (max(bus.last_id(stream), recorded.get(stream, STREAM_START)) for stream in own)
            return bus.next_generation(MONITOR, at_least=max(written).generation + 1)
        except BusUnavailable as error:
            if clock.monotonic() >= deadline_seconds:
                raise BusUnavailable(f"no server for {OPEN_SECONDS:.0f} s: {error}") from None
            stop.wait(backoff.next_seconds())
    return 0


def comparison_routes(record_file: Path | None, clock: Clock) -> list[Route]:
    """What /compare needs, of a run that lies in a runs folder: all runs beside it."""
    if record_file is None or not (record_file.parent / "config.toml").is_file():
        return []
    try:
        return page_routes(RunsTable(RunsFolder(record_file.absolute().parent.parent), clock))
    except UserError:  # the folder has just gone
        return []


@contextlib.contextmanager
def _page(
    feed: Feed,
    address: PageAddress,
    log: NodeLog,
    token: Token | None,
    actions: ActionQueue | None,
    more_routes: list[Route],
) -> Iterator[None]:
    server = _bound(feed, address, token=token, actions=actions, log=log, more_routes=more_routes)
    server.start()
    log.event("page", url=server.url)
    try:
        if address.file is not None:
            _write_whole(address.file, server.url + "\n")
        yield
    finally:
        server.stop()


def _bound(feed: Feed, address: PageAddress, **parts: Any) -> PageServer:
    """On the port that the address file names from an earlier start, if it may be any: pages that are
    still open then find the restarted monitor again.
    """
    if address.port == 0 and address.file is not None:
        with contextlib.suppress(OSError, ValueError, UserError):
            former = urlsplit(address.file.read_text(encoding="utf-8").strip()).port
            return PageServer(feed, host=address.host, port=former or 0, **parts)
    return PageServer(feed, host=address.host, port=address.port, **parts)


def _write_whole(file: Path, text: str) -> None:
    """A reader sees all of it or nothing."""
    try:
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise EnvironmentFault(f"{file}: cannot be written: {error.strerror}") from None
