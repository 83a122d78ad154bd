"""How a viewer looks at the page: zoom, permalink, smoothing, keys, downloads, and the buttons that act."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.monitor.browser import Browser
from tests.monitor.fake_memory import at_unix_seconds
from tests.monitor.fake_snapshot import fake_snapshot
from tests.monitor.shown_page import (
    CHART_SECONDS,
    Shown,
    is_drawn,
    layout_of,
    opened_browser,
    text_of,
    wait_for_charts,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as browser:
        yield browser


@pytest.fixture
def shown() -> Iterator[Shown]:
    shown = Shown("made-up-run")
    shown.feed.publish(fake_snapshot())
    yield shown
    shown.server.stop()


def inside(browser: Browser, chart: str, x: float, y: float) -> tuple[float, float]:
    """Pixels of a place in the chart, given as shares of its width and height."""
    left, top, width, height = browser.evaluate(
        f"(() => {{ document.getElementById('{chart}').scrollIntoView({{block: 'center'}});"
        f" const r = document.querySelector('#{chart} .nsewdrag').getBoundingClientRect();"
        " return [r.left, r.top, r.width, r.height] })()"
    )
    return left + x * width, top + y * height


def module(name: str, expression: str) -> str:
    """JavaScript that asks one of the page's own modules."""
    return f"import('/static/{name}').then((m) => ({expression}))"


