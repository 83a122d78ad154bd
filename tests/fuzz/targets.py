"""What the bytes of a stranger may do, by target: be taken, or be refused in one line. Anything else raises.

    TARGETS[name](data)     one input; raises AssertionError, or whatever came through, when a law is broken
    SEEDS[name]             inputs from which mutation gets somewhere

Used by `python -m tests.fuzz` (coverage-guided, minutes) and tests/test_hostile_bytes.py (seconds).
"""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgpack

from common import codec, sealed_folder
from common.config import dump_settings, load_settings, settings_from_toml
from common.errors import CheckpointError, CodecError, HybridError, RecordingError, SettingsError
from common.messages import MESSAGE_TYPES
from common.recording import FORMAT_VERSION, MAGIC, frame_of, open_scan, scan_entries
from monitor_node.action_door import ActionDoor
from monitor_node.actions import ActionQueue, Token
from monitor_node.events import EventStreams
from monitor_node.feed import Feed
from monitor_node.web import build_app
from tests.common.message_samples import sample

KINDS = sorted(MESSAGE_TYPES)
LONGEST_REFUSAL = 700  # characters
NOT_OURS = 500  # the first status that says "our mistake"; 503 says "later"


def codec_target(data: bytes) -> None:
    """First byte: the kind. The rest is a body."""
    kind = KINDS[data[0] % len(KINDS)] if data else "NoSuchKind"
    try:
        message = codec.decode(kind, data[1:])
    except CodecError as error:
        _one_line(error)
        return
    assert repr(codec.decode(kind, codec.encode(message))) == repr(message)


def recording_target(data: bytes) -> None:
    """Raw bytes; or, after a first byte 1, payloads (length u8, bytes) in frames with good checksums."""
    content = data
    if data[:1] == b"\x01":
        payloads, rest = [msgpack.packb(["header", FORMAT_VERSION, "run", 1.0])], data[1:]
        while rest:
            length = rest[0]
            payloads.append(rest[1 : 1 + length])
            rest = rest[1 + length :]
        content = MAGIC + b"".join(frame_of(payload) for payload in payloads)
    file, path = io.BytesIO(content), Path("recording.hpt")
    try:
        scan = open_scan(file, path)
        entries = list(scan_entries(file, path, scan))
    except RecordingError as error:
        _one_line(error)
        return
    assert len(entries) == scan.num_entries
    assert scan.good_bytes <= len(content)


def manifest_target(data: bytes) -> None:
    """A manifest in a folder that holds one small file, `f`."""
    folder = _folder()
    (folder / sealed_folder.MANIFEST).write_bytes(data)
    try:
        manifest = sealed_folder.verify(folder)
    except CheckpointError as error:
        _one_line(error)
        return
    assert set(manifest["files"]) <= {"f", "./f"}


def config_target(data: bytes) -> None:
    """A run file; and what follows the first line end as one --set value."""
    text = data.decode("utf-8", "replace")
    try:
        settings = settings_from_toml(text)
    except SettingsError as error:
        _one_line(error)
    else:
        assert settings_from_toml(dump_settings(settings)) == settings
    try:
        load_settings(preset="digits", overrides=[text.partition("\n")[2]])
    except SettingsError as error:
        _one_line(error)


def page_target(data: bytes) -> None:
    """`METHOD TARGET`, header lines, an empty line, a body: as the server's parser hands them on."""
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, target = first.partition(b" ")
    path, _, query = target.partition(b"?")
    headers = [(b"host", b"localhost")]
    for line in lines:
        name, _, value = line.partition(b":")
        headers.append((name.strip().lower(), value.strip().translate(None, b"\0\r")))
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "method": method.decode("ascii", "replace").upper(), "path": path.decode("utf-8", "replace"),
        "raw_path": path, "query_string": query, "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    statuses = _answer(scope, body)
    assert len(statuses) == 1
    assert statuses[0] < NOT_OURS or statuses[0] == 503, statuses


