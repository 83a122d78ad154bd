"""Reads a run's metrics.jsonl as it grows: the held-out curve, the jumps, how far the run is.

Owns where it stands in one file. Of most lines only the beginning is looked at: a run of a million
steps has hundreds of megabytes of them. A line that is no JSON object of ours is counted and left out.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from monitor_node.series import Curve, marker_of

MAX_FILE_BYTES = 1 << 30
MAX_LINE_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20
_MAX_STEP = 1 << 53  # what a page can count to


@dataclass(kw_only=True)
class Found:
    """What the lines so far say. None = not said."""

    curve: Curve = field(default_factory=Curve)  # (step, held-out loss, train seconds)
    step: int | None = None
    seconds: float | None = None
    loss_first: float | None = None
    loss: float | None = None
    loss_marker: str | None = None
    kept: int = 0
    refused: int = 0
    virtual_share: float | None = None
    ended_reason: str | None = None  # None while lines follow: the run was resumed


class MetricsReader:
    def __init__(self) -> None:
        self._begin((0, 0))

    def _begin(self, file: tuple[int, int]) -> None:
        """At the start of a file, named by device and inode."""
        self.found = Found()
        self._file = file
        self._position = 0
        self._size_bytes = 0
        self._rest = b""  # the beginning of a line whose end is not written yet
        self._is_skipping = False  # inside a line that is too long
        self._bad_lines = 0
        self._last_observation = b""

    def read(self, descriptor: int, *, max_bytes: int) -> int:
        """Take what was appended since the last call; the number of bytes read.

        Another file or a shorter one is read anew. Raises OSError.
        """
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != self._file or status.st_size < self._position:
            self._begin((status.st_dev, status.st_ino))
        self._size_bytes = min(status.st_size, MAX_FILE_BYTES)
        begun_at = self._position
        end = min(self._size_bytes, begun_at + max(0, max_bytes))
        while self._position < end:
            chunk = os.pread(descriptor, min(_CHUNK_BYTES, end - self._position), self._position)
            if not chunk:
                break
            self._position += len(chunk)
            self._take_chunk(chunk)
        if self._last_observation:
            self._take(self._last_observation)
            self._last_observation = b""
        return self._position - begun_at

    def problems(self) -> list[str]:
        said = []
        if self._bad_lines:
            said.append(f"metrics.jsonl has {self._bad_lines:,} unreadable lines")
        if self._position < self._size_bytes:
            said.append(f"metrics.jsonl is being read: {self._position / self._size_bytes:.0%}")
        if self._position >= MAX_FILE_BYTES:
            said.append(f"metrics.jsonl is read up to {MAX_FILE_BYTES:,} bytes only")
        return said

    def _take_chunk(self, chunk: bytes) -> None:
        *lines, rest = chunk.split(b"\n")
        if lines:
            first = self._rest + lines[0]
            if not self._is_skipping:
                self._sort(first)
            for line in lines[1:]:
                self._sort(line)
            self._rest, self._is_skipping = rest, False
        elif not self._is_skipping:
            self._rest += rest
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest, self._is_skipping = b"", True
            self._bad_lines += 1

    def _sort(self, line: bytes) -> None:
        """Of the lines about single steps, by far the most, only the newest is worth parsing."""
        if len(line) > MAX_LINE_BYTES:
            self._bad_lines += 1
        elif line.startswith(b'{"kind": "Observation"') and line.endswith(b"}"):
            self._last_observation = line
            self.found.ended_reason = None
        elif line.strip():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            self._bad_lines += 1
            return
        match record["kind"]:
            case "Observation":
                self.found.step = _step(record.get("step"), self.found.step)
                self.found.virtual_share = _share(record.get("virtual_share_of_run"))
            case "Evaluation":
                self._take_evaluation(record)
            case "Outcome":
                self.found.kept += record.get("verdict") == "accepted"
                self.found.refused += record.get("verdict") in ("refused", "ruined")
            case "RunEnded":
                reason = record.get("reason")
                self.found.ended_reason = reason[:40] if isinstance(reason, str) else "ended"

    def _take_evaluation(self, record: dict[str, Any]) -> None:
        """A later evaluation of a step stands for that step: what was undone is said twice."""
        found, step, loss = self.found, _step(record.get("step"), None), number_of(record.get("loss"))
        if step is None or loss is None:
            self._bad_lines += 1
            return
        seconds = number_of(record.get("train_seconds"))
        is_known = seconds is not None and math.isfinite(seconds)
        found.curve.cut_above(step - 1)
        found.curve.add(step, loss, *([seconds] if is_known and seconds is not None else []))
        found.seconds = seconds if is_known else found.seconds
        is_finite = math.isfinite(loss)
        found.loss = loss if is_finite else None
        found.loss_marker = None if is_finite else marker_of(loss)
        if found.loss_first is None and is_finite:
            found.loss_first = loss


def _step(value: Any, otherwise: int | None) -> int | None:
    is_step = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_STEP
    return value if is_step else otherwise


def number_of(value: Any) -> float | None:
    """Of a JSON number, or of the text that stands for one that is not finite."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return None
    return None


def _share(value: Any) -> float | None:
    number = number_of(value)
    return number if number is not None and 0 <= number <= 1 else None
