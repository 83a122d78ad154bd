"""`monitor-node top`: what fits a terminal, what a hostile name cannot do, what is said of trouble."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from common import messages as m
from common.clock import FakeClock
from common.errors import BusUnavailable, EnvironmentFault
from common.memory_bus import MemoryBus, MemoryServer
from monitor_node.node import new_view
from monitor_node.snapshot import as_dict
from monitor_node.top import follow, top
from monitor_node.top_screen import screen, sparkline
from tests.monitor import fake_run as fake

ATTACK = "[red]x[/red][link=http://x]\x1b[31m\x1b]0;stolen\x07\n\u202e"


def snapshot_of(run_id: str = "demo", *messages: m.Message, steps: int = 0) -> dict[str, Any]:
    view, at_seconds = new_view(run_id), 0.0
    for said in fake.fake_run(run_id, steps=steps) if steps else ():
        at_seconds = said.at_seconds
        view.fold(said.message, sent_unix_seconds=1.8e9 + at_seconds, at_seconds=at_seconds)
    for message in messages:
        view.fold(message, sent_unix_seconds=1.8e9 + at_seconds, at_seconds=at_seconds)
    return as_dict(view, now_seconds=at_seconds + 1.0)


def shown(
    snapshot: Mapping[str, Any], width: int = 80, height: int = 24, *, ascii_only: bool = False
) -> list[str]:
    return [line.plain for line in screen(snapshot, width, height, ascii_only=ascii_only).renderables]


def test_80_by_24_shows_the_run_in_words() -> None:
    snapshot = snapshot_of(steps=600)
    text = "\n".join(shown(snapshot))
    assert "demo  RUNNING" in text
    assert snapshot["run"]["words"].split(". ")[0] in " ".join(text.split())
    assert f"{snapshot['progress']['step']}/1,000" in text
    assert "ETA" in text
    assert f"{snapshot['counters']['accepted']} kept" in text
    assert re.search(r"step +592 +\+10 +kept +2\.0201 against 2\.0401", text)
    assert re.search(r"trainer +alive +running +step 605 .*heartbeat \d\.\d s ago", text)
    assert "8.8 of 16.0 GiB" in text
    assert "┃" in text
    assert re.search(r"\d\d:\d\d:\d\d warning memory level cleanup", text)
    assert "order cleanup done" in text
    assert text.endswith("q leaves")


@pytest.mark.parametrize("steps", [0, 30, 600])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (20, 5), (40, 10), (80, 24), (200, 70)])
def test_a_screen_never_exceeds_the_terminal(width: int, height: int, steps: int) -> None:
    wide = m.Alert(node="monitor", severity="error", kind="x", text="漢字" * 200, step=1)
    lines = shown(snapshot_of("漢字" * 40, wide, steps=steps), width, height)
    assert 1 <= len(lines) <= height
    assert max(cell_len(line) for line in lines) <= width


def test_more_room_shows_more() -> None:
    snapshot = snapshot_of(steps=600)
    sizes = [len(shown(snapshot, 100, height)) for height in (12, 24, 40)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]


def test_what_a_run_says_is_neither_markup_nor_control() -> None:
    snapshot = snapshot_of(
        ATTACK,
        fake.started(ATTACK),
        fake.heartbeat(),
        m.Alert(node=ATTACK, severity="error", kind="x", text=ATTACK, step=1),
        m.MemoryOrder(order_id="1.1", action=m.MemoryAction.CLEANUP, reason=ATTACK),
        m.PhaseVeto(veto_id="1", active=True, reason=ATTACK, valid_seconds=5.0),
        fake.sample(None, reason=ATTACK),
        fake.outcome(1, m.Verdict.ACCEPTED),
    )
    out = io.StringIO()
    Console(file=out, width=200, height=50, force_terminal=True, color_system="truecolor").print(
        screen(snapshot, 200, 50)
    )
    text = out.getvalue()
    assert text.count("[red]x[/red][link=http://x]") >= 5
    assert "\x1b]" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    plain = "\n".join(shown(snapshot, 200, 50))
    assert "\x1b" not in plain


def test_without_colour_every_word_is_still_there() -> None:
    snapshot = snapshot_of(steps=600)
    out = io.StringIO()
    wish = {"NO_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    console = Console(file=out, width=80, height=24, force_terminal=True, _environ=wish)
    console.print(screen(snapshot, 80, 24))
    colours = re.findall(r"\x1b\[([\d;]*)m", out.getvalue())
    assert not [code for code in colours if re.search(r"\b[34]\d\b", code)]
    assert "RUNNING" in out.getvalue()


def test_an_ascii_terminal_gets_ascii_of_the_same_shape() -> None:
    snapshot = snapshot_of("漢字", steps=600)
    lines = shown(snapshot, ascii_only=True)
    assert all(line.isascii() for line in lines)
    assert len(lines) == len(shown(snapshot))


def test_what_is_not_known_is_a_dash_and_never_zero() -> None:
    text = "\n".join(shown(snapshot_of()))
    assert "STARTING" in text
    assert "ETA –" in text
    assert "loss –" in text
    assert "unknown: no sample yet" in text
    assert "no jump was tried so far" in text
    assert "heartbeat – ago" in text


def test_before_the_first_snapshot_the_screen_says_so() -> None:
    assert shown({})[0] == "Reading the run."


def test_a_falling_curve_falls_and_a_value_that_is_no_number_is_a_mark() -> None:
    points = [(step, 8.0 * 0.9**step) for step in range(40)]
    rows = sparkline(points, [(20, "NaN")], 40, 3)
    heights = [sum(" ▁▂▃▄▅▆▇█".index(row[column]) for row in rows[1:]) for column in range(40)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] > heights[-1] >= 1
    assert rows[0][20] == "×"
    assert all(len(row) == 40 for row in rows)


@pytest.mark.parametrize("points", [[], [(5, 2.0)], [(0, 1.0), (9, 1.0)], [(0, -1.0), (9, 0.0)], [(0, None)]])
def test_any_curve_can_be_drawn(points: list[tuple[int, float | None]]) -> None:
    rows = sparkline(points, [], 10, 2)
    assert rows == [] or [len(row) for row in rows] == [10, 10]


class AwayBus(MemoryBus):
    """Answers until `away`."""

    away = False

    def read_after(self, *arguments: Any, **options: Any) -> Any:
        if self.away:
            raise BusUnavailable("no answer from [b]server[/b]")
        return super().read_after(*arguments, **options)


def test_a_server_that_goes_away_is_said_on_the_screen_and_q_still_leaves() -> None:
    bus, clock, out = AwayBus(MemoryServer(), "demo"), FakeClock(1_000.0), io.StringIO()
    fake.publish(bus, fake.fake_run("demo", steps=30), now_unix_seconds=clock.unix(), ago_seconds=4.0)
    console = Console(file=out, width=100, height=24, force_terminal=True, color_system=None)
    turns = 0

    def pressed() -> str:
        nonlocal turns
        turns += 1
        clock.advance(1.0)
        bus.away = turns > 10
        return "q" if "no answer" in out.getvalue() or turns > 500 else ""

    follow(bus, "demo", clock, threading.Event(), console, pressed)
    assert turns < 500
    assert "q leaves · live" in out.getvalue()
    assert re.search(r"no answer for \d+ s: no answer from \[b\]server\[/b\]", out.getvalue())


def test_a_stop_ends_it() -> None:
    stop = threading.Event()
    stop.set()
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    follow(MemoryBus(MemoryServer(), "x"), "x", FakeClock(), stop, console, lambda: "")


@pytest.mark.parametrize("force_terminal", [True, False])
def test_a_run_that_does_not_exist_is_said_as_status_says_it(force_terminal: bool) -> None:
    from monitor_node.serve import read_run

    bus, clock = MemoryBus(MemoryServer(), "none"), FakeClock()
    with pytest.raises(EnvironmentFault) as of_status:
        read_run(bus, "none", clock)
    console = Console(file=io.StringIO(), force_terminal=force_terminal, _environ={"TERM": "xterm"})
    with pytest.raises(EnvironmentFault) as of_top:
        top(bus, "none", clock, threading.Event(), console)
    assert str(of_top.value) == str(of_status.value)
