"""The page of one run also compares: every run beside it, where its folder is known, and nothing else."""

from __future__ import annotations

import contextlib
import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

from common.clock import FakeClock
from monitor_node.feed import Feed
from monitor_node.serve import comparison_routes
from monitor_node.web import PageServer
from tests.monitor.run_folders import make_run


def answer(record_file: Path | None, path: str) -> tuple[int, bytes]:
    routes = comparison_routes(record_file, FakeClock())
    server = PageServer(Feed("boot"), host="127.0.0.1", port=0, more_routes=routes)
    server.start()
    try:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60.0)
        with contextlib.closing(connection):
            connection.request("GET", path)
            with connection.getresponse() as found:
                return found.status, found.read()
    finally:
        server.stop()


def test_the_page_of_a_run_compares_all_runs_beside_it(tmp_path: Path) -> None:
    own = make_run(tmp_path, "one")
    make_run(tmp_path, "two")
    status, body = answer(own / "recording.hpt", "/api/runs")
    assert (status, [run["name"] for run in json.loads(body)["runs"]]) == (200, ["one", "two"])
    assert b"compare.js" in answer(own / "recording.hpt", "/compare")[1]


def test_a_recording_that_lies_in_no_run_folder_shows_no_folder(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    for file in (tmp_path / "private" / "tape.hpt", tmp_path / "gone" / "tape.hpt", None):
        assert answer(file, "/api/runs")[0] == 404
