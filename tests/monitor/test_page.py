"""The page in a real browser: it shows the run, follows it live, and never runs what it shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from common import messages as m
from monitor_node.feed import Feed
from monitor_node.node import new_view
from monitor_node.run_view import RunView
from monitor_node.snapshot import as_dict
from monitor_node.web import PageServer
from tests.monitor import fake_run as fake
from tests.monitor.browser import Browser, chromium_path

ATTACK = "<script>document.title='stolen'</script><img src=x onerror=document.title='stolen'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium_path()
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed; CI must install it")
        pytest.skip("chromium is not installed; the page is not tested in a browser")
    with Browser(program) as browser:
        browser.show(width=1280, height=900)
        yield browser


class Shown:
    """A run on a page."""

    def __init__(self, run_id: str) -> None:
        self.view: RunView = new_view(run_id)
        self.feed = Feed("boot")
        self.server = PageServer(self.feed, host="127.0.0.1", port=0)
        self.server.start()
        self._seconds = 0.0

    def tell(self, *messages: m.Message) -> None:
        for message in messages:
            self._seconds += 0.1
            self.view.fold(message, sent_unix_seconds=self._seconds, at_seconds=self._seconds)
        snapshot: dict[str, Any] = as_dict(self.view, now_seconds=self._seconds)
        self.feed.publish(snapshot | {"server": {"connected": True, "away_seconds": 0}})


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Iterator[Shown]:
    shown = Shown(getattr(request, "param", "demo-run"))
    yield shown
    shown.server.stop()


def text_of(element: str) -> str:
    return f"document.getElementById('{element}').innerText"


def test_the_page_shows_the_run_and_follows_it_live(browser: Browser, shown: Shown) -> None:
    shown.tell(*(said.message for said in fake.fake_run("demo-run", steps=300)))
    browser.complaints.clear()
    browser.open(shown.server.url)
    browser.wait_until(f"{text_of('run-id')} === 'demo-run'")
    assert browser.evaluate("document.title") == "demo-run · running"
    loss = f"{shown.view.loss:.4f}"
    browser.wait_until(f"{text_of('tiles')}.includes('{loss}')")
    assert browser.evaluate("document.querySelectorAll('#proposals tr').length") == len(shown.view.outcomes)
    assert "trainer" in browser.evaluate(text_of("nodes"))
    shown.tell(fake.observation(301, 1.2345))
    browser.wait_until(f"{text_of('tiles')}.includes('1.2345')")
    drawn = (
        "(() => { const c = document.getElementById('chart');"
        " return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size > 20 })()"
    )
    browser.wait_until(drawn)
    assert browser.complaints == []


@pytest.mark.parametrize("shown", [ATTACK], indirect=True)
def test_what_a_run_says_is_shown_as_text_and_never_run(browser: Browser, shown: Shown) -> None:
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
    browser.complaints.clear()
    browser.open(shown.server.url)
    browser.wait_until(f"{text_of('run-id')}.startsWith('<script>')")
    assert ATTACK in browser.evaluate(text_of("alerts"))
    assert ATTACK in browser.evaluate(text_of("words"))
    assert ATTACK in browser.evaluate(text_of("orders"))
    assert browser.evaluate("document.querySelectorAll('main script, header script, img').length") == 0
    assert browser.evaluate("document.title").startswith("<script>")
    assert browser.complaints == []


def test_inline_code_is_refused_by_the_policy(browser: Browser, shown: Shown) -> None:
    """Were a text ever shown as markup, the browser still would not run it."""
    shown.tell(fake.started())
    browser.open(shown.server.url)
    browser.wait_until(f"{text_of('run-id')} === 'demo-run'")
    browser.evaluate(
        "document.body.insertAdjacentHTML('beforeend', \"<img src=x onerror='window.stolen=1'>\")"
    )
    browser.wait_until("document.querySelector('img').complete")
    assert browser.evaluate("window.stolen") is None


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_fits_its_width(browser: Browser, shown: Shown, width: int) -> None:
    shown.tell(*(said.message for said in fake.fake_run("demo-run", steps=300)))
    browser.show(width=width, height=900)
    browser.open(shown.server.url)
    browser.wait_until(f"{text_of('run-id')} === 'demo-run'")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.show(width=1280, height=900)


def test_a_viewer_is_told_when_the_monitor_goes_away(browser: Browser, shown: Shown) -> None:
    shown.tell(fake.started())
    browser.open(shown.server.url)
    browser.wait_until(f"{text_of('link')} === 'live'")
    shown.server.stop()
    browser.wait_until(f"{text_of('link')}.includes('not reachable')")
    assert browser.evaluate(text_of("run-id")) == "demo-run"
