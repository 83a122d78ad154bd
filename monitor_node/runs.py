"""Reads the runs of a runs folder from their files: what each did, what it cost, its held-out curve.

Owns the reading: bounded in bytes, lines, runs and points, following no link, believing nothing. A
run that cannot be read is listed with the reason. Never writes, and knows no bus and no page.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import parse_toml
from common.errors import EnvironmentFault, SettingsError, UserError
from monitor_node.run_metrics import MetricsReader, number_of

MAX_RUNS = 200  # the newest ones
MAX_SUMMARY_BYTES = 1 << 20
MAX_CONFIG_BYTES = 256 << 10
MAX_SETTINGS = 500
_MAX_ENTRIES = 5_000  # of the runs folder
_MAX_TEXT = 200  # characters of a name or value
_NUMBERS: tuple[tuple[str, str, type], ...] = (  # field of Run, key of summary.json
    ("steps", "real_steps", int),
    ("seconds", "seconds_total", float),
    ("kept", "accepted", int),
    ("refused", "refused", int),
    ("virtual_share", "virtual_share", float),
    ("loss_first", "val_loss_first", float),
    ("loss_last", "val_loss_last", float),
)
_READ_BYTES = 256 << 20  # of metrics at one call: what is left is read by the next
_FILES = ("config.toml", "metrics.jsonl", "summary.json")


class _Unreadable(Exception):
    """Why a file is not read; one line."""


@dataclass(kw_only=True)
class Run:
    """One run folder. None = not known. Times in seconds, losses in nats."""

    name: str
    problems: list[str] = field(default_factory=list)
    status: str | None = None
    task: str | None = None
    steps: int | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    loss_last_marker: str | None = None  # "NaN", "inf", "-inf" where the loss is no number
    seconds: float | None = None
    kept: int | None = None
    refused: int | None = None
    virtual_share: float | None = None
    settings: dict[str, str] = field(default_factory=dict)  # dotted key -> value as text
    curve: list[tuple[float, ...]] = field(default_factory=list)  # (step, held-out loss, train seconds)
    marks: list[tuple[int, str]] = field(default_factory=list)  # (step, "NaN" | "inf" | "-inf")


class RunsFolder:
    """A runs folder that is read again and again: of a growing file only what is new."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when there is no such folder."""
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give the folder that holds the runs, e.g. runs")
        self.path = path
        self._metrics: dict[str, MetricsReader] = {}
        self._budget_bytes = 0

    def read(self) -> tuple[list[Run], str]:
        """The runs by name, and a line about what was left out ("" = nothing). Raises EnvironmentFault."""
        names, note = self._names()
        self._metrics = {name: reader for name, reader in self._metrics.items() if name in names}
        self._budget_bytes = _READ_BYTES
        return [self._run(name) for name in sorted(names)], note

    def _names(self) -> tuple[set[str], str]:
        try:
            with os.scandir(self.path) as entries:
                seen = [entry for entry, _ in zip(entries, range(_MAX_ENTRIES), strict=False)]
        except OSError as error:
            raise EnvironmentFault(f"{self.path}: cannot be read: {error.strerror}") from None
        found: dict[str, float] = {}
        for entry in seen:
            with contextlib.suppress(OSError):  # it went away meanwhile
                if not entry.name.startswith(".") and (entry.is_symlink() or _is_run(entry)):
                    found[entry.name] = entry.stat(follow_symlinks=False).st_mtime
        newest = sorted(found, key=lambda name: -found[name])[:MAX_RUNS]
        left_out = len(found) - len(newest)
        note = f"{left_out} older runs are not shown" if left_out else ""
        if len(seen) == _MAX_ENTRIES:
            note = f"only {_MAX_ENTRIES:,} entries of the folder were looked at"
        return set(newest), note

    def _run(self, name: str) -> Run:
        run = Run(name=plain_text(name))
        folder = self.path / name
        if folder.is_symlink():
            run.problems.append("is a link; links are not followed")
            return run
        steps = (
            ("config.toml", lambda: _take_settings(run, folder / "config.toml")),
            ("metrics.jsonl", lambda: self._take_metrics(run, name)),
            ("summary.json", lambda: _take_summary(run, folder / "summary.json")),
        )
        for file, take in steps:
            try:
                take()
            except FileNotFoundError:
                if file != "summary.json":  # a run that goes on has none yet
                    run.problems.append(f"{file} is missing")
            except OSError as error:
                run.problems.append(f"{file} cannot be read: {error.strerror}")
            except _Unreadable as error:
                run.problems.append(f"{file} {error}")
        return run

    def _take_metrics(self, run: Run, name: str) -> None:
        reader = self._metrics.setdefault(name, MetricsReader())
        with _opened(self.path / name / "metrics.jsonl") as (descriptor, _):
            self._budget_bytes -= reader.read(descriptor, max_bytes=self._budget_bytes)
        found = reader.found
        run.problems += reader.problems()
        run.curve, run.marks = found.curve.points(), list(found.curve.marks)
        run.steps, run.seconds = found.step, found.seconds
        run.loss_first, run.loss_last, run.loss_last_marker = found.loss_first, found.loss, found.loss_marker
        run.kept, run.refused, run.virtual_share = found.kept, found.refused, found.virtual_share
        run.status = plain_text(found.ended_reason or "not ended")


