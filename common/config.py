"""TOML <-> settings dataclasses. An unknown key is an error that suggests the nearest name.

    load_settings(preset="nano", overrides=["trainer.steps=500"]) -> RunSettings
    dump_settings(settings) -> TOML text that loads to the same settings

Order: defaults < preset or file < --set. Nothing comes from the environment. Any text at all gives settings
or a SettingsError of one short line, soon: a run file may be a stranger's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from common.errors import SettingsError
from common.settings import RunSettings

T = TypeVar("T")
MIN_LOSSES = 8  # of the line fit in trainer_node/verify.py
MAX_TOML_BYTES = 256 << 10
# tomllib takes time as the square of a dotted key's parts: 5,000 took 40 s, these bounds 0.3 s (2026-11-21).
MAX_DOTS_A_LINE = 200
_SHOWN_CHARACTERS = 100


def preset_names() -> list[str]:
    folder = resources.files("common") / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_settings(
    *, preset: str | None = None, file: Path | None = None, overrides: Iterable[str] = ()
) -> RunSettings:
    """Resolved, validated settings. Raises SettingsError with the key and the cure."""
    if preset is not None and file is not None:
        raise SettingsError("give either --preset or --config, not both")
    values = _read_toml(file) if file is not None else _read_preset(preset or "nano")
    return _with_overrides(values, overrides)


def settings_from_overrides(overrides: Iterable[str]) -> RunSettings:
    """Defaults and `table.key=value` lines, of no preset. Raises SettingsError."""
    return _with_overrides({}, overrides)


def _with_overrides(values: dict[str, Any], overrides: Iterable[str]) -> RunSettings:
    for override in overrides:
        _apply_override(values, override)
    return parse_settings(values)


def parse_settings(values: Mapping[str, Any]) -> RunSettings:
    settings = _build(RunSettings, values, path="")
    _check_together(settings)
    return settings


def settings_from_toml(text: str) -> RunSettings:
    return parse_settings(parse_toml(text))


def parse_toml(text: str) -> dict[str, Any]:
    """Any text: its table, or SettingsError. Takes less than a second."""
    if len(text) > MAX_TOML_BYTES:
        raise SettingsError(f"not valid TOML for a run: longer than {MAX_TOML_BYTES:,} characters")
    if max(line.count(".") for line in text.split("\n")) > MAX_DOTS_A_LINE:
        raise SettingsError(f"not valid TOML for a run: a line with more than {MAX_DOTS_A_LINE} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SettingsError("not valid TOML for a run: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise SettingsError(f"not valid TOML: {_plain_line(str(error))}") from None


def dump_settings(settings: RunSettings) -> str:
    return tomli_w.dumps(_plain(settings))


def setting_rows(cls: type = RunSettings, path: str = "") -> list[tuple[str, str, str]]:
    """(key, default, meaning with its range) of every setting, in the order of the file."""
    rows: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(cls):
        metadata = field.metadata
        if "table" in metadata:
            rows += setting_rows(metadata["table"], f"{path}{field.name}.")
            continue
        low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
        limits = (
            f" [{', '.join(choices)}]" if choices else f" [{low:g} to {high:g}]" if low is not None else ""
        )
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        rows.append((f"{path}{field.name}", str(default), metadata["doc"] + limits))
    return rows


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_TOML_BYTES + 1).decode("utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{file}: no such file; `trainer-node presets` lists ready-made ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: cannot be read: {error}") from None
    try:
        return parse_toml(text)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from None


def _read_preset(name: str) -> dict[str, Any]:
    known = preset_names()
    if name not in known:
        raise SettingsError(f"unknown preset '{name}'{_nearest(name, known)}; presets: {', '.join(known)}")
    text = (resources.files("common") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise SettingsError(
            f"--set {_plain_line(override)}: write it as table.key=value, e.g. trainer.steps=500"
        )
    try:
        value = parse_toml(f"value = {text.strip()}")["value"]
    except SettingsError:
        value = text.strip()  # a bare word is a string
    target = values
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise SettingsError(f"--set {_plain_line(override)}: {_plain_line(part)} is not a table")
    target[parts[-1]] = value


def _build(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = _plain_line(f"{path}{key}")
        if key not in fields:
            cure = _nearest(key, fields, path) or "; `trainer-node settings` lists them"
            raise SettingsError(f"unknown key {name}{cure}")
        metadata = fields[key].metadata
        if "table" in metadata:
            if not isinstance(value, Mapping):
                raise SettingsError(f"{name} is a table: write [{name}] or {name}.key = value")
            arguments[key] = _build(metadata["table"], value, f"{name}.")
        else:
            arguments[key] = _check(name, value, hints[key], metadata)
    return cls(**arguments)


def _check(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise SettingsError(f"{name} = {_shown(value)}: must be a list")
        return tuple(_check(name, item, typing.get_args(hint)[0], metadata) for item in value)
    if hint is float and type(value) is int:
        with contextlib.suppress(OverflowError):  # then it is none
            value = float(value)
    if type(value) is not hint:
        kind = "true or false" if hint is bool else f"of type {hint.__name__}"
        raise SettingsError(f"{name} = {_shown(value)}: must be {kind}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{name} = {value}: must be finite")
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if low is not None and value < low:
        raise SettingsError(f"{name} = {_shown(value)}: must be at least {low}")
    if high is not None and value > high:
        raise SettingsError(f"{name} = {_shown(value)}: must be at most {high}")
    if choices is not None and value not in choices:
        raise SettingsError(f"{name} = {_shown(value)}: must be one of {', '.join(choices)}")
    return value


def _check_together(settings: RunSettings) -> None:
    trainer, monitor = settings.trainer, settings.monitor
    model = trainer.model
    if model.width % model.heads:
        raise SettingsError(
            f"trainer.model.heads = {model.heads} must divide trainer.model.width = {model.width}"
        )
    if trainer.statistics_steps + trainer.window_steps < MIN_LOSSES:
        raise SettingsError(
            f"trainer.statistics_steps + trainer.window_steps must be at least {MIN_LOSSES}: the forecast"
            " that judges the first jump needs as many losses"
        )
    if trainer.schedule.warmup_steps > trainer.steps:
        raise SettingsError(
            f"trainer.schedule.warmup_steps = {trainer.schedule.warmup_steps} is longer than"
            f" trainer.steps = {trainer.steps}; lower it or train longer"
        )
    if settings.predictor.enabled and not settings.predictor.horizon_steps:
        raise SettingsError(
            "predictor.horizon_steps is empty; to forbid prediction set predictor.enabled = false"
        )
    host, _, port = monitor.http.rpartition(":")
    if monitor.http and not (
        host and port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 1 << 16
    ):
        raise SettingsError(
            f"monitor.http = {_shown(monitor.http)}: write it as HOST:PORT, e.g. 127.0.0.1:8080; port 0 = any"
            " free one, empty = no page"
        )
    if monitor.silent_seconds <= monitor.heartbeat_seconds:
        raise SettingsError("monitor.silent_seconds must be above monitor.heartbeat_seconds")
    if monitor.cleanup_bytes and monitor.emergency_bytes and monitor.cleanup_bytes >= monitor.emergency_bytes:
        raise SettingsError("monitor.cleanup_bytes must be below monitor.emergency_bytes")
    kind = monitor.device.partition(":")[0]
    if kind not in ("", "auto", "cpu", "cuda", "fake") or (kind == "fake") != (":" in monitor.device):
        raise SettingsError(
            f"monitor.device = {_shown(monitor.device)}: write auto, cpu, cuda or fake:SCRIPT, e.g. fake:demo"
        )
    if monitor.cleanup_share and monitor.emergency_share and monitor.cleanup_share >= monitor.emergency_share:
        raise SettingsError("monitor.cleanup_share must be below monitor.emergency_share")


def _shown(value: Any) -> str:
    """As it would be written, if that is short: it may be anything."""
    try:
        return _plain_line(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, a table nested deeply
        return f"({type(value).__name__})"


def _plain_line(text: str) -> str:
    """Bounded and printable: it goes to a terminal."""
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
    return text if text.isprintable() else repr(text)[1:-1]


def _nearest(word: str, known: Iterable[str], path: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {path}{close[0]}?" if close else ""
