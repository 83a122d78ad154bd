"""The process that seals folders: it answers, it outlives signals but not its parent, it is missed once."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common import sealed_folder
from common.errors import EnvironmentFault
from common.folder_job import FilePart, FolderJob
from common.folder_process import FolderProcess, WriterGone
from tests.faults import wait_until


@pytest.fixture
def buffer() -> Iterator[int]:
    descriptor = os.memfd_create("test")
    os.write(descriptor, b"0123456789")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def writer(buffer: int) -> Iterator[FolderProcess]:
    found = FolderProcess(buffer)
    yield found
    found.close()


def job(root: Path, step: int = 1) -> FolderJob:
    parts = (FilePart(name="a", offset=0, num_bytes=4), FilePart(name="b", offset=6, num_bytes=4))
    name = sealed_folder.folder_name(step, 1)
    return FolderJob(root=str(root), name=name, facts={"step": step}, keep=3, best_name="", parts=parts)


def child_of(writer: FolderProcess) -> psutil.Process:
    assert writer.process_id is not None
    return psutil.Process(writer.process_id)


def test_a_folder_is_sealed_by_a_process_without_torch_and_without_passwords(
    writer: FolderProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPT_REDIS_URL", "redis://:secret@host")
    done = writer.carry_out(job(tmp_path))
    (folder,) = sealed_folder.folders(tmp_path)
    assert sealed_folder.verify(folder)["step"] == 1
    assert [(folder / name).read_bytes() for name in "ab"] == [b"0123", b"6789"]
    assert done.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    child = child_of(writer)
    assert not any("torch" in mapped.path for mapped in child.memory_maps())
    assert "secret" not in str(child.environ())
    assert child.nice() > psutil.Process().nice() or child.nice() == 19


def test_a_fault_of_the_disk_is_told_and_the_process_goes_on(writer: FolderProcess, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(EnvironmentFault, match="Not a directory"):
        writer.carry_out(job(in_the_way))
    first = writer.process_id
    writer.carry_out(job(tmp_path / "free"))
    assert writer.process_id == first


@pytest.mark.parametrize("when", ["idle", "at work"])
def test_a_killed_writer_is_told_once_and_the_next_job_has_a_new_one(
    when: str, writer: FolderProcess, tmp_path: Path
) -> None:
    writer.carry_out(job(tmp_path, 1))
    first = child_of(writer)
    first.suspend()  # it does not begin the job that comes
    killer = threading.Timer(0.0 if when == "idle" else 0.2, first.kill)
    killer.start()
    if when == "idle":
        killer.join()
    with pytest.raises(WriterGone, match="killed by SIGKILL"):
        writer.carry_out(job(tmp_path, 2))
    killer.join()
    writer.carry_out(job(tmp_path, 3))
    assert writer.process_id != first.pid
    assert [sealed_folder.age_key(folder.name)[1] for folder in sealed_folder.folders(tmp_path)] == [3, 1]


def test_a_signal_to_the_group_does_not_stop_a_save(writer: FolderProcess, tmp_path: Path) -> None:
    writer.carry_out(job(tmp_path, 1))
    for number in (signal.SIGTERM, signal.SIGINT):
        child_of(writer).send_signal(number)
    writer.carry_out(job(tmp_path, 2))
    assert len(sealed_folder.folders(tmp_path)) == 2


def test_a_writer_that_cannot_be_started_is_told(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(WriterGone, match="could not be started"):
        FolderProcess(buffer).start()


def test_the_writer_ends_with_its_parent_but_finishes_the_job_it_has(tmp_path: Path) -> None:
    """The parent is killed with the job in the pipe and the child stopped: no orphan, and nothing lost.

    A stop takes effect some time after the signal; till then the child might still take the job.
    """
    script = (
        "import os, signal, sys, threading; from pathlib import Path\n"
        "from tests.common.test_folder_process import job, child_of; from common.folder_process import *\n"
        "buffer = os.memfd_create('b'); os.write(buffer, b'0123456789'); root = Path(sys.argv[1])\n"
        "writer = FolderProcess(buffer); writer.carry_out(job(root, 1)); child = child_of(writer)\n"
        "from tests.faults import wait_until\n"
        "child.suspend(); wait_until(lambda: child.status() == 'stopped')\n"
        "print(child.pid, flush=True); writer.carry_out(job(root, 2))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        pipe_of_child = Path(f"/proc/{child.pid}/fd/0")
        try:
            wait_until(lambda: _bytes_waiting(pipe_of_child) > 0, 60.0)
        finally:
            parent.kill()
            child.resume()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 60.0)
    newest = sealed_folder.folders(tmp_path)[0]
    assert sealed_folder.verify(newest)["step"] == 2


def _bytes_waiting(pipe: Path) -> int:
    found = array.array("i", [0])
    with pipe.open("rb", buffering=0) as file:
        fcntl.ioctl(file, termios.FIONREAD, found)
    return found[0]


def test_a_file_that_may_not_grow_is_no_checkpoint_and_the_older_one_stays(
    writer: FolderProcess, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE in the child: a real refusal of the operating system, as of a full disk."""
    writer.carry_out(job(tmp_path, 1))
    assert writer.process_id is not None
    resource.prlimit(writer.process_id, resource.RLIMIT_FSIZE, (3, 3))
    with pytest.raises(EnvironmentFault, match="File too large; free space, older ones are intact"):
        writer.carry_out(job(tmp_path, 2))
    (folder,) = sealed_folder.folders(tmp_path)
    assert sealed_folder.verify(folder)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [folder.name], "half a folder was left"