def settings_that_differ(runs: list[Run]) -> list[str]:
    """Dotted keys, sorted, whose value is not the same in all runs whose settings are known."""
    known = [run.settings for run in runs if run.settings]
    keys = {key for settings in known for key in settings}
    return sorted(key for key in keys if len({settings.get(key) for settings in known}) > 1)


def plain_text(value: Any) -> str:
    """Bounded, printable and free of half characters, so that it can be sent as UTF-8."""
    try:
        text = str(value)[:_MAX_TEXT].encode("utf-8", "replace").decode("utf-8")
    except (ValueError, RecursionError):  # a number of thousands of digits, a list nested deeply
        text = f"({type(value).__name__})"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _is_run(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and any(
        os.path.lexists(os.path.join(entry.path, name)) for name in _FILES
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """(descriptor, size in bytes) of a regular file that is no link; never waits for a pipe."""
    if path.is_symlink():
        raise _Unreadable("is a link; links are not followed")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Unreadable("is not a file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _content(path: Path, max_bytes: int) -> str:
    with _opened(path) as (descriptor, size_bytes):
        if size_bytes > max_bytes:
            raise _Unreadable(f"has {size_bytes:,} bytes, more than {max_bytes:,}")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            content = file.read(max_bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise _Unreadable("is not text") from None


def _take_settings(run: Run, path: Path) -> None:
    try:
        values = parse_toml(_content(path, MAX_CONFIG_BYTES))
    except SettingsError as error:
        raise _Unreadable(f"is {plain_text(error)}") from None
    flat: dict[str, str] = {}
    _flatten(values, "", flat)
    run.settings = flat
    run.task = flat.get("trainer.task")


def _flatten(values: dict[str, Any], prefix: str, flat: dict[str, str]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", flat)
        elif len(flat) < MAX_SETTINGS:
            flat[plain_text(prefix + key)] = plain_text(value)


def _take_summary(run: Run, path: Path) -> None:
    """The trainer's own account is better than what the metrics say, unless the run went on after it."""
    try:
        said = json.loads(_content(path, MAX_SUMMARY_BYTES))
    except (ValueError, RecursionError):
        raise _Unreadable("is not valid JSON") from None
    if not isinstance(said, dict):
        raise _Unreadable("is not a JSON object")
    if isinstance(said.get("task"), str):
        run.task = plain_text(said["task"])
    if run.status == "not ended" and run.steps is not None:
        return  # written before the run was resumed
    if isinstance(said.get("status"), str):
        run.status = plain_text(said["status"])
    for name, key, as_type in _NUMBERS:
        value = number_of(said.get(key))
        if value is not None and math.isfinite(value):
            setattr(run, name, as_type(value))
