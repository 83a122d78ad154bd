"""One function per kind of fault: a context in which it lasts. Knows how to do harm, and judges nothing.

    with ATTACKS[fault.kind](scene, fault) as notes: ...

What an attack itself has to say (a fenced trainer's exit code) it appends to the scene's `Injected`.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.campaign.plan import SERVER, TRAINER, Fault
from tests.campaign.scene import Scene

Attack = Callable[[Scene, Fault], AbstractContextManager[list[str]]]
FENCED_EXIT_CODE = 1  # common/errors.py: Fenced is an EnvironmentFault
FENCED_WORDS = "stop this process"
_START_SECONDS = 60.0
_FAIL_OVER_SECONDS = 30.0


@contextlib.contextmanager
def kill(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """kill -9 of one process, or of all three at once; the scene starts them again."""
    nodes = scene.processes(fault.target)
    starts = [node.starts for node in nodes]
    for node in nodes:
        node.kill()
    yield []
    scene.wait_for(
        lambda: all(node.starts > before for node, before in zip(nodes, starts, strict=True)), _START_SECONDS
    )


@contextlib.contextmanager
def freeze(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """SIGSTOP: connections stay open and nothing is answered, as on a swapping or paused machine."""
    if fault.target == SERVER:
        scene.witness.is_blind = True
        scene.server.stop_signal()
    for node in scene.processes(fault.target):
        node.signal(signal.SIGSTOP)
    try:
        yield []
    finally:
        if fault.target == SERVER:
            scene.server.go_on()
            scene.witness.is_blind = False
        for node in scene.processes(fault.target):
            node.signal(signal.SIGCONT)


@contextlib.contextmanager
def restart_with_data(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    scene.server.restart(keep_data=True)
    yield []


@contextlib.contextmanager
def restart_without_data(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    with scene.standstill():
        scene.server.restart(keep_data=False)
    yield []


@contextlib.contextmanager
def flush(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """Everything is gone and no connection breaks."""
    with scene.standstill():
        scene.server.flush()
    yield []


@contextlib.contextmanager
def fill_memory(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """maxmemory is reached: every write is refused, every read works."""
    scene.server.limit_memory(1)
    try:
        yield []
    finally:
        scene.server.unlimit_memory()


@contextlib.contextmanager
def fail_over(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """The master of a Sentinel pair dies; only once in a scene, since nobody follows the new one."""
    with scene.standstill():
        scene.server.fail_over()
    notes: list[str] = []
    yield notes  # recovery counts from here: Sentinel's own 1.5 to 4 s are a part of it
    if not scene.wait_for(scene.server.failed_over, _FAIL_OVER_SECONDS):
        notes.append("Sentinel named no new master")


@contextlib.contextmanager
def on_links(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """What the proxies can do, on all links at once."""
    for proxy in scene.proxies.values():
        match fault.kind:
            case "delay":
                proxy.delay(replies_seconds=fault.amount)
            case "drop_replies":
                proxy.drop_reply(b"", share=fault.amount)
            case "throttle":
                proxy.throttle(fault.amount)
            case "corrupt":
                proxy.damage_request(b"XADD", share=fault.amount)
                proxy.damage_reply(b"XREAD", share=fault.amount)
            case "cut":
                proxy.cut()
            case "refuse":
                proxy.refuse(True)
                proxy.cut()
    try:
        yield []
    finally:
        for proxy in scene.proxies.values():
            proxy.heal()


@contextlib.contextmanager
def move_clock(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """The wall clock of one node jumps, and stays there."""
    partial = scene.clock_file(fault.target).with_suffix(".partial")
    partial.write_text(str(fault.amount), encoding="ascii")
    partial.replace(scene.clock_file(fault.target))
    yield []


@contextlib.contextmanager
def second_trainer(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """Somebody starts the same run once more: the older trainer is fenced, says so and ends with code 1."""
    with _two_trainers(scene) as older:
        notes: list[str] = []
        yield notes
        notes += _await_fenced(scene, older)


@contextlib.contextmanager
def sleeping_trainer(scene: Scene, fault: Fault) -> Iterator[list[str]]:
    """The older one sleeps while a newer one takes over, and wakes up: the classical stale writer."""
    scene.nodes[TRAINER].signal(signal.SIGSTOP)
    with _two_trainers(scene) as older:
        steps = scene.witness.steps_published
        scene.wait_for(lambda: scene.witness.steps_published > steps or scene.is_over, _START_SECONDS)
        older.process.send_signal(signal.SIGCONT)
        notes: list[str] = []
        yield notes
        notes += _await_fenced(scene, older)


@dataclass(frozen=True, slots=True)
class _Older:
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def _two_trainers(scene: Scene) -> Iterator[_Older]:
    """The scene looks after the newer one from now on; the older one is gone afterwards."""
    node = scene.nodes[TRAINER]
    assert node.process is not None
    older = _Older(node.process, node.log)
    node.log = scene.log_folder / f"trainer-{node.starts + 1}.log"
    node.start()
    try:
        yield older
    finally:
        older.process.send_signal(signal.SIGCONT)
        older.process.kill()
        older.process.wait()
        if older.process.stdin is not None:
            older.process.stdin.close()


def _await_fenced(scene: Scene, older: _Older) -> list[str]:
    """What is wrong with how the older one ended."""
    if not scene.wait_for(lambda: older.process.poll() is not None, _START_SECONDS):
        return ["the older trainer was not fenced: it went on"]
    code = older.process.returncode
    if code == 0:
        return []  # its run was over before anybody took it away
    if code != FENCED_EXIT_CODE:
        return [f"the older trainer ended with code {code}, not {FENCED_EXIT_CODE}"]
    if FENCED_WORDS not in older.log.read_text(errors="replace"):
        return ["the older trainer did not say that it was fenced"]
    return []


ATTACKS: dict[str, Attack] = {
    "kill": kill,
    "kill_all": kill,
    "freeze": freeze,
    "restart_with_data": restart_with_data,
    "restart_without_data": restart_without_data,
    "flush": flush,
    "fill_memory": fill_memory,
    "fail_over": fail_over,
    **dict.fromkeys(("delay", "drop_replies", "throttle", "corrupt", "cut", "refuse"), on_links),
    "move_clock": move_clock,
    "second_trainer": second_trainer,
    "sleeping_trainer": sleeping_trainer,
}
