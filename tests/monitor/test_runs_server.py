"""The page that compares runs: its table, what it serves, and what it shows in a real browser."""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from common.clock import FakeClock
from common.errors import EnvironmentFault
from monitor_node.runs import RunsFolder
from monitor_node.runs_server import ComparePage, RunsTable, as_csv
from tests.monitor.browser import Browser, chromium_path
from tests.monitor.run_folders import ATTACK, LINES, SUMMARY, evaluation, make_run, read

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 60.0


def test_the_table_as_csv_runs_no_formula(tmp_path: Path) -> None:
    make_run(tmp_path, "=cmd()", summary=SUMMARY)
    make_run(tmp_path, "two", evaluation(0, "nan"), values={"trainer": {"seed": 5}})
    rows = list(csv.reader(io.StringIO(as_csv(list(read(tmp_path).values())))))
    assert rows[0][:3] == ["name", "task", "status"]
    assert rows[0][-1] == "trainer.seed"
    assert rows[1][0] == "'=cmd()"
    assert rows[2][rows[0].index("loss_last")] == "NaN"
    assert rows[2][rows[0].index("steps")] == ""  # unknown, not zero
    assert all(len(row) == len(rows[0]) for row in rows)


def test_a_folder_is_read_at_most_once_a_second_however_many_pages_ask(tmp_path: Path) -> None:
    clock = FakeClock()
    table = RunsTable(RunsFolder(tmp_path), clock)
    revision, _, _ = table.newest()
    make_run(tmp_path, "one")
    assert table.newest()[0] == revision
    clock.advance(1.0)
    newer, body, _ = table.newest()
    assert newer != revision
    assert json.loads(body)["revision"] == newer
    clock.advance(1.0)
    assert table.newest()[0] == newer  # nothing changed


@pytest.fixture
def page(tmp_path: Path) -> Iterator[ComparePage]:
    make_run(tmp_path, "one", summary=SUMMARY)
    make_run(tmp_path, "two", *LINES[:-1], values={"trainer": {"seed": 5}})
    (make_run(tmp_path, ATTACK) / "config.toml").write_text("= 1")
    with ComparePage(tmp_path, host="127.0.0.1", port=0) as page:
        yield page


def get(page: ComparePage, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(page.url).netloc, timeout=DEADLINE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as answer:
            return answer.status, answer.read()


def test_the_page_its_data_and_its_table_are_served(page: ComparePage) -> None:
    assert get(page, "/")[1] == get(page, "/compare")[1]
    assert b"compare.js" in get(page, "/compare")[1]
    status, body = get(page, "/api/runs")
    found = json.loads(body)
    assert (status, [run["name"] for run in found["runs"]]) == (200, [ATTACK, "one", "two"])
    assert get(page, f"/api/runs?have={found['revision']}")[0] == 204
    assert get(page, "/api/runs.csv")[1].count(b"\r\n") == 4
    assert get(page, "/api/runs", Host="evil.example")[0] == 421


@pytest.mark.parametrize("reason", ["\ud800", "a\x1b[2J", ["\ud800"], 7])
def test_no_reason_of_an_end_breaks_the_table(tmp_path: Path, reason: Any) -> None:
    """Half a character has no bytes in UTF-8: such a run once made the answer a 500."""
    make_run(tmp_path, "one", *LINES[:-1], {"kind": "RunEnded", "step": 100, "reason": reason})
    with ComparePage(tmp_path, host="127.0.0.1", port=0) as page:
        status, body = get(page, "/api/runs.csv")
        (run,) = json.loads(get(page, "/api/runs")[1])["runs"]
    assert (status, body.count(b"\r\n")) == (200, 2)
    assert run["status"].isprintable()


def test_a_folder_that_goes_away_is_said_and_not_a_crash(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    clock = FakeClock()
    table = RunsTable(RunsFolder(folder), clock)
    table.newest()
    folder.rmdir()
    clock.advance(2.0)
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        table.newest()


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


COLUMN = "[...document.querySelectorAll('#rows tr')].map(r => r.children[{}].firstChild?.textContent)"


def test_the_page_draws_the_runs_sorts_them_and_follows_the_folder(
    page: ComparePage, browser: Browser, tmp_path: Path
) -> None:
    browser.open_fresh(page.url)
    browser.wait_until(
        "document.querySelectorAll('#rows tr').length === 3", deadline_seconds=DEADLINE_SECONDS
    )
    assert browser.evaluate(COLUMN.format(1)) == [ATTACK, "one", "two"]
    assert "config.toml is not valid TOML" in browser.evaluate("document.getElementById('rows').innerText")
    assert browser.evaluate("document.querySelectorAll('main img').length") == 0
    traces = "document.querySelectorAll('#chart .scatterlayer .trace').length"
    browser.wait_until(f"{traces} === 3", deadline_seconds=DEADLINE_SECONDS)
    loss = "document.querySelector('button[data-key=loss]')"
    browser.evaluate(f"{loss}.click()")
    browser.evaluate(f"{loss}.click()")
    assert browser.evaluate(COLUMN.format(4)) == ["3.0000", "3.0000", "2.9000"]
    assert "sort=loss&down=yes" in browser.evaluate("location.hash")
    browser.evaluate("document.querySelector('#rows input').click()")
    browser.wait_until(f"{traces} === 2", deadline_seconds=DEADLINE_SECONDS)
    make_run(tmp_path, "three", summary=SUMMARY | {"val_loss_last": None})
    browser.wait_until(
        "document.querySelectorAll('#rows tr').length === 4", deadline_seconds=DEADLINE_SECONDS
    )
    assert browser.evaluate("document.title") == "Runs"
    assert browser.complaints == []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_width(page: ComparePage, browser: Browser, width: int) -> None:
    browser.show(width=width, height=900)
    browser.open(page.url)
    browser.wait_until(
        "document.querySelectorAll('#rows tr').length === 3", deadline_seconds=DEADLINE_SECONDS
    )
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def command(*arguments: str) -> subprocess.Popen[str]:
    whole = [sys.executable, "-m", "monitor_node", "compare", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(whole, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_the_command_says_its_address_and_ends_with_0(tmp_path: Path) -> None:
    with command(str(tmp_path), "--http", "127.0.0.1:0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("page   http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [(["none"], "holds the runs"), ([".", "--http", "8081"], "HOST:PORT"), ([], "RUNS_DIR")],
)
def test_bad_input_exits_2_and_names_the_cure(arguments: list[str], cure: str) -> None:
    process = command(*arguments)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 2
    assert cure in errors
    assert "Traceback" not in errors
