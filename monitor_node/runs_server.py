"""`monitor-node compare`: serves one page that lays the runs of a folder side by side. Read-only.

GET / and /compare   the page           GET /api/runs       every run as JSON; 204 if ?have= is the newest
GET /static/...      its files          GET /api/runs.csv   the table

Owns how often the folder is read: when a page asks, at most once a second for all pages together.
Knows no bus. The safety of web.py holds here too: loopback, foreign Host headers refused, strict policy.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from common.clock import Clock, SystemClock
from common.errors import EnvironmentFault
from monitor_node.page_files import file_routes
from monitor_node.runs import Run, RunsFolder, plain_text, settings_that_differ
from monitor_node.web import AppServer, Guard

READ_SECONDS = 1.0
COLUMNS = (
    "name", "task", "status", "steps", "loss_first", "loss_last", "seconds", "kept", "refused",
    "virtual_share",
)  # fmt: skip
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


class RunsTable:
    """The newest reading of a folder, shared by all pages."""

    def __init__(self, folder: RunsFolder, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._read_at_seconds: float | None = None
        self._runs: list[Run] = []
        self._body = b""
        self._revision = ""

    def newest(self) -> tuple[str, bytes, list[Run]]:
        """(revision, JSON, runs). Raises EnvironmentFault when the folder cannot be read."""
        with self._lock:
            now_seconds = self._clock.monotonic()
            if self._read_at_seconds is None or now_seconds - self._read_at_seconds >= READ_SECONDS:
                self._runs, note = self._folder.read()
                self._read_at_seconds = now_seconds
                found = as_dict(self._runs, plain_text(self._folder.path), note)
                text = json.dumps(found, allow_nan=False, separators=(",", ":"))
                self._revision = hashlib.sha256(text.encode()).hexdigest()[:16]
                self._body = json.dumps({"revision": self._revision})[:-1].encode() + b"," + text[1:].encode()
            return self._revision, self._body, self._runs


def as_dict(runs: Sequence[Run], folder: str, note: str) -> dict[str, Any]:
    """What the page draws. Of the settings only those that are not the same in all runs."""
    keys = settings_that_differ(list(runs))
    rows = [
        asdict(run) | {"settings": {key: run.settings.get(key) for key in keys}, "curve": run.curve}
        for run in runs
    ]
    return {"folder": folder, "note": note, "setting_keys": keys, "runs": rows}


def as_csv(runs: Sequence[Run]) -> str:
    """The table with a heading. A text that a spreadsheet would run as a formula gets an apostrophe."""
    keys = settings_that_differ(list(runs))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*COLUMNS, "problems", *map(_cell, keys)])
    for run in runs:
        values = [getattr(run, name) for name in COLUMNS]
        if run.loss_last is None:
            values[COLUMNS.index("loss_last")] = run.loss_last_marker
        settings = [run.settings.get(key) for key in keys]
        writer.writerow(_cell(value) for value in (*values, "; ".join(run.problems), *settings))
    return out.getvalue()


def page_routes(table: RunsTable) -> list[Route]:
    """What compare.js asks for. Not coroutines: they wait for a disk, so Starlette calls them in threads."""

    def runs_json(request: Request) -> Response:
        try:
            revision, body, _ = table.newest()
        except EnvironmentFault as error:
            return JSONResponse({"error": plain_text(error)}, status_code=503)
        if request.query_params.get("have") == revision:
            return Response(status_code=204)
        return Response(body, media_type="application/json")

    def runs_csv(request: Request) -> Response:
        try:
            _, _, runs = table.newest()
        except EnvironmentFault as error:
            return PlainTextResponse(plain_text(error), status_code=503)
        headers = {"Content-Disposition": 'attachment; filename="runs.csv"'}
        return Response(as_csv(runs), media_type="text/csv", headers=headers)

    return [Route("/api/runs", runs_json), Route("/api/runs.csv", runs_csv)]


def build_app(table: RunsTable, *, allowed_hosts: Sequence[str]) -> ASGIApp:
    async def no_icon(request: Request) -> Response:
        return Response(status_code=204)

    files = [route for route in file_routes() if route.path != "/"]  # that one shows a single run
    page = next(route for route in files if route.path == "/compare")
    routes = [Route("/", page.endpoint), Route("/favicon.ico", no_icon), *page_routes(table), *files]
    return Guard(Starlette(routes=routes), allowed_hosts)


class ComparePage(AppServer):
    """Serves while a `with` block runs."""

    def __init__(self, runs_dir: Path, *, host: str, port: int, clock: Clock | None = None) -> None:
        """Raises UserError without such a folder or such an address. Port 0 takes any free one."""
        table = RunsTable(RunsFolder(runs_dir), clock or SystemClock())
        super().__init__(lambda hosts: build_app(table, allowed_hosts=hosts), host=host, port=port)

    def __enter__(self) -> ComparePage:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value
