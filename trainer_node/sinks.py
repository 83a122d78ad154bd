"""Where people find what happened: metrics.jsonl and TensorBoard event files.

A thread takes messages from a queue, so the loop never waits for the disk. A full disk costs
metrics, never the run: it is reported once. metrics.jsonl is appended to on resume; a line carries
(attempt, step), so steps that were undone can be told from those that were kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from common.features import INDEX
from common.messages import Alert, CheckpointWritten, Evaluation, Message, Observation, Outcome, RunEnded

_FLUSH_SECONDS = 1.0
_SHOWN = ("loss", "rate", "log10_grad_norm", "clip_scale", "virtual_share_of_run", "accepted_share_8")


class MetricSinks:
    def __init__(self, metrics: Path, tensorboard: Path, on_failure: Callable[[str], None]) -> None:
        self._metrics, self._tensorboard, self._on_failure = metrics, tensorboard, on_failure
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        if not self._failed:
            self._queue.put(message)

    def close(self) -> None:
        """Write what is queued and close the files."""
        self._queue.put(None)
        self._thread.join(10.0)

    def _run(self) -> None:
        try:
            with (
                self._metrics.open("a", encoding="utf-8") as lines,
                contextlib.closing(EventFile(self._tensorboard)) as board,
            ):
                _end_torn_line(self._metrics, lines)
                flushed = time.monotonic()
                while (message := self._queue.get()) is not None:
                    record = metric_line(message)
                    if record is not None:
                        lines.write(json.dumps(record) + "\n")
                        write_scalars(board, message)
                    if time.monotonic() - flushed > _FLUSH_SECONDS:
                        lines.flush()
                        board.flush()
                        flushed = time.monotonic()
        except OSError as error:
            self._on_failure(f"metrics are no longer written: {error}; training goes on, free some space")
            self._failed = True  # what comes from now on is not kept


def _end_torn_line(path: Path, lines: TextIO) -> None:
    """After a kill the last line may be half a line; what follows must not be glued to it."""
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        file.seek(max(0, size_bytes - 1))
        if size_bytes and file.read(1) != b"\n":
            lines.write("\n")


def metric_line(message: Message) -> dict[str, Any] | None:
    """What metrics.jsonl says of a message; None if nothing. Non-finite numbers become text."""
    match message:
        case Observation():
            fields: dict[str, Any] = {
                "step": message.step,
                "attempt": message.attempt,
                "phase": message.phase.value,
                **{name: message.features[INDEX[name]] for name in _SHOWN},
                "step_seconds": 10 ** message.features[INDEX["log10_step_seconds"]],
            }
        case Alert():
            fields = asdict(message)
            fields["alert_kind"] = fields.pop("kind")  # a record's own kind is that of the message
        case Outcome() | Evaluation() | CheckpointWritten() | RunEnded():
            fields = asdict(message)
        case _:
            return None
    return {"kind": type(message).__name__, **{name: _plain(value) for name, value in fields.items()}}


class EventFile:
    """A TensorBoard event file, written by the caller's thread.

    tensorboardX's SummaryWriter has a queue and a thread of its own, which on a full disk fails with a
    stack trace; the layer below it is used instead.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        self._writer.write_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def write_scalars(board: EventFile, message: Message) -> None:
    match message:
        case Observation():
            for name in _SHOWN:
                board.add_scalar(f"train/{name}", message.features[INDEX[name]], message.step)
        case Evaluation():
            board.add_scalar("held_out/loss", message.loss, message.step)
            if message.accuracy is not None:
                board.add_scalar("held_out/accuracy", message.accuracy, message.step)
        case Outcome() if message.delta_norm > 0:
            board.add_scalar(
                "prediction/accepted", float(message.verdict.value == "accepted"), message.base_step
            )
            board.add_scalar("prediction/delta_cosine", message.delta_cosine, message.base_step)
            board.add_scalar("prediction/horizon", message.horizon_steps, message.base_step)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value.value if isinstance(value, Enum) else value
