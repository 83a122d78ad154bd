"""Where people find what happened: metrics.jsonl and TensorBoard event files.

A thread takes messages from a queue, so the loop never waits for the disk. A full disk costs
metrics, never the run: it is reported once. metrics.jsonl is appended to on resume; a line carries
(attempt, step), so steps that were undone can be told from those that were kept.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from common.features import INDEX
from common.messages import Alert, CheckpointWritten, Evaluation, Message, Observation, Outcome, RunEnded

_FLUSH_SECONDS = 1.0
_SHOWN = ("loss", "rate", "log10_grad_norm", "clip_scale", "virtual_share_of_run", "accepted_share_8")


class MetricSinks:
    def __init__(self, metrics: Path, tensorboard: Path, on_failure: Callable[[str], None]) -> None:
        self._metrics, self._tensorboard, self._on_failure = metrics, tensorboard, on_failure
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        self._queue.put(message)

    def close(self) -> None:
        """Write what is queued and close the files."""
        self._queue.put(None)
        self._thread.join(10.0)

    def _run(self) -> None:
        try:
            with self._metrics.open("a", encoding="utf-8") as lines, SummaryWriter(
                str(self._tensorboard), flush_secs=2
            ) as board:  # fmt: skip
                flushed = time.monotonic()
                while (message := self._queue.get()) is not None:
                    record = metric_line(message)
                    if record is not None:
                        lines.write(json.dumps(record) + "\n")
                        write_scalars(board, message)
                    if time.monotonic() - flushed > _FLUSH_SECONDS:
                        lines.flush()
                        flushed = time.monotonic()
        except OSError as error:
            self._on_failure(f"metrics are no longer written: {error}; training goes on, free some space")
            while self._queue.get() is not None:
                pass


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
        case Outcome() | Evaluation() | CheckpointWritten() | Alert() | RunEnded():
            fields = asdict(message)
        case _:
            return None
    return {"kind": type(message).__name__, **{name: _plain(value) for name, value in fields.items()}}


def write_scalars(board: SummaryWriter, message: Message) -> None:
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
