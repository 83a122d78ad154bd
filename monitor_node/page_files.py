"""The page's own files and that of the chart library, by a list that is fixed at the start.

Nothing that a browser asks for becomes a path: it is looked up among the files found at the start. The chart
library comes from the installed plotly package, which is found but not imported.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import re
import threading
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

PLOTLY_PATH = "/static/plotly.min.js"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.html|\.css|\.js)")
# A day, not a year: the name carries no version, and ports of 127.0.0.1 are used again after an upgrade.
_LIBRARY_CACHE = "private, max-age=86400, immutable"
_START_PAGES = {"/": "index.html", "/compare": "compare.html"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PageFile:
    content: bytes
    media_type: str


def page_files() -> dict[str, PageFile]:
    """By URL path. A page that is not there is not in the list."""
    files = {}
    for entry in (resources.files("monitor_node") / "page").iterdir():
        name = _NAME.fullmatch(entry.name)
        if name is not None and entry.is_file():
            content = entry.read_bytes()
            files[f"/static/{entry.name}"] = PageFile(content=content, media_type=_MEDIA_TYPES[name[1]])
    starts = {path: files.get(f"/static/{name}") for path, name in _START_PAGES.items()}
    return files | {path: file for path, file in starts.items() if file is not None}


def file_routes() -> list[Route]:
    return [Route(PLOTLY_PATH, _library().answer), *(_route(*item) for item in page_files().items())]


def _route(path: str, file: PageFile) -> Route:
    async def page_file(request: Request) -> Response:
        return Response(file.content, media_type=file.media_type)

    return Route(path, page_file)


class ChartLibrary:
    """plotly.min.js, compressed once in a thread of its own (0.15 s) and kept so: 1.5 MB instead of 4.8."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or _plotly_file()
        self._etag = f'"plotly-{_plotly_version()}"'
        self._compressed: bytes | None = None
        if self._file is not None:
            threading.Thread(target=self._compress, name="compress", daemon=True).start()

    def answer(self, request: Request) -> Response:
        """Not a coroutine: Starlette calls it in a thread, so reading 5 MB holds up no stream."""
        headers = {"Cache-Control": _LIBRARY_CACHE, "ETag": self._etag, "Vary": "Accept-Encoding"}
        if self._etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        compressed = self._compressed
        if compressed is not None and accepts_gzip(request.headers.get("accept-encoding", "")):
            headers["Content-Encoding"] = "gzip"
            return Response(compressed, media_type="text/javascript", headers=headers)
        try:
            content = self._file.read_bytes() if self._file is not None else None
        except OSError:
            content = None
        if content is None:
            return PlainTextResponse("plotly is not installed: pip install plotly", status_code=404)
        return Response(content, media_type="text/javascript", headers=headers)

    def _compress(self) -> None:
        assert self._file is not None
        try:
            self._compressed = gzip.compress(self._file.read_bytes(), compresslevel=6, mtime=0)
        except OSError:
            self._file = None


@functools.cache
def _library() -> ChartLibrary:
    """One for all servers of this process."""
    return ChartLibrary()


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding header has gzip or * with a weight above 0; gzip's own word counts."""
    weights = {}
    for item in accept_encoding.lower().split(","):
        name, _, parameter = item.partition(";")
        weights[name.strip()] = not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", parameter)
    return weights.get("gzip", weights.get("*", False))


def _plotly_file() -> Path | None:
    found = importlib.util.find_spec("plotly")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    files = [Path(folder) / "package_data" / "plotly.min.js" for folder in folders]
    return next((file for file in files if file.is_file()), None)


def _plotly_version() -> str:
    try:
        return metadata.version("plotly")
    except metadata.PackageNotFoundError:
        return "none"
