"""Worker processes that make the runs of a race. A worker that dies costs its run, not the race.

    with Workers(count, runner, threads=1) as workers:
        for order, answer in workers.run(orders): ...     in the order in which they end

Fresh processes (spawn) with one torch thread each: OMP_NUM_THREADS is set before torch is loaded. The
runner is a function of a module, called as runner(order) -> RunResult. Knows neither plan nor files.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from common.errors import SettingsError, UserError
from common.settings import RunSettings
from trainer_node.race.run_result import RunKey, RunResult

END_SECONDS = 5.0  # for a worker between two runs to end by itself
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOrder:
    """One run to be made; travels to a worker."""

    key: RunKey
    base: RunSettings
    eval_every_steps: int | None  # between held-out readings; None = the arm's own choice
    predictor_state: Path | None = None  # for our arms, of a predictor that has seen earlier runs
    recording: Path | None = None  # an earlier run for that purpose: what the predictor saw goes there
    together: tuple[RunOrder, ...] = ()  # to be made at the same time, taking turns: the answer is a list


@dataclass(frozen=True, slots=True)
class Failed:
    """A run that gave no result: it is made again when the race is taken up again."""

    reason: str  # one line
    details: str = ""  # stack trace, if there was one


Runner = Callable[[RunOrder], "RunResult | list[RunResult]"]
Answer = RunResult | list[RunResult] | Failed


def make_run(order: RunOrder) -> RunResult | list[RunResult]:
    """The real runner. Loads torch, so only workers call it."""
    from trainer_node.race.run_arm import run_arm, run_arms_together

    if order.together:
        return run_arms_together((order, *order.together))

    if order.recording is not None:
        from trainer_node.race.earlier_runs import make_recorded_run

        return make_recorded_run(order)
    return run_arm(
        order.key,
        order.base,
        eval_every_steps=order.eval_every_steps,
        predictor_state=order.predictor_state,
    )


@dataclass
class _Worker:
    process: Any
    connection: Connection
    order: RunOrder | None = None


class Workers:
    """Up to `count` processes, started when first needed and kept for the whole race."""

    def __init__(self, count: int, runner: Runner = make_run, *, threads: int = 1) -> None:
        self._count, self._runner, self._threads = count, runner, threads
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """Busy workers are ended at once: an unfinished run leaves nothing behind."""
        for worker in self._workers:
            worker.connection.close()  # an idle worker ends when it reads this
            if worker.order is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(END_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()

    def run(
        self,
        orders: Iterable[RunOrder],
        *,
        may_start: Callable[[], bool] = lambda: True,
        one_at_a_time: bool = False,
    ) -> Iterator[tuple[RunOrder, Answer]]:
        """Make all runs, beginning them in the given order while `may_start()`.

        Raises SettingsError when a worker meets a mistake of the user: it would spoil every run.
        """
        waiting = deque(orders)
        while True:
            while waiting and may_start() and (worker := self._idle(one_at_a_time)) is not None:
                worker.order = waiting.popleft()
                with contextlib.suppress(OSError):  # it died idle: its end is seen below
                    worker.connection.send(worker.order)
            busy = {worker.connection: worker for worker in self._workers if worker.order is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]
                order, worker_answer = worker.order, self._answer(worker)
                worker.order = None
                yield order, worker_answer

    def _answer(self, worker: _Worker) -> Answer:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._workers.remove(worker)
            worker.connection.close()
            return Failed(f"its worker died ({_ending(worker.process.exitcode)})")
        if isinstance(answer, UserError):
            raise SettingsError(str(answer))
        return answer

    def _idle(self, is_alone: bool) -> _Worker | None:
        """A worker without an order; None while all are busy, or one is that must be alone."""
        if is_alone and any(worker.order is not None for worker in self._workers):
            return None
        for worker in self._workers:
            if worker.order is None:
                return worker
        return self._start() if len(self._workers) < self._count else None

    def _start(self) -> _Worker:
        here, there = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=serve, args=(there, self._runner))
        with _environment(OMP_NUM_THREADS=str(self._threads), MKL_NUM_THREADS=str(self._threads)):
            process.start()
        there.close()  # so that the end of the process is the end of the pipe
        worker = _Worker(process, here)
        self._workers.append(worker)
        return worker


def serve(connection: Connection, runner: Runner) -> None:
    """Body of a worker: one order after the other until the pipe ends. Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            order = connection.recv()
            connection.send(attempt(runner, order))


def attempt(runner: Runner, order: RunOrder) -> Answer | UserError:
    try:
        return runner(order)
    except UserError as error:
        return SettingsError(str(error))  # a class that surely survives the way back
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        text = " ".join(str(error).split())
        return Failed(f"{type(error).__name__}: {text} ({where})", traceback.format_exc())


def _end_with_parent() -> None:
    """A killed race must not leave workers that train on for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that a process started meanwhile inherits."""
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
