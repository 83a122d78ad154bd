"""`python -m common.embedded_keeper BINARY FOLDER`: parent process of the embedded server.

Owns the private folder, the password, the socket and the server process. Restarts a server that
dies, with the same address. Ends server and folder when the starter goes away, however it goes:
stdin reaches EOF (its death closes the pipe) or our parent process changes (a forked child of the
starter may still hold the pipe). If the keeper itself is killed, Linux kills the server.

Says one JSON line on stdout, {"url", "folder"} or {"error"}; the password is in the url, and
never on a command line or in a log. Needs the standard library only, so that it starts fast.
Never connects to a server of others and never keeps data.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

MEMORY_LIMIT = "1gb"  # about 20 times what the length fuses of common/streams.py let a run fill
SOCKET_PATH_BYTES = 100  # the kernel's limit is 108 on Linux and 104 on macOS
READY_SECONDS = 20.0
STOP_SECONDS = 3.0
DEATHS = 10  # this many deaths within DEATHS_SECONDS and the keeper gives up (guess, untested)
DEATHS_SECONDS = 30.0
FIRST_BACKOFF_SECONDS = 0.02
LONGEST_BACKOFF_SECONDS = 1.0
PR_SET_PDEATHSIG = 1


class StartFailed(Exception):
    """One line that says why there is no server."""


@dataclass(frozen=True, kw_only=True)
class PrivateAddress:
    folder: Path  # mode 0700; all that the server writes is in it
    password: str
    socket_path: Path | None  # None where Unix sockets are impossible
    port: int  # 0 with a Unix socket

    @property
    def url(self) -> str:
        if self.socket_path is not None:
            return f"unix://:{self.password}@{quote(str(self.socket_path))}"
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def connect(self, timeout_seconds: float) -> socket.socket:
        if self.socket_path is None:
            return socket.create_connection(("127.0.0.1", self.port), timeout_seconds)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(str(self.socket_path))
        except OSError:
            connection.close()
            raise
        return connection


class Watch:
    """Wakes the keeper: the starter went, a signal came, or time passed."""

    def __init__(self) -> None:
        self._starter_id = os.getppid()
        self._stopped = False
        self._wake, wake_end = socket.socketpair()
        for end in (self._wake, wake_end):
            end.setblocking(False)
        self._wake_end = wake_end  # kept: closing it would silence the signals
        signal.set_wakeup_fd(wake_end.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's business

    def _stop(self, *_: object) -> None:
        self._stopped = True

    @property
    def gone(self) -> bool:
        return self._stopped or os.getppid() != self._starter_id

    def wait(self, seconds: float) -> None:
        wake = self._wake.fileno()
        readable, _, _ = select.select([0, wake], [], [], seconds)
        if 0 in readable and not os.read(0, 4096):
            self._stopped = True
        if wake in readable:
            os.read(wake, 4096)


def prepare(base: Path) -> PrivateAddress:
    """Make the folder with its config file. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix="hpt-", dir=base))  # mkdtemp makes it 0700
    socket_path = folder / "s" if _unix_socket_possible(folder) else None
    address = PrivateAddress(
        folder=folder,
        password=secrets.token_urlsafe(32),
        socket_path=socket_path,
        port=0 if socket_path is not None else _free_port(),
    )
    try:
        descriptor = os.open(folder / "server.conf", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_config_text(address))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return address


def _unix_socket_possible(folder: Path) -> bool:
    path = folder / "probe"
    if not hasattr(socket, "AF_UNIX") or len(os.fsencode(path)) >= SOCKET_PATH_BYTES:
        return False
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.bind(str(path))
        except OSError:
            return False
    path.unlink()
    return True


def _free_port() -> int:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _config_text(address: PrivateAddress) -> str:
    def quoted(path: Path) -> str:
        escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'

    lines = [
        f"port {address.port}",
        f"requirepass {address.password}",
        f"dir {quoted(address.folder)}",
        'save ""',
        "appendonly no",
        "daemonize no",
        "databases 1",
        f"maxmemory {MEMORY_LIMIT}",
        "maxmemory-policy noeviction",  # any other policy may evict a stream with its groups
    ]
    if address.socket_path is None:
        lines.append("bind 127.0.0.1")
    else:
        lines += [f"unixsocket {quoted(address.socket_path)}", "unixsocketperm 600"]
    return "\n".join(lines) + "\n"


