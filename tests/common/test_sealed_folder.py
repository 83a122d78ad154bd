"""Sealed folders: what is damaged in any way is named and passed over; retention keeps what is good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import folder_job, sealed_folder
from common.errors import CheckpointError, EnvironmentFault
from common.folder_job import FolderDone, FolderJob, carry_out, superfluous
from common.sealed_folder import MANIFEST, folder_name

CONTENT = {"model.safetensors": bytes(range(256)), "state.json": b'{"step": 1}', "empty": b""}


def put_files(root: Path, step: int, *, generation: int = 1, emergency: bool = False) -> str:
    name = folder_name(step, generation, emergency=emergency)
    temporary = sealed_folder.begin(root, name)
    for file_name, content in CONTENT.items():
        (temporary / file_name).write_bytes(content)
    return name


def save(root: Path, step: int, *, keep: int = 1000, best: str = "", **which: object) -> FolderDone:
    name = put_files(root, step, **which)
    return carry_out(
        FolderJob(root=str(root), name=name, facts={"step": step}, keep=keep, best_name=best), None
    )


def steps_in(root: Path) -> list[int]:
    return [sealed_folder.age_key(folder.name)[1] for folder in sealed_folder.folders(root)]


def flip(path: Path, position: int = 0, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)


# ---- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sealed")
    save(root, 1)
    return sealed_folder.folders(root)[0]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_any_file_is_found_and_the_file_is_named(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["model.safetensors", "state.json", MANIFEST]))
    path = whole / name
    before = path.read_bytes()
    flip(path, data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7)))
    try:
        with pytest.raises(CheckpointError) as error:
            sealed_folder.verify(whole)
    finally:
        path.write_bytes(before)
    assert str(error.value).startswith(f"{whole}: ")
    assert "\n" not in str(error.value)
    assert name == MANIFEST or name in str(error.value)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "model.safetensors is damaged": lambda folder: flip(folder / "model.safetensors"),
    "model.safetensors is cut or too long": cut,
    "state.json is missing": lambda folder: (folder / "state.json").unlink(),
    f"has no {MANIFEST}": lambda folder: (folder / MANIFEST).unlink(),
    f"{MANIFEST} is damaged": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
    "'read_out.safetensors' is not in": lambda folder: (folder / "read_out.safetensors").write_bytes(b"x"),
    "format '3' is not 2": lambda folder: (folder / MANIFEST).write_text('{"format": 3, "files": {}}'),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_whatever_is_wrong_is_said_in_one_line_with_the_folder(why: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (folder,) = sealed_folder.folders(tmp_path)
    DAMAGE[why](folder)
    with pytest.raises(CheckpointError) as error:
        sealed_folder.verify(folder)
    assert str(error.value).startswith(f"{folder}: {why}"), str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_the_first_format_can_still_be_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (folder,) = sealed_folder.folders(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    assert sealed_folder.verify(folder)["step"] == 1


def test_files_of_the_system_beside_the_others_do_no_harm(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (folder,) = sealed_folder.folders(tmp_path)
    (folder / ".nfs0001").write_text("x")
    sealed_folder.verify(folder)


# ---- writing -------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_never_without_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    (folder,) = sealed_folder.folders(tmp_path)
    removed: list[Path] = []
    really = shutil.rmtree

    def rmtree(path: Path, **options: object) -> None:
        assert path != folder, "the one that has the name was removed before the new one was there"
        removed.append(Path(path))
        really(path, **options)

    monkeypatch.setattr(sealed_folder.shutil, "rmtree", rmtree)
    save(tmp_path, 1)
    sealed_folder.verify(folder)
    assert removed
    assert list(tmp_path.iterdir()) == [folder]


def test_where_two_names_cannot_change_places_a_folder_is_still_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed_folder, "_exchange", lambda *_: False)
    save(tmp_path, 1)
    save(tmp_path, 1)
    (folder,) = sealed_folder.folders(tmp_path)
    sealed_folder.verify(folder)


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_a_job_that_was_cut_off_is_done_again_without_bringing_the_old_one_back(
    is_exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the death of the writer between the exchange of names and its answer, or before both."""
    save(tmp_path, 1)
    (folder,) = sealed_folder.folders(tmp_path)
    temporary = tmp_path / f"{put_files(tmp_path, 1)}.tmp"
    (temporary / "state.json").write_text("new")
    again = FolderJob(root=str(tmp_path), name=folder.name, facts={"step": 1}, keep=3, best_name="")
    with monkeypatch.context() as patch:
        patch.setattr(sealed_folder, "_fsync", _cut_off_at(tmp_path if is_exchanged else temporary))
        with pytest.raises(KeyboardInterrupt):
            carry_out(again, None)
    carry_out(again, None)
    sealed_folder.verify(folder)
    assert (folder / "state.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def _cut_off_at(last: Path):
    def fsync(path: Path) -> None:
        if path == last:
            raise KeyboardInterrupt

    return fsync


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 KiB of tmpfs; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs; RLIMIT_FSIZE stands in (test_folder_process.py)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_the_older_one_stays(small_disk: Path) -> None:
    save(small_disk, 1)
    (small_disk / "ballast").write_bytes(b"x" * os.statvfs(small_disk).f_bavail * 4096)
    before = sorted(path.name for path in small_disk.iterdir())
    with pytest.raises((EnvironmentFault, OSError), match="No space left"):
        save(small_disk, 2)
    name = folder_name(2, 1)
    sealed_folder.remove(small_disk / f"{name}.tmp")
    descriptor = os.memfd_create("x")
    os.write(descriptor, bytes(9000))
    part = folder_job.FilePart(name="a", offset=0, num_bytes=9000)
    job = FolderJob(root=str(small_disk), name=name, facts={}, keep=1, best_name="", parts=(part,))
    with pytest.raises(EnvironmentFault, match="No space left on device; free space, older ones are intact"):
        carry_out(job, descriptor)
    os.close(descriptor)
    assert sorted(path.name for path in small_disk.iterdir()) == before, "a part of it was left"
    sealed_folder.verify(sealed_folder.folders(small_disk)[0])


def test_a_folder_that_became_read_only_is_told_and_the_older_one_stays(small_disk: Path) -> None:
    """A mount, since root may write into a folder whatever its mode."""
    save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(EnvironmentFault, match="Read-only file system"):
        save(small_disk, 2)
    sealed_folder.verify(sealed_folder.folders(small_disk)[0])
    assert steps_in(small_disk) == [1]


# ---- retention -----------------------------------------------------------------------------------


def test_the_newest_the_best_and_one_emergency_stay(tmp_path: Path) -> None:
    best = folder_name(2, 1)
    for step in range(1, 8):
        save(tmp_path, step, emergency=step in (3, 5), keep=2, best=best)
    assert steps_in(tmp_path) == [7, 6, 5, 2]


def test_what_does_not_look_whole_takes_nobodys_place(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (sealed_folder.folders(tmp_path)[0] / "state.json").unlink()
    cut(sealed_folder.folders(tmp_path)[1])
    save(tmp_path, 4, keep=2)
    assert steps_in(tmp_path) == [4, 3, 2, 1], "one of the two that are good went"
    save(tmp_path, 5, keep=2)
    assert steps_in(tmp_path) == [5, 4]


def test_nothing_is_removed_unless_one_that_stays_reads_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that keeps another byte than it was given, in every new checkpoint."""
    save(tmp_path, 1)
    really = sealed_folder._put_in_place

    def put_in_place(temporary: Path, target: Path) -> None:
        flip(temporary / "model.safetensors")
        really(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(sealed_folder, "_put_in_place", put_in_place)
        for step in (2, 3):
            damaged = save(tmp_path, step, keep=1).damaged
            assert f"{folder_name(step, 1)}: model.safetensors is damaged" in damaged
            assert "no older one was removed" in damaged
    assert steps_in(tmp_path) == [3, 2, 1]
    sealed_folder.verify(sealed_folder.folders(tmp_path)[-1])
    assert save(tmp_path, 4, keep=1).damaged == ""
    assert steps_in(tmp_path) == [4]


def test_a_trainer_that_was_replaced_removes_nothing_of_its_successor(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, generation=2)
    put_files(tmp_path, 4, generation=2)
    put_files(tmp_path, 8, generation=1)
    save(tmp_path, 9, generation=1, keep=1)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [
        "step-00000001.gen-2", "step-00000002.gen-2", "step-00000003.gen-2", "step-00000004.gen-2.tmp",
    ]  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), st.integers(1, 4))
def test_of_those_that_look_whole_as_many_stay_as_there_are_to_keep(
    kinds: list[tuple[bool, bool]], keep: int
) -> None:
    """(Emergency, whole) of each, newest first."""
    folders = [Path(folder_name(100 - i, 1, emergency=kind[0])) for i, kind in enumerate(kinds)]
    whole = {folder for folder, kind in zip(folders, kinds, strict=True) if kind[1]}
    going = superfluous(folders, keep=keep, best_name="", looks_whole=lambda folder: folder in whole)
    for is_emergency, wanted in ((False, keep), (True, 1)):
        mine = [f for f in folders if f in whole and sealed_folder.is_emergency(f.name) == is_emergency]
        assert [f for f in mine if f not in going] == mine[:wanted]


def test_the_manifest_holds_what_was_in_the_buffer_not_what_the_disk_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = os.memfd_create("x")
    os.write(descriptor, b"weights")
    really = folder_job._copy

    def copy(buffer: int, part: folder_job.FilePart, target: Path) -> str:
        digest = really(buffer, part, target)
        flip(target)
        return digest

    monkeypatch.setattr(folder_job, "_copy", copy)
    part = folder_job.FilePart(name="a", offset=0, num_bytes=7)
    name = folder_name(1, 1)
    carry_out(
        FolderJob(root=str(tmp_path), name=name, facts={}, keep=1, best_name="", parts=(part,)), descriptor
    )
    os.close(descriptor)
    with pytest.raises(CheckpointError, match="a is damaged"):
        sealed_folder.verify(tmp_path / name)
    assert json.loads((tmp_path / name / MANIFEST).read_text())["files"]["a"]["bytes"] == 7
