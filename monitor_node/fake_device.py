"""Plays a script (fake_script.py) as a device, for tests and demonstrations without a GPU.

Second 0 is the first sample. A sample shows the state at its time; events that fell between two samples
are in the later one, so none is lost when samples are far apart. Source "fake": nobody can take it for
a measurement. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.clock import Clock, SystemClock
from common.messages import Reading, VramSample
from monitor_node.device import TrainerProcess
from monitor_node.fake_script import Said, Script, parse_script, read_script

# Climbs through every level of the defaults, loses the sensor at the top, comes back; 4 minutes.
DEMO = """
device Demo card
total 16 GiB
0       45%
0       temperature 52 C
0       power 180 W
0       power_limit 300 W
20-110  98%
60      temperature 71 C
90      temperature 84 C
90      throttle 1
90      throttle.sw-thermal 1
112     xid 31
115     lost the cable was pulled
120     96%
125-150 45%
130     throttle 0
130     throttle.sw-thermal 0
130     temperature 60 C
240     repeat
"""
BUILT_IN = {"demo": DEMO}


def open_fake(name: str, *, clock: Clock | None = None) -> FakeDevice:
    """A built-in script, else a file. Raises UserError."""
    if name in BUILT_IN:
        return FakeDevice(parse_script(BUILT_IN[name], source=f"fake:{name}"), clock=clock)
    return FakeDevice(read_script(Path(name)), clock=clock)


class FakeDevice:
    def __init__(self, script: Script, *, clock: Clock | None = None) -> None:
        self.is_gpu = script.is_gpu
        self._script = script
        self._clock = clock or SystemClock()
        self._begun_seconds: float | None = None
        self._shown_seconds = -1.0  # time of the last sample, counted from the first

    def sample(self, trainer: TrainerProcess | None) -> VramSample:
        now_seconds = self._clock.monotonic()
        if self._begun_seconds is None:
            self._begun_seconds = now_seconds
        played_seconds = now_seconds - self._begun_seconds
        script, round_seconds = self._script, _in_round(self._script, played_seconds)
        used_bytes, reason = used_at(script, round_seconds)
        shown_seconds, self._shown_seconds = self._shown_seconds, played_seconds
        return VramSample(
            source="fake",
            device=script.device,
            used_bytes=used_bytes,
            total_bytes=script.total_bytes,
            trainer_bytes=used_bytes,
            unknown_reason=reason,
            readings=(
                *(_as_reading(said) for said in states_at(script, round_seconds)),
                *(_as_reading(said) for said in events_between(script, shown_seconds, played_seconds)),
            ),
        )


def used_at(script: Script, at_seconds: float) -> tuple[int | None, str]:
    """Used bytes, or None and the reason. Before the first line nothing is known."""
    used_bytes, reason = None, "the script has not begun"
    for line in script.memory:
        if line.start_seconds > at_seconds:
            break
        if line.used_bytes is None:
            used_bytes, reason = None, line.lost_reason
            continue
        span_seconds = line.end_seconds - line.start_seconds
        share = 1.0 if span_seconds == 0 else min(1.0, (at_seconds - line.start_seconds) / span_seconds)
        from_bytes = line.used_bytes if used_bytes is None else used_bytes  # a ramp out of nowhere is a step
        used_bytes, reason = round(from_bytes + share * (line.used_bytes - from_bytes)), ""
    return used_bytes, reason


def states_at(script: Script, at_seconds: float) -> list[Said]:
    """The newest of each reading that stays."""
    newest = {said.name: said for said in script.said if not said.once and said.at_seconds <= at_seconds}
    return list(newest.values())


def events_between(script: Script, after_seconds: float, to_seconds: float) -> Iterator[Said]:
    """Events later than the one time and not later than the other, both counted over all rounds."""
    length_seconds = script.repeat_seconds
    for said in script.said:
        if not said.once:
            continue
        if length_seconds is None:
            happened = after_seconds < said.at_seconds <= to_seconds
        else:  # at_seconds + n * length, n = 0, 1, ...
            rounds = (to_seconds - said.at_seconds) // length_seconds
            happened = rounds >= 0 and said.at_seconds + rounds * length_seconds > after_seconds
        if happened:
            yield said


def _in_round(script: Script, played_seconds: float) -> float:
    return played_seconds if script.repeat_seconds is None else played_seconds % script.repeat_seconds


def _as_reading(said: Said) -> Reading:
    return Reading(
        name=said.name, value=said.value, unit=said.unit, source="fake", unknown_reason=said.unknown_reason
    )
