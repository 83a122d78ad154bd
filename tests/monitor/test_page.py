"""The page in a real browser: it shows the run, follows it live, and never runs what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from common import messages as m
from monitor_node.run_reader import new_view
from monitor_node.run_view import RunView
from monitor_node.snapshot import as_dict
from tests.monitor import fake_run as fake
from tests.monitor.browser import Browser
from tests.monitor.fake_controls import fake_controls
from tests.monitor.fake_snapshot import fake_snapshot
from tests.monitor.shown_page import Shown, is_drawn, opened_browser, text_of, wait_for_charts

ATTACK = "<script>document.title='stolen'</script><img src=x onerror=document.title='stolen'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as browser:
        yield browser


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Iterator[Shown]:
    shown = Shown(getattr(request, "param", "demo-run"))
    yield shown
    shown.server.stop()


def test_the_page_shows_the_run_and_follows_it_live(browser: Browser, shown: Shown) -> None:
    shown.tell(*(said.message for said in fake.fake_run("demo-run", steps=300)))
    shown.open_in(browser)
    browser.wait_until(f"{text_of('run-id')} === 'demo-run'")
    assert browser.evaluate("document.title") == "demo-run · running"
    browser.wait_until(f"{text_of('tiles')}.includes('{shown.view.loss:.4f}')")
    assert browser.evaluate("document.querySelectorAll('#proposals tr').length") == len(shown.view.jumps.rows)
    assert "trainer" in browser.evaluate(text_of("nodes"))
    browser.wait_until(is_drawn("loss-chart"), deadline_seconds=90.0)
    shown.tell(fake.observation(shown.view.step + 1, 1.2345))
    browser.wait_until(f"{text_of('tiles')}.includes('1.2345')")
    browser.wait_until("document.getElementById('loss-chart').data[0].y.at(-1) === 1.2345")
    assert browser.evaluate("document.getElementById('controls-panel').checkVisibility()") is False
    assert browser.complaints == []


def test_what_a_page_that_was_left_complained_of_is_not_held_against_the_next(browser: Browser) -> None:
    """Else a test fails by the event stream of the test before it, whose server has stopped."""
    left, opened = Shown("left"), Shown("opened")
    try:
        for shown in (left, opened):
            shown.tell(fake.started(shown.view.run_id))
        left.open_in(browser)
        left.server.stop()
        browser.wait_for_unread(b"ERR_CONNECTION_REFUSED")
        opened.open_in(browser)
        assert browser.complaints == []
    finally:
        opened.server.stop()


def test_sizes_of_readings_are_shown_as_sizes_and_every_column_has_a_heading(
    browser: Browser, shown: Shown
) -> None:
    reading = m.Reading(name="host_available", value=21.5 * 2**30, unit="B", source="x", unknown_reason="")
    shown.tell(fake.started(), replace(fake.sample(1 << 33), readings=(reading,)))
    shown.open_in(browser)
    browser.wait_until(f"{text_of('memory-words')}.includes('host available 21.50 GiB')")
    tables = browser.evaluate(
        "[...document.querySelectorAll('table')].filter((t) => t.tBodies[0].rows[0]?.cells.length > 1)"
        ".map((t) => [t.tBodies[0].id, t.tHead.rows[0].cells.length, t.tBodies[0].rows[0].cells.length])"
    )
    assert "streams" in {name for name, _, _ in tables}
    assert all(headings == cells for _, headings, cells in tables)


# Notes what the tiles say at the moment at which the chart library is asked for.
WATCH = """new MutationObserver((changes) => {
  for (const node of changes.flatMap((change) => [...change.addedNodes]))
    if (node.src?.includes('plotly.min')) window.shownThen = document.getElementById('tiles').innerText;
}).observe(document, { childList: true, subtree: true })"""


def test_the_words_are_painted_before_the_charts_are_asked_for(browser: Browser, shown: Shown) -> None:
    shown.feed.publish(fake_snapshot())
    watching = browser.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
    shown.open_in(browser)
    wait_for_charts(browser)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=watching["identifier"])
    assert "1,480" in browser.evaluate("window.shownThen")
    painted = browser.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    asked = browser.evaluate(
        "performance.getEntriesByType('resource').find((r) => r.name.includes('plotly.min')).startTime"
    )
    assert painted < asked


# Moves the page's clock: 5.1 seconds from now, at once.
LATER = "(() => { const now = performance.now.bind(performance); performance.now = () => now() + 5100 })()"


def test_without_the_chart_library_the_words_go_on_and_charts_come_later(
    browser: Browser, shown: Shown
) -> None:
    browser.call("Network.enable")
    browser.call("Network.setBlockedURLs", urls=["*plotly.min.js*"])
    shown.feed.publish(fake_snapshot())
    shown.open_in(browser)
    browser.wait_until("document.getElementById('loss-chart').dataset.empty.includes('could not be loaded')")
    shown.feed.publish(fake_snapshot(1500))
    browser.wait_until(f"{text_of('tiles')}.includes('1,500')")
    browser.call("Network.setBlockedURLs", urls=[])
    browser.evaluate(LATER)  # than the page's own patience
    shown.feed.publish(fake_snapshot(1600))
    wait_for_charts(browser)


def everywhere(value: Any, text: str) -> Any:
    """The same snapshot with `text` in place of each string that names or explains something."""
    if isinstance(value, dict):
        fixed = {"status", "liveness", "level", "state", "unit", "verdict", "phase", "severity"}
        return {
            key: item if key in fixed and isinstance(item, str) else everywhere(item, text)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [everywhere(item, text) for item in value]
    return text if isinstance(value, str) else value


def view_of_controls() -> RunView:
    view = new_view("demo-run")
    for _, message, at_seconds in fake_controls():
        view.fold(message, sent_unix_seconds=at_seconds, at_seconds=at_seconds)
    return view


def test_what_a_run_says_is_shown_as_text_and_never_run(browser: Browser, shown: Shown) -> None:
    snapshot = fake_snapshot()
    hostile = everywhere({name: part for name, part in snapshot.items() if name != "series"}, ATTACK)
    series = snapshot["series"] | {
        "proposals": [[*row[:5], ATTACK] for row in snapshot["series"]["proposals"]],
        "order_marks": [[at, ATTACK, answer] for at, _, answer in snapshot["series"]["order_marks"]],
    }
    with_controls = as_dict(view_of_controls(), now_seconds=0.0)
    series |= {name: with_controls["series"][name] for name in ("controls", "noise_scale")}
    trials = with_controls["series"]["control_trials"]
    series["control_trials"] = [[step, ATTACK, verdict, ATTACK, kept] for step, _, verdict, _, kept in trials]
    hostile["controls"] = everywhere(with_controls["controls"], ATTACK)
    shown.feed.publish(hostile | {"series": series})
    shown.open_in(browser)
    wait_for_charts(browser)
    browser.wait_until(is_drawn("controls-chart"), deadline_seconds=90.0)
    shown_as_text = (
        "run-id words alerts orders proposals checkpoints streams settings commit diff versions holders"
        " controls-words control-trials"
    )
    for name in shown_as_text.split():
        assert ATTACK in browser.evaluate(f"document.getElementById('{name}').textContent"), name
    for name in ("timeline-chart", "controls-chart"):
        chart = browser.evaluate(
            f"document.getElementById('{name}')._fullData.map((t) => t.hovertext || '').join()"
        )
        assert "&lt;script&gt;" in chart
        assert "<script" not in chart
    assert browser.evaluate("document.querySelectorAll('main script, header script, img').length") == 0
    assert browser.evaluate("document.title").startswith("<script>")
    assert browser.complaints == []


@pytest.mark.parametrize("shown", [ATTACK], indirect=True)
def test_a_hostile_run_id_passes_the_monitor_and_does_nothing(browser: Browser, shown: Shown) -> None:
    shown.tell(
        fake.started(ATTACK),
        fake.heartbeat(),
        m.Alert(node=ATTACK, severity="error", kind="x", text=ATTACK, step=1),
        m.PhaseVeto(veto_id="1", active=True, reason=ATTACK, valid_seconds=5.0),
        m.MemoryOrder(order_id="1.1", action=m.MemoryAction.CLEANUP, reason=ATTACK),
        fake.sample(None, reason=ATTACK),
        fake.decision(1, 5, reason=ATTACK),
        fake.outcome(1, m.Verdict.ACCEPTED),
    )
    shown.open_in(browser)
    browser.wait_until(f"{text_of('run-id')}.startsWith('<script>')")
    assert ATTACK in browser.evaluate(text_of("alerts"))
    assert ATTACK in browser.evaluate(text_of("orders"))
    assert browser.evaluate("document.querySelectorAll('main script, header script, img').length") == 0
    assert browser.complaints == []


def test_inline_code_is_refused_by_the_policy(browser: Browser, shown: Shown) -> None:
    """Were a text ever shown as markup, the browser still would not run it."""
    shown.tell(fake.started())
    shown.open_in(browser)
    browser.evaluate(
        "document.body.insertAdjacentHTML('beforeend', \"<img src=x onerror='window.stolen=1'>\")"
    )
    browser.wait_until("document.querySelector('img').complete")
    assert browser.evaluate("window.stolen") is None


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_fits_its_width(browser: Browser, shown: Shown, width: int) -> None:
    shown.feed.publish(fake_snapshot())
    browser.show(width=width, height=900)
    shown.open_in(browser)
    wait_for_charts(browser)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.show(width=1280, height=900)


def test_what_is_not_known_is_a_dash_and_never_zero(browser: Browser, shown: Shown) -> None:
    unknown = as_dict(shown.view, now_seconds=0.0)  # nothing was heard of this run
    shown.feed.publish(unknown | {"server": {"connected": True, "away_seconds": 0}})
    shown.open_in(browser)
    browser.wait_until(f"{text_of('tiles')}.includes('memory')")
    tiles = browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.tile')]"
        ".map((t) => [t.querySelector('dt').innerText, t.querySelector('dd').firstChild.data]))"
    )
    for name in ("training loss", "held-out loss", "time left", "against plain", "memory", "phase"):
        assert tiles[name] == "–", name
    assert browser.evaluate(text_of("memory-level")) == "unknown"
    assert browser.evaluate(text_of("verdict")) == "no verdict yet"
    assert browser.evaluate(text_of("settings")) in ("", "not known yet")
    assert "nothing to draw yet" in browser.wait_until(
        "document.getElementById('loss-chart').dataset.empty.startsWith('nothing') "
        "&& document.getElementById('loss-chart').dataset.empty",
        deadline_seconds=90.0,
    )
    assert browser.complaints == []


def test_sections_that_are_missing_or_null_break_nothing(browser: Browser, shown: Shown) -> None:
    new = ("stream_health", "timing", "pace", "checkpoints", "provenance", "actions", "holder_names", "marks")
    whole = fake_snapshot()
    shown.feed.publish({name: part for name, part in whole.items() if name not in new})
    shown.open_in(browser)
    wait_for_charts(browser)
    shown.feed.publish(whole | dict.fromkeys(new) | {"progress": whole["progress"] | {"loss": 1.5}})
    browser.wait_until(f"{text_of('tiles')}.includes('1.5000')")
    assert browser.complaints == []


def test_losses_that_are_not_numbers_are_marks(browser: Browser, shown: Shown) -> None:
    marks = {"train": [[700, "NaN"], [900, "inf"]], "held_out": []}
    shown.feed.publish(fake_snapshot() | {"marks": marks})
    shown.open_in(browser)
    browser.wait_until(f"{text_of('loss-note')}.includes('NaN at step 700, inf at step 900')")
    browser.wait_until(is_drawn("loss-chart"), deadline_seconds=90.0)
    drawn = "[...document.querySelectorAll('#loss-chart .textpoint text')].map((t) => t.textContent)"
    assert browser.wait_until(f"{drawn}.length > 0 && {drawn}") == ["NaN", "inf"]
    assert browser.evaluate("document.querySelectorAll('#loss-chart .shapelayer path').length") == 2


def test_a_viewer_is_told_when_the_monitor_goes_away(browser: Browser, shown: Shown) -> None:
    shown.tell(fake.started())
    shown.open_in(browser)
    browser.wait_until(f"{text_of('link')} === 'live'")
    shown.server.stop()
    browser.wait_until(f"{text_of('link')}.includes('not reachable')")
    assert browser.evaluate(text_of("run-id")) == "demo-run"


def test_the_made_up_snapshot_has_the_shape_of_the_real_one(shown: Shown) -> None:
    shown.tell(*(said.message for said in fake.fake_run("demo-run", steps=300)))
    real, made_up = as_dict(shown.view, now_seconds=30.0), fake_snapshot()
    assert real.keys() == made_up.keys() - {"server", "actions"}
    assert real["series"].keys() == made_up["series"].keys()
    for name in ("run", "progress", "pace", "timing", "counters", "memory", "provenance", "marks"):
        assert real[name].keys() == made_up[name].keys(), name
    for name in ("proposals", "nodes", "stream_health", "checkpoints"):
        row = real[name][0]
        assert {key.removesuffix("_marker") for key in row} == made_up[name][0].keys(), name
