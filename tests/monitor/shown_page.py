"""A page in a real browser for tests: a browser for a module, a server for a test, what they are asked.

Two ways to fill it: messages folded as the monitor does, or a made-up snapshot (fake_snapshot.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from common import messages as m
from monitor_node.feed import Feed
from monitor_node.node import new_view
from monitor_node.run_view import RunView
from monitor_node.snapshot import as_dict
from monitor_node.web import PageServer
from tests.monitor.browser import Browser, chromium_path

CHARTS = ("loss-chart", "timeline-chart", "pace-chart", "memory-chart")
CHART_SECONDS = 90.0  # plotly is 5 MB of source, and the machine may be busy


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """Skips where there is no Chromium; in CI that is a failure."""
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

    def open_in(self, browser: Browser, view: str = "") -> None:
        """Waits for the words; `view` is what stands behind # in the address."""
        browser.open_fresh(self.server.url + view)
        browser.wait_until("document.getElementById('run-id')?.innerText.length > 1")


def text_of(element: str) -> str:
    return f"document.getElementById('{element}').innerText"


def layout_of(chart: str) -> str:
    return f"document.getElementById('{chart}')._fullLayout"


def is_drawn(chart: str) -> str:
    return f"document.getElementById('{chart}').classList.contains('js-plotly-plot')"


def wait_for_charts(browser: Browser) -> None:
    for chart in CHARTS:
        browser.wait_until(is_drawn(chart), deadline_seconds=CHART_SECONDS)