def test_zoom_survives_updates_and_holds_in_every_chart_of_steps(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    wait_for_charts(browser)
    browser.drag(inside(browser, "loss-chart", 0.3, 0.2), inside(browser, "loss-chart", 0.6, 0.8))
    browser.wait_until("location.hash.includes('from=')")
    zoomed = browser.evaluate(f"{layout_of('loss-chart')}.xaxis.range")
    assert 380 < zoomed[0] < 520
    assert 800 < zoomed[1] < 1000
    heights = browser.evaluate(f"{layout_of('loss-chart')}.yaxis.range")
    said = "['low', 'high'].map((end) => Math.log10(new URLSearchParams(location.hash.slice(1)).get(end)))"
    assert heights == pytest.approx(browser.evaluate(said), abs=1e-6)
    later = fake_snapshot(1700)
    shown.feed.publish(later)
    newest = later["series"]["train"][-1][1]
    browser.wait_until(f"document.getElementById('loss-chart').data[0].y.at(-1) === {newest!r}")
    assert browser.evaluate(f"{layout_of('loss-chart')}.xaxis.range") == pytest.approx(zoomed)
    assert browser.evaluate(f"{layout_of('loss-chart')}.yaxis.range") == pytest.approx(heights)
    assert browser.evaluate(f"{layout_of('timeline-chart')}.xaxis.range") == pytest.approx(zoomed)
    browser.press("r")
    browser.wait_until(f"{layout_of('loss-chart')}.xaxis.range[0] === 0")
    assert browser.evaluate(f"{layout_of('loss-chart')}.xaxis.range[1]") > 1700
    assert browser.evaluate("location.hash") == ""
    assert browser.complaints == []


def test_the_time_of_a_resumed_run_counts_from_its_beginning(browser: Browser, shown: Shown) -> None:
    """What was before the resume is not drawn at one place."""
    page = fake_snapshot()
    page["run"]["started_unix_seconds"] = page["series"]["seconds"][-2][1]
    shown.feed.publish(page)
    shown.open_in(browser)
    places = "((axis) => [0, 300, 600, 900, 1200].map(axis.of))(m.axisFor('time'))"
    browser.wait_until("document.getElementById('x-axis').options[1].disabled === false")
    found = browser.evaluate(module("feed.js", "m.state.run.started_unix_seconds"))
    assert found == page["run"]["started_unix_seconds"]
    times = browser.evaluate(module("axis.js", places))
    assert times == sorted(set(times))
    assert times[0] >= 0.0


def test_a_difference_that_is_cut_says_so(browser: Browser, shown: Shown) -> None:
    page = fake_snapshot()
    for lines, end in ((3005, "(5 more lines are not shown)"), (3000, "+line 2999\n")):
        diff = "\n".join(f"+line {number}" for number in range(lines))
        page = page | {"provenance": page["provenance"] | {"git_diff": diff}}
        shown.feed.publish(page)
        shown.open_in(browser)
        said = browser.wait_until("document.getElementById('diff').textContent.length > 9000 && document"
                                  ".getElementById('diff').textContent")  # fmt: skip
        assert said.endswith(end)


def test_sizes_that_are_not_nothing_are_not_called_zero(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    sizes = "[null, 0, 1, 300000, 1048576, 3221225472].map(m.bytes)"
    assert browser.evaluate(module("words.js", sizes)) == [
        "–",
        "0 MiB",
        "1 KiB",
        "293 KiB",
        "1 MiB",
        "3.00 GiB",
    ]


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_buttons_stand_beside_the_heading_of_their_panel(browser: Browser, shown: Shown, width: int) -> None:
    browser.show(width=width, height=900)
    try:
        shown.open_in(browser)
        browser.wait_until("document.querySelector('.panel-head .save button')?.checkVisibility()")
        places = "[...document.querySelectorAll('.panel-head')].filter((e) => e.querySelector('.save'))"
        middle = "((r) => (r.top + r.bottom) / 2)(e.querySelector('{}').getBoundingClientRect())"
        apart = f"{places}.map((e) => Math.abs({middle.format('h2')} - {middle.format('.save')}))"
        distances = browser.evaluate(apart)
    finally:
        browser.show(width=1280, height=900)
    assert len(distances) >= 4
    assert max(distances) < 10


def test_zoom_of_memory_survives_updates(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    wait_for_charts(browser)
    browser.drag(inside(browser, "memory-chart", 0.2, 0.3), inside(browser, "memory-chart", 0.5, 0.6))
    browser.wait_until("location.hash.includes('since=')")
    seconds = f"{layout_of('memory-chart')}.xaxis.range.map((end) => end.slice(0, 21))"
    zoomed = browser.evaluate(seconds)
    shown.feed.publish(fake_snapshot(1700))
    browser.wait_until(f"{text_of('tiles')}.includes('1,700')")
    newest = (
        f"document.getElementById('memory-chart').data[0].x.at(-1).getTime() / 1000 > {at_unix_seconds(1650)}"
    )
    browser.wait_until(newest)
    assert browser.evaluate(seconds) == zoomed


def test_a_permalink_restores_the_view(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser, "/#scale=linear&x=time&smooth=0.5&from=60&to=240")
    wait_for_charts(browser)
    assert browser.evaluate("document.getElementById('log-loss').checked") is False
    assert browser.evaluate("document.getElementById('x-axis').value") == "time"
    assert browser.evaluate("document.getElementById('smooth').value") == "0.5"
    assert browser.evaluate(f"{layout_of('loss-chart')}.yaxis.type") == "linear"
    assert browser.evaluate(f"{layout_of('loss-chart')}.xaxis.range") == pytest.approx([1, 4])  # minutes
    assert "minutes" in browser.evaluate(f"{layout_of('loss-chart')}.xaxis.title.text")


@pytest.mark.parametrize(
    "view", ["/#scale=<b>&x=nonsense&smooth=NaN&from=9&to=3&low=x", "/#smooth=1e9&from=-1e400"]
)
def test_a_nonsense_permalink_shows_the_whole_run(browser: Browser, shown: Shown, view: str) -> None:
    shown.open_in(browser, view)
    browser.wait_until(is_drawn("loss-chart"), deadline_seconds=CHART_SECONDS)
    assert browser.evaluate(f"{layout_of('loss-chart')}.xaxis.range[0]") == 0
    assert browser.evaluate("Number(document.getElementById('smooth').value)") <= 0.99
    assert browser.complaints == []


def test_x_goes_by_step_time_or_tokens(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    wait_for_charts(browser)
    last = "document.getElementById('loss-chart').data[0].x.at(-1)"
    assert browser.evaluate(last) == 1480
    browser.press("x")
    browser.wait_until(f"Math.abs({last} - {1480 * 0.42 / 60}) < 1e-6")
    browser.press("x")
    browser.wait_until(f"{last} === {1480 * 16384}")


def test_keys_change_the_view_and_question_mark_lists_them(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    browser.press("l")
    browser.wait_until("location.hash === '#scale=linear'")
    browser.press("[")
    assert "smooth=0.7" in browser.evaluate("location.hash")
    browser.press("?")
    assert browser.evaluate("document.getElementById('keys-dialog').open") is True
    assert browser.evaluate("document.querySelectorAll('#keys kbd').length") >= 8
    browser.press("l")  # the list is open: keys go to it
    assert "scale=linear" in browser.evaluate("location.hash")


def test_hovering_tells_why_and_breaks_no_policy(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    wait_for_charts(browser)
    index = next(
        place for place, row in enumerate(fake_snapshot()["series"]["proposals"]) if row[2] == "refused"
    )
    row = fake_snapshot()["series"]["proposals"][index]
    x, y = inside(browser, "timeline-chart", 0, 0)
    place = browser.evaluate(
        f"(() => {{ const l = {layout_of('timeline-chart')};"
        f" return [l.xaxis.d2p({row[0]}), l.yaxis.d2p({row[1]})] }})()"
    )
    browser.hover(x + place[0] - 3, y + place[1])
    browser.hover(x + place[0], y + place[1])
    texts = "[...document.querySelectorAll('#timeline-chart .hoverlayer text')]"
    label = f"{texts}.map((t) => t.textContent).join(' ')"
    browser.wait_until(f"{label}.includes('refused')")
    assert row[5] in browser.evaluate(label)
    browser.hover(*inside(browser, "memory-chart", 0.4, 0.6))
    browser.wait_until("document.querySelector('#memory-chart .hoverlayer text') !== null")
    assert browser.complaints == []


def test_smoothing_keeps_a_constant_and_weight_zero_keeps_all(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    points = [[1, 2.0], [2, 2.0], [5, 2.0]]
    smooth = browser.evaluate(module("smooth.js", f"m.smoothed({json.dumps(points)}, 0.9)"))
    assert smooth == [pytest.approx(point) for point in points]
    rough = [[1, 3.0], [2, -1.0]]
    assert browser.evaluate(module("smooth.js", f"m.smoothed({json.dumps(rough)}, 0)")) == rough
    first, second = browser.evaluate(module("smooth.js", f"m.smoothed({json.dumps(rough)}, 0.5)"))
    assert first[1] == 3.0
    assert second[1] == pytest.approx((0.25 * 3 - 0.5) / 0.75)


def test_downloads_hold_what_is_shown_and_no_formula(browser: Browser, shown: Shown) -> None:
    snapshot = fake_snapshot()
    snapshot["series"]["proposals"][0][5] = '=HYPERLINK("http://evil"), "x"'
    shown.feed.publish(snapshot | {"marks": {"train": [[700, "NaN"]], "held_out": []}})
    shown.open_in(browser)
    loss = browser.evaluate(module("download.js", "m.csvOf('loss')")).splitlines()
    assert loss[0] == "curve,step,loss,spread"
    step, value = snapshot["series"]["train"][0]
    assert loss[1] == f"train,{step},{value!r},"
    assert "train,700,NaN," in loss
    timeline = browser.evaluate(module("download.js", "m.csvOf('timeline')")).splitlines()
    assert timeline[1].endswith(',"\'=HYPERLINK(""http://evil""), ""x"""')
    vetoed = next(line for line in timeline if ",vetoed," in line)
    assert ",vetoed,,," in vetoed, "what is not known is empty, not 0"
    everything = json.loads(browser.evaluate(module("download.js", "m.jsonOf('snapshot')")))
    assert everything["series"]["train"] == snapshot["series"]["train"]


def test_a_whole_delta_forgets_what_an_earlier_monitor_said(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    delta = {
        "whole": True,
        "set": {"run": {"run_id": "other"}},
        "curves": {"train": {"keep": 0, "add": [[1, 2]]}},
    }
    known = browser.evaluate(module("feed.js", f"(m.take({json.dumps(delta)}), m.state)"))
    assert known == {"run": {"run_id": "other"}, "series": {"train": [[1, 2]]}}


# --- acting ----------------------------------------------------------------------------------

ASKED = (
    "window.asked = [];"
    " window.fetch = async (url, o) => { window.asked.push([url, o]); return { ok: %s, status: %d } }"
)


def with_actions(**more: Any) -> dict[str, Any]:
    return fake_snapshot() | {"actions": {"enabled": True, "paused": False} | more}


def act_with_token(browser: Browser, token: str, *, ok: bool, status: int) -> None:
    browser.evaluate("sessionStorage.clear()")
    browser.evaluate(ASKED % (str(ok).lower(), status))
    browser.evaluate("document.querySelector('[data-action=checkpoint]').click()")
    browser.wait_until("document.getElementById('token-dialog').open")
    browser.evaluate(
        f"document.getElementById('token').value = '{token}',"
        " document.querySelector('#token-dialog [value=ok]').click()"
    )
    browser.wait_until(f"window.asked.length === 1 && {text_of('action-words')} !== ''")


def test_without_a_token_there_are_no_buttons(browser: Browser, shown: Shown) -> None:
    shown.open_in(browser)
    browser.wait_until(f"{text_of('tiles')}.includes('memory')")
    assert browser.evaluate("document.getElementById('actions').checkVisibility()") is False
    shown.feed.publish(with_actions())
    browser.wait_until("document.getElementById('actions').checkVisibility()")


def test_the_token_is_asked_for_once_and_goes_into_the_header(browser: Browser, shown: Shown) -> None:
    shown.feed.publish(with_actions())
    shown.open_in(browser)
    browser.wait_until("document.getElementById('actions').checkVisibility()")
    act_with_token(browser, "secret", ok=True, status=204)
    browser.evaluate("document.getElementById('act-pause').click()")
    browser.wait_until("window.asked.length === 2")
    urls = browser.evaluate(
        "window.asked.map(([url, o]) => [url, o.method, o.body, o.headers.Authorization])"
    )
    assert urls == [
        [f"/api/actions/{action}", "POST", "{}", "Bearer secret"] for action in ("checkpoint", "pause")
    ]
    shown.feed.publish(with_actions(paused=True))
    browser.wait_until(f"{text_of('act-pause')} === 'Resume prediction'")


def test_a_refused_token_is_forgotten_and_said_to_be_wrong(browser: Browser, shown: Shown) -> None:
    shown.feed.publish(with_actions())
    shown.open_in(browser)
    browser.wait_until("document.getElementById('actions').checkVisibility()")
    act_with_token(browser, "wrong", ok=False, status=401)
    assert "wrong token" in browser.evaluate(text_of("action-words"))
    assert browser.evaluate("sessionStorage.length") == 0


def test_a_refusal_is_shown_with_its_reason(browser: Browser, shown: Shown) -> None:
    """The server says why, in its own words (action_door.py), and they are text."""
    shown.feed.publish(with_actions())
    shown.open_in(browser)
    browser.wait_until("document.getElementById('actions').checkVisibility()")
    answer = "{ ok: false, status: 409, text: async () => 'the run has <b>ended</b>' }"
    browser.evaluate(f"window.fetch = async () => ({answer}), sessionStorage.setItem('monitor-token', 'x')")
    browser.evaluate("document.querySelector('[data-action=checkpoint]').click()")
    browser.wait_until(f"{text_of('action-words')}.startsWith('refused')")
    assert browser.evaluate(text_of("action-words")) == "refused (409): the run has <b>ended</b>"
    browser.evaluate("sessionStorage.clear()")


def test_stopping_asks_first(browser: Browser, shown: Shown) -> None:
    shown.feed.publish(with_actions())
    shown.open_in(browser)
    browser.wait_until("document.getElementById('actions').checkVisibility()")
    browser.evaluate(ASKED % ("true", 204))
    browser.evaluate("sessionStorage.setItem('monitor-token', 'secret')")
    browser.evaluate("document.querySelector('[data-action=stop]').click()")
    assert browser.evaluate("document.getElementById('stop-dialog').open") is True
    browser.evaluate("document.querySelector('#stop-dialog [value=\"\"]').click()")
    assert browser.evaluate("window.asked.length") == 0
    browser.evaluate("document.querySelector('[data-action=stop]').click()")
    browser.evaluate("document.querySelector('#stop-dialog [value=ok]').click()")
    browser.wait_until("window.asked.length === 1 && window.asked[0][0] === '/api/actions/stop'")
    browser.evaluate("document.querySelector('[data-action=stop]').click()")
    browser.evaluate("document.getElementById('stop-dialog').close()")  # as Escape does
    browser.evaluate("document.querySelector('[data-action=checkpoint]').click()")
    browser.wait_until("window.asked.length > 1")
    assert browser.evaluate("window.asked.map((call) => call[0].split('/').pop())") == ["stop", "checkpoint"]
