"""Redis servers that tests may treat badly: killed, emptied, frozen, short of memory, failed over.

Each server is a process of its own with its own TCP port and data folder; the port stays the same
over restarts. Owns the processes it starts and nothing else; waits by polling with a deadline.
Servers are open to whoever is on this machine: never for anything but tests.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from tests.faults import wait_until

START_SECONDS = 30.0  # the machine may be busy, and a large append-only file takes its time
_ANSWER_SECONDS = 5.0
SERVICE = "hpt"  # what Sentinel calls the master
_KEEPING = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}


class _Process:
    """One redis-server process in a folder of its own, on a port that it keeps."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.port = _free_port()
        self.folder = folder
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._process is None, "it runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "--port", str(self.port), "--dir", str(self.folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # a Ctrl-C is for the test, which then closes the server
            )  # fmt: skip

    def wait(self) -> None:
        """Until it answers and has loaded its data."""
        wait_until(self._answers, START_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it does not run"
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9; does nothing when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def ask(self, *command: object) -> Any:
        """A command on a connection of its own, far from any proxy. Raises redis.RedisError."""
        with redis.Redis(port=self.port, socket_timeout=_ANSWER_SECONDS, protocol=2) as client:
            return client.execute_command(*command)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "server.log").read_text(errors="replace")
        try:
            return bool(self.ask("PING"))
        except redis.RedisError:  # not listening yet, or loading
            return False


class CampaignServer:
    """A server that keeps its data (append-only, fsync every second) until it is told to lose it."""

    def __init__(self, binary: str, folder: Path, *, options: dict[str, str] | None = None) -> None:
        """Does not start it. `binary` is a redis-server or a Valkey server; `folder` is all its own."""
        arguments = _arguments({**_KEEPING, **(options or {})})
        self._process = _Process([binary, *arguments, "--bind", "127.0.0.1"], folder)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._process.port}/0"

    def start(self) -> None:
        """Start and wait until it answers."""
        self._process.start()
        self._process.wait()

    def kill(self) -> None:
        """kill -9. What Redis has written is in the kernel and survives; on a busy disk it writes up to
        two seconds late (it waits for the fsync that is under way), also what it has acknowledged.
        """
        self._process.kill()

    def restart(self, keep_data: bool, *, wait: bool = True) -> None:
        """kill -9 if it runs, then start; without its data it comes back empty. A memory limit is gone.

        With `wait` False it may still be loading, or not even listening.
        """
        self._process.kill()
        if not keep_data:
            shutil.rmtree(self._process.folder)
        self._process.start()
        if wait:
            self._process.wait()

    def stop_signal(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._process.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.signal(signal.SIGCONT)

    def limit_memory(self, num_bytes: int) -> None:
        """Writes are refused with OOM while more than this is in use; 1 refuses them all."""
        self._process.ask("CONFIG", "SET", "maxmemory", num_bytes)

    def unlimit_memory(self) -> None:
        self._process.ask("CONFIG", "SET", "maxmemory", 0)

    def used_memory_bytes(self) -> int:
        return int(self._process.ask("INFO", "memory")["used_memory"])

    def flush(self) -> None:
        """Lose everything, groups and generations included."""
        self._process.ask("FLUSHALL")

    def close(self) -> None:
        """End it; the folder stays. May be called again."""
        self._process.kill()

    def __enter__(self) -> CampaignServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SentinelPair:
    """Master, replica and one Sentinel (quorum 1, down after 500 ms), started and in step.

    A fail-over needs 1.5 to 4 s from the kill: Sentinel looks every 100 ms, waits for 500 ms, and
    begins an election at a random moment of the next second.
    """

    def __init__(self, folder: Path) -> None:
        found = shutil.which("redis-server")
        assert found is not None, "redis-server is not installed"
        server = [found, *_arguments({"save": "", "repl-diskless-sync-delay": "0"})]
        self._master = _Process([*server, "--bind", "127.0.0.1"], folder / "master")
        follow = ["--replicaof", f"127.0.0.1 {self._master.port}"]
        self._replica = _Process([*server, "--bind", "127.0.0.1", *follow], folder / "replica")
        configuration = folder / "sentinel" / "sentinel.conf"  # Sentinel rewrites it
        self._sentinel = _Process([found, str(configuration), "--sentinel"], configuration.parent)
        configuration.parent.mkdir(parents=True)
        configuration.write_text(
            f"bind 127.0.0.1\nsentinel monitor {SERVICE} 127.0.0.1 {self._master.port} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 500\nsentinel failover-timeout {SERVICE} 3000\n",
            encoding="ascii",
        )
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self._sentinel.port}/{SERVICE}"

    @property
    def sentinel_port(self) -> int:
        return self._sentinel.port

    def fail_over(self) -> None:
        """kill -9 the first master and leave; Sentinel promotes the replica when it has noticed."""
        self._master.kill()

    def master_port(self) -> int:
        """Of the master that Sentinel would name now."""
        return int(self._sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    def failed_over(self) -> bool:
        return self.master_port() == self._replica.port

    def in_step(self) -> bool:
        """The replica has all that the first master has written."""
        of_master, of_replica = (
            process.ask("INFO", "replication") for process in (self._master, self._replica)
        )
        same = of_master["master_repl_offset"] == of_replica["slave_repl_offset"]
        return same and of_replica["master_link_status"] == "up"

    def close(self) -> None:
        """End all three. May be called again."""
        for process in (self._sentinel, self._replica, self._master):
            process.kill()

    def __enter__(self) -> SentinelPair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        for process in (self._master, self._replica):
            process.start()
        for process in (self._master, self._replica):
            process.wait()
        wait_until(self.in_step, START_SECONDS)
        self._sentinel.start()  # finds the replica in the master's INFO, so only now
        self._sentinel.wait()
        wait_until(self._sentinel_knows_the_replica, START_SECONDS)

    def _sentinel_knows_the_replica(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return len(self._sentinel.ask("SENTINEL", "REPLICAS", SERVICE)) == 1
        return False


def _arguments(options: dict[str, str]) -> list[str]:
    return [part for name, text in options.items() for part in (f"--{name}", text)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
