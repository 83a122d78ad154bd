"""All curves of one run, in bounded memory: what is drawn over steps and over time. Pure; decides nothing.

Steps that a restore or a resume has undone are cut off; jumps stay, since people want every try.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from common import messages as m
from monitor_node.control_book import ControlBook
from monitor_node.series import Curve, Strip, append_bounded

STACKING = ("weights", "optimizer", "gradients", "averages", "history", "snapshot")  # from the bottom
REST = "rest"  # always on top
MAX_HOLDERS = 16  # names; what comes on top of them is added to the rest
MAX_HOLDER_ROWS = 240
_NAME_CHARACTERS = 40
_JUMPS = 400


class HolderStack:
    """Bytes by holder over time; of each bucket the moment at which they held most together."""

    def __init__(self, max_rows: int = MAX_HOLDER_ROWS) -> None:
        self._max_rows = max_rows
        self._width_seconds = 1
        self._others: list[str] = []
        self._rows: dict[int, tuple[int, Mapping[str, int]]] = {}

    def add(self, unix_seconds: int, report: m.MemoryReport) -> None:
        """What is on the device. A report without such holders says nothing."""
        held: dict[str, int] = {}
        for holder in report.holders:
            if holder.place == "device":
                name = self._known(holder.name[:_NAME_CHARACTERS])
                held[name] = held.get(name, 0) + holder.num_bytes
        if not held:
            return
        self._put(unix_seconds, held)
        while len(self._rows) > self._max_rows:
            self._width_seconds *= 2
            old, self._rows = self._rows, {}
            for at, row in old.values():
                self._put(at, row)

    @property
    def names(self) -> list[str]:
        """In stacking order, the lowest first."""
        if not self._rows:
            return []
        return [*STACKING, *self._others, REST]

    def rows(self) -> list[tuple[int, list[int]]]:
        """(unix second, bytes of each of `names`), by time. Who is not in a report holds nothing."""
        names = self.names
        by_time = sorted(self._rows.values(), key=lambda row: row[0])
        return [(at, [held.get(name, 0) for name in names]) for at, held in by_time]

    def _known(self, name: str) -> str:
        if name in STACKING or name == REST or name in self._others:
            return name
        if len(self._others) + len(STACKING) + 1 < MAX_HOLDERS:
            self._others.append(name)
            return name
        return REST

    def _put(self, unix_seconds: int, held: Mapping[str, int]) -> None:
        key = unix_seconds // self._width_seconds
        before = self._rows.get(key)
        if before is None or sum(held.values()) >= sum(before[1].values()):
            self._rows[key] = (unix_seconds, held)


@dataclass(kw_only=True)
class RunCurves:
    train: Curve = field(default_factory=Curve)
    held_out: Curve = field(default_factory=Curve)
    forecast: Curve = field(default_factory=Curve)  # (step, loss without the jump, spread)
    memory: Curve = field(default_factory=lambda: Curve(max_buckets=240))  # (unix second, used bytes)
    seconds: Curve = field(default_factory=lambda: Curve(max_buckets=240))  # (step, unix seconds)
    units: Curve = field(default_factory=lambda: Curve(max_buckets=240))  # (step, tokens or examples so far)
    phases: Strip = field(default_factory=Strip)
    holders: HolderStack = field(default_factory=HolderStack)
    jumps: list[tuple[int, str, int]] = field(default_factory=list)  # (base step, verdict, horizon)
    controls: ControlBook = field(default_factory=ControlBook)
    _units_at: tuple[int, float] = (0, 0.0)  # (step, units) of the newest step that is kept

    def stepped(self, step: int, phase: m.Phase, sent_unix_seconds: float) -> None:
        self.phases.add(step, phase.value)
        self.seconds.add(step, sent_unix_seconds)

    def used(self, step: int, units_per_step: float) -> None:
        """Steps that were not seen are taken to have used as much."""
        if not math.isfinite(units_per_step):
            return
        known_step, units = self._units_at
        self._units_at = (step, units + max(0, step - known_step) * units_per_step)
        self.units.add(*self._units_at)

    def settled(self, outcome: m.Outcome) -> None:
        if outcome.horizon_steps > 0:
            jump = (outcome.base_step, outcome.verdict.value, outcome.horizon_steps)
            append_bounded(self.jumps, jump, _JUMPS)
        is_known = math.isfinite(outcome.loss_forecast)  # not of a trial that ended half-way, in ruin
        if outcome.verdict in m.APPLIED_VERDICTS and outcome.probation_steps > 0 and is_known:
            end_step = outcome.base_step + outcome.probation_steps
            self.forecast.add(end_step, outcome.loss_forecast, outcome.loss_spread)
        self.controls.settled(outcome)

    def cut_above(self, step: int) -> None:
        for curve in (self.train, self.held_out, self.forecast, self.seconds, self.units):
            curve.cut_above(step)
        self.phases.cut_above(step)
        self.controls.cut_above(step)
        if self._units_at[0] > step:
            self._units_at = _units_at(self._units_at, self.units.points(), step)


def _units_at(newest: tuple[int, float], kept: list[tuple[float, ...]], step: int) -> tuple[int, float]:
    """On the line from the last point that is kept to the newest one."""
    first_step, first_units = (int(kept[-1][0]), kept[-1][1]) if kept else (0, 0.0)
    share = (step - first_step) / max(1, newest[0] - first_step)
    return max(step, 0), first_units + share * (newest[1] - first_units)