def start(binary: str, address: PrivateAddress) -> subprocess.Popen[bytes]:
    """Start the server; its id goes to `server.pid`. Raises OSError."""
    with (address.folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [binary, str(address.folder / "server.conf")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_keeper(),  # safe: the keeper has one thread
        )
    new_file = address.folder / "server.pid.new"
    new_file.write_text(f"{server.pid}\n", encoding="ascii")
    new_file.replace(address.folder / "server.pid")
    return server


def _die_with_keeper() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    keeper_id = os.getpid()

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper_id:  # the keeper died before prctl
            os._exit(1)

    return in_child


def wait_ready(server: subprocess.Popen[bytes], address: PrivateAddress, watch: Watch) -> None:
    """Return when the server says PONG, or when the starter has gone. Raises StartFailed."""
    deadline_seconds = time.monotonic() + READY_SECONDS
    while not watch.gone:
        if server.poll() is not None:
            raise StartFailed(f"{server.args[0]!r} ended at once: {_last_log_line(address)}")  # type: ignore[index]
        if _answers(address):
            return
        if time.monotonic() > deadline_seconds:
            raise StartFailed(f"no answer for {READY_SECONDS:.0f} s: {_last_log_line(address)}")
        watch.wait(0.005)


def _answers(address: PrivateAddress) -> bool:
    password = address.password
    try:
        with contextlib.closing(address.connect(timeout_seconds=2.0)) as connection:
            connection.sendall(f"*2\r\n$4\r\nAUTH\r\n${len(password)}\r\n{password}\r\nPING\r\n".encode())
            reply = b""
            while b"PONG" not in reply and b"-" not in reply:
                received = connection.recv(4096)
                if not received:
                    return False
                reply += received
            return reply == b"+OK\r\n+PONG\r\n"
    except OSError:
        return False


def _last_log_line(address: PrivateAddress) -> str:
    with contextlib.suppress(OSError):
        lines = (address.folder / "server.log").read_text(encoding="utf-8", errors="replace").split("\n")
        spoken = [line.strip() for line in lines if line.strip()]
        if spoken:
            return spoken[-1][:300].replace(address.password, "***")
    return "it wrote no log"


def keep(binary: str, address: PrivateAddress, watch: Watch, server: subprocess.Popen[bytes]) -> str:
    """Hold the server up until the starter goes; returns why it was given up, or ""."""
    death_seconds: collections.deque[float] = collections.deque(maxlen=DEATHS)
    backoff_seconds = FIRST_BACKOFF_SECONDS
    try:
        while True:
            started_seconds = time.monotonic()
            while server.poll() is None and not watch.gone:
                watch.wait(1.0)  # the starter's id is looked at once a second
            if watch.gone:
                return ""
            now_seconds = time.monotonic()
            death_seconds.append(now_seconds)
            if len(death_seconds) == DEATHS and now_seconds - death_seconds[0] < DEATHS_SECONDS:
                return f"died {DEATHS} times within {DEATHS_SECONDS:.0f} s: {_last_log_line(address)}"
            if now_seconds - started_seconds > DEATHS_SECONDS:
                backoff_seconds = FIRST_BACKOFF_SECONDS
            watch.wait(backoff_seconds)
            backoff_seconds = min(2 * backoff_seconds, LONGEST_BACKOFF_SECONDS)
            try:
                server = start(binary, address)
            except OSError as error:
                return f"cannot be restarted: {error}"
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def main() -> int:
    binary, base = sys.argv[1], Path(sys.argv[2])
    watch = Watch()
    address = None
    try:
        address = prepare(base)
        server = start(binary, address)
        try:
            wait_ready(server, address, watch)
        except BaseException:
            stop(server)
            raise
        print(json.dumps({"url": address.url, "folder": str(address.folder)}), flush=True)
        trouble = keep(binary, address, watch, server)
    except (OSError, StartFailed) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    finally:
        if address is not None:
            shutil.rmtree(address.folder, ignore_errors=True)
    if trouble:
        print(f"embedded server: given up, {trouble}", file=sys.stderr)
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
