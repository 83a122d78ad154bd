"""The page's files: only what is on the list; the chart library compressed once, cached by name, offline."""

from __future__ import annotations

import contextlib
import gzip
import http.client
from pathlib import Path

import pytest
from starlette.requests import Request

from monitor_node import page_files
from monitor_node.page_files import PLOTLY_PATH, ChartLibrary, accepts_gzip
from tests.faults import wait_until

DEADLINE_SECONDS = 20.0


def request(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": PLOTLY_PATH, "headers": raw})


@pytest.fixture
def library(tmp_path: Path) -> ChartLibrary:
    file = tmp_path / "plotly.min.js"
    file.write_bytes(b"chart();" * 1000)
    made = ChartLibrary(file)
    wait_until(lambda: made._compressed is not None, DEADLINE_SECONDS)
    return made


def test_the_library_is_sent_compressed_to_whoever_takes_it(library: ChartLibrary) -> None:
    packed = library.answer(request(accept_encoding="br, gzip"))
    plain = library.answer(request())
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(bytes(packed.body)) == bytes(plain.body) == b"chart();" * 1000
    assert "content-encoding" not in plain.headers
    assert len(packed.body) < len(plain.body) / 10
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"


def test_the_library_is_compressed_once(library: ChartLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise AssertionError("compressed again")

    monkeypatch.setattr(page_files.gzip, "compress", refuse)
    bodies = {bytes(library.answer(request(accept_encoding="gzip")).body) for _ in range(20)}
    assert len(bodies) == 1


def test_a_browser_that_has_the_library_gets_it_not_again(library: ChartLibrary) -> None:
    first = library.answer(request())
    assert "immutable" in first.headers["cache-control"]
    again = library.answer(request(if_none_match=first.headers["etag"]))
    assert (again.status_code, bytes(again.body)) == (304, b"")


def test_a_library_that_is_gone_is_named_with_a_cure(library: ChartLibrary, tmp_path: Path) -> None:
    (tmp_path / "plotly.min.js").unlink()
    gone = library.answer(request())
    assert gone.status_code == 404
    assert b"pip install plotly" in bytes(gone.body)


def test_the_installed_library_is_found() -> None:
    assert page_files._plotly_file() is not None
    assert page_files._plotly_version() != "none"


@pytest.mark.parametrize(
    ("header", "takes_it"),
    [
        ("", False), ("gzip", True), ("br, GZIP;q=0.5", True), ("gzip;q=0", False), ("gzip; q=0.000", False),
        ("*", True), ("*;q=0", False), ("gzip;q=0, *", False), ("identity", False), ("gzipped", False),
    ],
)  # fmt: skip
def test_gzip_is_taken_only_where_it_is_offered(header: str, takes_it: bool) -> None:
    assert accepts_gzip(header) is takes_it


def test_files_of_other_kinds_and_odd_names_are_not_on_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    for name in ("a.js", "b.css", "c.html", "d.py", "e.js.map", ".f.js", "g h.js", "i.tar.js", "token"):
        (folder / name).write_text(name)
    (folder / "folder.js").mkdir()
    with contextlib.suppress(OSError):
        (folder / "outside.css").symlink_to("/nowhere/x.css")
    monkeypatch.setattr(page_files.resources, "files", lambda package: tmp_path)
    assert sorted(page_files.page_files()) == ["/static/a.js", "/static/b.css", "/static/c.html"]


def test_an_answer_of_the_library_passes_the_guard_with_its_own_cache_rule() -> None:
    from monitor_node.feed import Feed
    from monitor_node.web import PageServer

    server = PageServer(Feed("boot"), host="127.0.0.1", port=0)
    server.start()
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    try:
        with contextlib.closing(
            http.client.HTTPConnection(host, int(port), timeout=DEADLINE_SECONDS)
        ) as caller:
            caller.request("GET", PLOTLY_PATH)
            answer = caller.getresponse()
            assert answer.status == 200
            assert "immutable" in str(answer.headers["cache-control"])
            assert answer.headers["content-security-policy"]
            answer.read()
            caller.request("GET", "/")
            assert caller.getresponse().headers["cache-control"] == "no-store"
    finally:
        server.stop()