def forecaster_target(data: bytes) -> None:
    """The JSON header of a safetensors file up to the first NUL, then its data."""
    from trainer_node.weight_forecast import read_forecaster  # torch takes seconds to load

    header, _, values = data.partition(b"\0")
    try:
        found = read_forecaster(
            len(header).to_bytes(8, "little") + header + values, num_groups=1, num_differences=1
        )
    except ValueError as error:
        _one_line(error, longest=10_000)  # names all tensors; it is never shown, the verdict is "malformed"
        return
    assert bool(found.skip_GI.isfinite().all())


TARGETS: dict[str, Callable[[bytes], None]] = {
    "codec": codec_target,
    "recording": recording_target,
    "manifest": manifest_target,
    "config": config_target,
    "page": page_target,
    "forecaster": forecaster_target,
}

_DIGEST = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of b"x"
SEEDS: dict[str, list[bytes]] = {
    "codec": [bytes([n]) + codec.encode(sample(MESSAGE_TYPES[kind])) for n, kind in enumerate(KINDS)],
    "recording": [
        MAGIC + frame_of(msgpack.packb(["header", FORMAT_VERSION, "run", 1.0])),
        b"\x01" + bytes([len(entry := msgpack.packb(["history", 1, 1, "RunEnded", b"body", 1.0]))]) + entry,
        b"\x01" + bytes([len(footer := msgpack.packb(["footer", 0, b"digest"]))]) + footer,
    ],
    "manifest": [
        json.dumps({"format": 1, "files": {"f": {"bytes": 1, "sha256": _DIGEST}}}).encode(),
        b'{"format": 1, "files": {}, "files": {"../f": {"bytes": 1e999, "sha256": "x"}}}',
    ],
    "config": [
        dump_settings(load_settings(preset="digits")).encode(),
        b"[trainer]\nsteps = 0x7f\nx.y = 1979-05-27T07:32:00Z\n",
        b"\ntrainer.steps=5",
    ],
    "page": [
        b"GET /",
        b"GET /api/snapshot?have=%00%ff&a",
        b"GET /api/events\nLast-Event-ID: boot.1",
        b"GET /metrics\nAccept: application/openmetrics-text; version=1.0.0; escaping=allow-utf-8,*/*;q=0",
        b"GET /static/plotly.min.js\nAccept-Encoding: gzip;q=0.5, *\nIf-None-Match: *\nRange: bytes=0-1",
        b'POST /api/actions/stop\nAuthorization: Bearer 0123456789abcdef\nOrigin: http://localhost\n\n{"a":1}',
    ],
    "forecaster": [
        b'{"head":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\0abcd',
        b'{"gain":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"__metadata__":{"a":"b"}}\0abcd',
    ],
}


def _one_line(error: HybridError | ValueError, *, longest: int = LONGEST_REFUSAL) -> None:
    text = str(error)
    assert text.isprintable(), repr(text[:200])
    assert len(text) <= longest, f"{len(text)} characters"


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hpt-fuzz-"), sealed_folder.folder_name(1, 1))
    folder.mkdir()
    (folder / "f").write_bytes(b"x")
    return folder


@cache
def _app() -> tuple[asyncio.AbstractEventLoop, Any]:
    feed = Feed("boot")
    feed.publish({"run": {"run_id": "demo"}, "series": {"train": [(1, 9.0)]}})
    streams = EventStreams(feed)
    streams.stop()  # else an event stream would never end
    door = ActionDoor(feed, Token(b"0123456789abcdef"), ActionQueue(), None)
    return asyncio.new_event_loop(), build_app(feed, streams, door, allowed_hosts=("localhost",))


def _answer(scope: dict[str, Any], body: bytes) -> list[int]:
    """Statuses that were sent."""
    loop, app = _app()
    statuses: list[int] = []
    parts = [body[:100], body[100:]]

    async def receive() -> dict[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    loop.run_until_complete(asyncio.wait_for(app(scope, receive, send), 60.0))
    return statuses
