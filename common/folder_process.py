"""A process that carries out folder jobs, and the end of the pipe in the process that has it.

    writer = FolderProcess(buffer_descriptor)
    writer.carry_out(job)        blocks until the folder is sealed, so call it in a thread

One line of JSON each way. The child imports no torch, has its own interpreter lock, a low priority and no
password. It ends when its stdin does, so with its parent, but first finishes the job it has: the buffer
outlives the parent. A signal meant for the whole group does not stop it. Restarts nothing by itself: after
WriterGone the next call starts a new child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from common.errors import EnvironmentFault
from common.folder_job import FolderDone, FolderJob, carry_out, job_from_json

NICENESS = 19  # beside a step that needs all cores
_END_SECONDS = 10.0


class WriterGone(EnvironmentFault):
    """The child ended, or could not be started; the job may or may not have been done."""


class FolderProcess:
    """Starts its child with the first job; see the module's docstring. Not thread-safe."""

    def __init__(self, buffer: int | None) -> None:
        """`buffer`: the descriptor that the parts of jobs lie in."""
        self._buffer = buffer
        self._child: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., FolderProcess] | None = None

    @property
    def process_id(self) -> int | None:
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Does not wait for the child to be ready. Raises WriterGone."""
        if self._child is not None:
            return
        buffers = [] if self._buffer is None else [self._buffer]
        try:
            self._child = subprocess.Popen(
                # -P: the user's folder may hold a `common` of its own
                [sys.executable, "-P", "-m", "common.folder_process", *map(str, buffers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=buffers,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise WriterGone(f"the checkpoint writer could not be started: {error.strerror}") from None
        self._end = weakref.finalize(self, _end, self._child)

    def carry_out(self, job: FolderJob) -> FolderDone:
        """As folder_job.carry_out, elsewhere. Raises WriterGone too."""
        self.start()
        answer = self._ask(json.dumps(job.to_json()).encode() + b"\n")
        if "error" in answer:
            raise EnvironmentFault(str(answer["error"]))
        return FolderDone(**answer)

    def close(self) -> None:
        """Lets the child end. Only between two jobs."""
        child, self._child = self._child, None
        if child is not None and self._end is not None:
            self._end.detach()
            _end(child)

    def _ask(self, line: bytes) -> dict[str, Any]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        answer = b""
        with contextlib.suppress(OSError):  # a broken pipe: the same as no answer
            child.stdin.write(line)
            child.stdin.flush()
            answer = child.stdout.readline()
        with contextlib.suppress(ValueError):  # half an answer
            return dict(json.loads(answer))
        self.close()
        raise WriterGone(f"the checkpoint writer ended ({_why(child)})")


def _environment() -> dict[str, str]:
    """This package first on the path, and nothing of ours that may hold a password."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    paths = root if not inherited else f"{root}{os.pathsep}{inherited}"
    return {**{k: v for k, v in os.environ.items() if not k.startswith("HPT_")}, "PYTHONPATH": paths}


def _end(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    try:
        child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _why(child: subprocess.Popen[bytes]) -> str:
    code = child.returncode
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"code {code}"


def main() -> None:
    """The child: jobs on stdin, answers on stdout, the buffer's descriptor as the only argument."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    buffer = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for line in sys.stdin.buffer:
        try:
            answer = dataclasses.asdict(carry_out(job_from_json(json.loads(line)), buffer))
        except EnvironmentFault as error:
            answer = {"error": str(error)}
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more; the folder is sealed
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
