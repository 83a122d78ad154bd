"""The language of fake devices: what a device that does not exist says, second by second.

Owns reading a script into a Script; playing it is fake_device.py's. One statement a line, `#` begins a
comment. First, in any order, what the device is; without a line its default holds:

    device Some card            name
    total 16 GiB                memory
    host                        a run on a CPU: an unknown reading is reported, never vetoed

then what happens, each line not earlier than the one before:

    0      6 GiB                used memory from this second on: a number with GiB, MiB, GB, MB or B,
                                or a share of the total such as 40%
    5-20   90%                  a ramp from what was used at second 5 to this at second 20
    25     lost cable is out    unknown with this reason until the next line that gives used memory
    30     xid 79               an event (names: nvml_events.py): in one sample only
    30     temperature 91 C     any other reading from here on: name, value (or `unknown` and a reason), unit
    60     repeat               start again from second 0; else the last state holds for ever
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from monitor_node.nvml_events import NAMES

GIB = 1 << 30
EVENTS = frozenset(NAMES.values())  # readings that are shown once
_UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": GIB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|B|MB|GB|MiB|GiB)")
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?")
_MOST_BYTES = 1 << 50
_LONGEST_SECONDS = 1e9


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Used memory from `start_seconds` on; it gets there at `end_seconds`. Lost: None with a reason."""

    start_seconds: float
    end_seconds: float
    used_bytes: int | None
    lost_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Said:
    """A reading from `at_seconds` on, or only once."""

    at_seconds: float
    name: str
    value: float | None
    unit: str
    unknown_reason: str
    once: bool


@dataclass(kw_only=True)
class Script:
    source: str  # file or built-in name, for people
    device: str = "fake card"
    total_bytes: int = 16 * GIB
    is_gpu: bool = True
    memory: list[Memory] = field(default_factory=list)  # in order, at least one
    said: list[Said] = field(default_factory=list)  # in order
    repeat_seconds: float | None = None


class _Wrong(ValueError):
    """What is wrong with a line, and the cure."""


def read_script(file: Path) -> Script:
    """Raises UserError, one line that names file and line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{file}: {reason}; give a script, or fake:demo for the built-in one") from None
    return parse_script(text, source=str(file))


def parse_script(text: str, *, source: str) -> Script:
    """Raises UserError, one line that names `source` and the line."""
    script = Script(source=source)
    last_seconds = 0.0
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        try:
            if script.repeat_seconds is not None:
                raise _Wrong("nothing may follow 'repeat'")
            if words[0][0].isdigit():
                last_seconds = _happening(script, words, last_seconds)
            else:
                _header(script, words)
        except _Wrong as error:
            raise UserError(f"{source}:{number}: {error}") from None
    if not script.memory:
        raise UserError(f"{source}: says nothing of used memory; add a line such as '0 6 GiB'")
    return script


def _header(script: Script, words: list[str]) -> None:
    if script.memory or script.said:
        raise _Wrong(f"'{words[0]}' must come before the first second; a line begins with a second")
    match words:
        case ["device", *name] if name:
            script.device = " ".join(name)
        case ["total", *size]:
            script.total_bytes = _size_bytes(" ".join(size), None)
            if script.total_bytes <= 0:
                raise _Wrong("the total must be above 0")
        case ["host"]:
            script.is_gpu = False
        case _:
            line = " ".join(words)
            raise _Wrong(f"'{line}' should begin with a second, or be device NAME, total SIZE or host")


def _happening(script: Script, words: list[str], last_seconds: float) -> float:
    """Adds what a line with a time says; returns that time."""
    span = _SECONDS.fullmatch(words[0])
    if span is None or not words[1:]:
        raise _Wrong(
            f"'{' '.join(words)}' should be a second such as 10, or a ramp such as 10-20, and an event"
        )
    start_seconds = float(span[1])
    end_seconds = float(span[2]) if span[2] is not None else start_seconds
    if start_seconds < last_seconds or end_seconds < start_seconds:
        raise _Wrong(f"second {words[0]} goes back; the line before was at {last_seconds:g}")
    if end_seconds > _LONGEST_SECONDS:
        raise _Wrong(f"second {words[0]} is later than any script lasts")
    kind, rest = words[1], words[2:]
    ramp_seconds = script.memory[-1].end_seconds if script.memory else 0.0
    if start_seconds < ramp_seconds and (kind[0].isdigit() or kind in ("lost", "repeat")):
        raise _Wrong(f"the ramp before it lasts until second {ramp_seconds:g}")
    if kind[0].isdigit():
        used_bytes = _size_bytes(" ".join(words[1:]), script.total_bytes)
        if used_bytes > script.total_bytes:
            raise _Wrong(f"{' '.join(words[1:])} is more than the total of {script.total_bytes} bytes")
        script.memory.append(
            Memory(start_seconds=start_seconds, end_seconds=end_seconds, used_bytes=used_bytes)
        )
    elif end_seconds != start_seconds:
        raise _Wrong("only used memory can have a ramp; give one second")
    elif kind == "lost":
        reason = " ".join(rest) or "the script lost the sensor"
        script.memory.append(
            Memory(
                start_seconds=start_seconds, end_seconds=start_seconds, used_bytes=None, lost_reason=reason
            )
        )
    elif kind == "repeat":
        if rest or start_seconds <= 0 or not script.memory:
            raise _Wrong("'repeat' stands alone, after a second above 0 and some used memory")
        script.repeat_seconds = start_seconds
    else:
        script.said.append(_reading(start_seconds, kind, rest))
    return start_seconds


def _reading(at_seconds: float, name: str, rest: list[str]) -> Said:
    if rest[:1] == ["unknown"]:
        reason = " ".join(rest[1:]) or "the script does not know it"
        return Said(at_seconds=at_seconds, name=name, value=None, unit="1", unknown_reason=reason, once=False)
    try:
        value = float(rest[0])
    except (IndexError, ValueError):
        value = math.nan
    if not math.isfinite(value) or len(rest) > 2:
        raise _Wrong(
            f"'{' '.join([name, *rest])}' is neither used memory ('6 GiB', '40%'), 'lost REASON', 'repeat'"
            " nor a reading ('temperature 91 C')"
        )
    unit = rest[1] if len(rest) == 2 else "1"
    return Said(
        at_seconds=at_seconds, name=name, value=value, unit=unit, unknown_reason="", once=name in EVENTS
    )


def _size_bytes(text: str, total_bytes: int | None) -> int:
    found = _SIZE.fullmatch(text)
    if found is None or (found[2] == "%" and total_bytes is None):
        raise _Wrong(f"'{text}' is not a size; write 6 GiB, 800 MB" + (" or 40%" if total_bytes else ""))
    unit = total_bytes / 100 if found[2] == "%" and total_bytes is not None else _UNITS[found[2]]
    size_bytes = float(found[1]) * unit
    if size_bytes > _MOST_BYTES:
        raise _Wrong(f"'{text}' is more than any device has")
    return round(size_bytes)
