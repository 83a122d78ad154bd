"""The run that is attacked: three node processes, a proxy before each, one server, and who restarts them.

Every node is started by the command a user would give to systemd or compose, and again when it ended
without having been told to. Owns its processes and its folder; ends all of them on `close`. Time spent
frozen by the machine does not count: `wait_for` counts turns of its loop, not seconds between them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.open_bus import open_bus
from tests.campaign.plan import MONITOR, NODES, PREDICTOR, SENTINEL, SERVER, TRAINER
from tests.campaign.servers import CampaignServer, SentinelPair
from tests.campaign.witness import Witness
from tests.faults import FaultProxy

ROOT = Path(__file__).resolve().parent.parent.parent
RUN_ID = "campaign"
TURN_SECONDS = 0.02
LONGEST_TURN_SECONDS = 0.25  # a longer one was spent frozen
RESTART_PAUSE_SECONDS = 0.2  # as systemd's RestartSec, shorter
END_SECONDS = 30.0


@dataclass
class Node:
    """One node over all its lives."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    killed: bool = False  # by an attack: this end was expected
    exit_codes: list[int] = field(default_factory=list)  # of ends that no attack asked for
    restart_at_seconds: float = 0.0

    def start(self) -> None:
        """Once more; whoever was this node before is another's to end."""
        if self.process is not None and self.process.poll() is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = spawn(self.arguments, self.environment, self.log)
        self.starts += 1
        self.killed = False
        self.restart_at_seconds = 0.0

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.killed = True
        self.signal(signal.SIGKILL)


def spawn(arguments: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """In a session of its own; it ends by itself when this process is gone and its stdin closes."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


class Scene:
    """Use as a context manager; `turn` is to be called all the time, by one of the waits."""

    def __init__(self, folder: Path, settings: Sequence[str], *, steps: int, kind: str, seed: int) -> None:
        """`settings`: "table.key=value" over the preset digits."""
        self.folder, self.run, self.kind, self.seed = folder, folder / RUN_ID, kind, seed
        self.log_folder = folder / "logs"
        self.server: Any = None
        self.proxies: dict[str, FaultProxy] = {}
        self.nodes: dict[str, Node] = {}
        self.patience_seconds = 0.0  # time that passed here, without what was spent frozen
        self._settings, self._steps = settings, steps
        self._last_turn = time.monotonic()
        self.witness = Witness(lambda: open_bus(self.server.url, RUN_ID, environment={}))

    def __enter__(self) -> Scene:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- time --------------------------------------------------------------------------------

    def turn(self) -> None:
        """Look at streams and processes once; start again what ended without being done."""
        time.sleep(TURN_SECONDS)
        now = time.monotonic()
        self.patience_seconds += min(LONGEST_TURN_SECONDS, now - self._last_turn)
        self._last_turn = now
        self.witness.look()
        for node in self.nodes.values():
            self._revive(node)

    def wait_for(self, law: Callable[[], bool], seconds: float) -> bool:
        """Whether `law` held within `seconds` of patience."""
        until = self.patience_seconds + seconds
        while not law():
            if self.patience_seconds >= until:
                return False
            self.turn()
        return True

    def idle(self, seconds: float) -> None:
        self.wait_for(lambda: False, seconds)

    # ---- the nodes ---------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """The trainer ended well: the run is finished."""
        process = self.nodes[TRAINER].process
        return process is not None and process.poll() == 0

    def processes(self, target: str) -> list[Node]:
        return [self.nodes[name] for name in NODES if target in (name, "all")]

    def trainer_arguments(self) -> list[str]:
        overrides = [part for text in self._settings for part in ("--set", text)]
        return [
            "trainer_node", "train", "--preset", "digits", "--steps", str(self._steps), *overrides,
            "--run-id", RUN_ID, "--runs-dir", str(self.folder), "--resume", "--stop-with-parent",
        ]  # fmt: skip

    def environment(self, name: str) -> dict[str, str]:
        url = self.proxies[name].url if name in self.proxies else self.server.url
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HPT_")}
        return {**kept, "HPT_REDIS_URL": url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1"}  # fmt: skip

    def clock_file(self, name: str) -> Path:
        return self.folder / f"{name}.clock"

    def with_moved_clock(self, name: str, arguments: Sequence[str]) -> list[str]:
        return ["tests.campaign.moved_clock", str(self.clock_file(name)), *arguments]

    @contextlib.contextmanager
    def standstill(self) -> Any:
        """Nodes stopped for a moment, and all that they said read: then data may be lost on purpose,
        and the campaign still knows every word of it."""
        for node in self.nodes.values():
            node.signal(signal.SIGSTOP)
        try:
            for _ in range(5):
                time.sleep(TURN_SECONDS)
                self.witness.look()
            yield
        finally:
            for node in self.nodes.values():
                node.signal(signal.SIGCONT)

    def end(self) -> None:
        """After the run: the helpers read to the end and stop by SIGTERM, as under systemd."""
        for name in (PREDICTOR, MONITOR):
            node = self.nodes[name]
            self.idle(1.0)  # to read the last words of the one before
            node.killed = True  # its end is wanted from here on
            node.signal(signal.SIGTERM)
            process = node.process
            self.wait_for(lambda process=process: process is None or process.poll() is not None, END_SECONDS)
        self.witness.look()

    def close(self) -> None:
        for node in self.nodes.values():
            node.killed = True
            node.signal(signal.SIGCONT)
            node.signal(signal.SIGKILL)
            if node.process is not None:
                node.process.wait()
                if node.process.stdin is not None:
                    node.process.stdin.close()
        self.witness.reconnect()
        with contextlib.ExitStack() as proxies:
            for proxy in self.proxies.values():
                proxies.push(proxy)
        if self.server is not None:
            self.server.close()

    def _start(self) -> None:
        self.log_folder.mkdir(parents=True)
        if self.kind == SENTINEL:
            self.server = SentinelPair(self.folder / SERVER)
        else:
            self.server = CampaignServer("redis-server", self.folder / SERVER)
            self.server.start()
            for number, name in enumerate(NODES):
                self.proxies[name] = FaultProxy(self.server.url, seed=self.seed + number)
        predictor = [
            "predictor_node", "serve", "--run-id", RUN_ID, "--heartbeat-seconds", "0.1",
            "--state-dir", str(self.run / "checkpoints" / "predictor"), "--stop-with-parent",
        ]  # fmt: skip
        monitor = [
            "monitor_node", "serve", "--run-id", RUN_ID, "--http", "",
            "--record", str(self.run / "recording.hpt"), "--stop-with-parent",
        ]  # fmt: skip
        commands = {TRAINER: self.trainer_arguments(), PREDICTOR: predictor, MONITOR: monitor}
        for name in reversed(NODES):
            arguments = self.with_moved_clock(name, commands[name])
            log = self.log_folder / f"{name}.log"
            self.nodes[name] = Node(name, arguments, self.environment(name), log)
            self.nodes[name].start()

    def _revive(self, node: Node) -> None:
        code = None if node.process is None else node.process.poll()
        if code is None or (node.name == TRAINER and code == 0):
            return
        if not node.restart_at_seconds:
            if not node.killed:
                node.exit_codes.append(code)
            node.restart_at_seconds = self.patience_seconds + RESTART_PAUSE_SECONDS
        elif self.patience_seconds >= node.restart_at_seconds and not (node.killed and self.is_over):
            node.start()
