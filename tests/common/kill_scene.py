"""Saves killed at chosen lines: `python -m tests.common.kill_scene ROOT SEED KILLS`, one JSON line out.

A process without torch forks a child for every kill. The child saves one checkpoint after another and kills
itself with SIGKILL before it runs a certain line of the saving code for the n-th time; the next child goes on
in the same folder. Lines are drawn from all that a save runs, each once before any comes again.
What is in a checkpoint follows from its step, so each can be compared with what was saved under its name.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from common import folder_job, sealed_folder
from common.errors import CheckpointError
from common.folder_job import FilePart, FolderJob, carry_out

SAVING = (folder_job.__file__, sealed_folder.__file__)
KEEP = 2
SAVES = 6  # of which one name is taken twice
Line = tuple[str, int]


def content(step: int) -> dict[str, bytes]:
    """Several chunks, and of another size at each step."""
    random_bytes = random.Random(step).randbytes(5000 + 37 * (step % 50))
    return {"model.safetensors": random_bytes, "state.json": json.dumps({"step": step}).encode()}


def save(root: Path, step: int, *, buffer: int, is_staged: bool) -> None:
    name, parts, end = sealed_folder.folder_name(step, 1), [], 0
    temporary = None if is_staged else sealed_folder.begin(root, name)
    for file_name, data in content(step).items():
        if temporary is None:
            os.pwrite(buffer, data, end)
            parts.append(FilePart(name=file_name, offset=end, num_bytes=len(data)))
            end += len(data)
        else:
            (temporary / file_name).write_bytes(data)
    job = FolderJob(
        root=str(root), name=name, facts={"step": step}, keep=KEEP, best_name="", parts=tuple(parts)
    )
    carry_out(job, buffer)


def save_in_turn(root: Path, first_step: int, *, told: int, buffer: int, saves: int | None = None) -> None:
    """What is durable is told; every third step is saved twice under its name."""
    step = first_step
    while saves is None or step < first_step + saves:
        for _ in range(2 if step % 3 == 0 else 1):
            save(root, step, buffer=buffer, is_staged=step % 2 == 0)
            os.write(told, f"{step}\n".encode())
        step += 1


def on_each_line(visit: Callable[[Line], None]) -> None:
    """Of the saving code, from now on, in this thread."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in SAVING:
            return None
        if event == "line":
            visit((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)


def lines_of_a_save(root: Path, buffer: int) -> list[Line]:
    """Those that saves run, in order of their first time."""
    seen: dict[Line, None] = {}
    told = os.open(os.devnull, os.O_WRONLY)
    on_each_line(lambda line: seen.setdefault(line))
    save_in_turn(root, 1, told=told, buffer=buffer, saves=SAVES)
    sys.settrace(None)
    os.close(told)
    return list(seen)


def die_at(line: Line, times: int) -> None:
    left = times

    def visit(found: Line) -> None:
        nonlocal left
        left -= found == line
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    on_each_line(visit)


def newest_good(root: Path) -> int | None:
    """Its step; AssertionError if it is not what was saved under that name."""
    for folder in sealed_folder.folders(root):
        try:
            manifest = sealed_folder.verify(folder)
        except CheckpointError:
            continue
        step = sealed_folder.age_key(folder.name)[1]
        found = {name: (folder / name).read_bytes() for name in manifest["files"]}
        assert found == content(step), f"{folder.name} holds something else"
        return step
    return None


def kill_once(root: Path, line: Line, times: int, durable_step: int, buffer: int) -> tuple[int, int]:
    """(Newest durable step that was told, newest good one found)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        die_at(line, times)
        save_in_turn(root, durable_step + 1, told=write_end, buffer=buffer)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = pipe.read().split()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child was not killed: {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL, f"signal {os.WTERMSIG(status)}"
    return (int(told[-1]) if told else durable_step), (newest_good(root) or 0)


def main() -> None:
    root, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder_job._CHUNK_BYTES = 700  # type: ignore[misc]
    rng, buffer, lost, cut_off = random.Random(seed), os.memfd_create("scene"), [], 0
    lines = lines_of_a_save(root, buffer)
    points = [line for _ in range(-(-kills // len(lines))) for line in rng.sample(lines, len(lines))][:kills]
    durable_step = newest_good(root) or 0
    for line in points:
        told_step, found_step = kill_once(root, line, rng.randint(1, 2), durable_step, buffer)
        if found_step < told_step:
            lost.append({"line": line, "durable": told_step, "found": found_step})
        cut_off += any(root.glob("*.tmp"))
        durable_step = found_step
    save(root, durable_step + 1, buffer=buffer, is_staged=True)
    left = sorted(path.name for path in root.iterdir())
    print(
        json.dumps(
            {"lost": lost, "lines": len(lines), "cut_off": cut_off, "steps": durable_step, "left": left}
        )
    )


if __name__ == "__main__":
    main()
