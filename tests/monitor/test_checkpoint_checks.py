"""What the disk says of checkpoints: read once each, never blocking, and never beyond the run's folder."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import sealed_folder
from monitor_node import checkpoint_checks
from monitor_node.checkpoint_checks import (
    DAMAGED,
    GONE,
    MAX_ROWS,
    PEACE_TIMES,
    VERIFIED,
    WRITTEN,
    CheckpointChecks,
    CheckpointRow,
    Found,
    checkpoint_rows,
    examined,
    presence,
    with_row,
)
from tests.monitor import fake_run as fake

DEADLINE_SECONDS = 20.0


def folder_of(run: Path, step: int) -> Path:
    root = run / "checkpoints" / "trainer"
    temporary = sealed_folder.begin(root, sealed_folder.folder_name(step, 1))
    (temporary / "model.safetensors").write_bytes(b"w" * 1000)
    return sealed_folder.seal(temporary, {"step": step})


def name_of(step: int) -> str:
    return sealed_folder.folder_name(step, 1)


def looked(checks: CheckpointChecks, *names: str, until: dict[str, str]) -> dict[str, Found]:
    """Looks again until these states are seen."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        found = checks.look(names)
        if {name: found[name].state for name in until if name in found} == until:
            return found
        assert time.monotonic() < deadline, f"{found}, expected {until}"
        time.sleep(0.01)


def settled(checks: CheckpointChecks, *names: str) -> dict[str, Found]:
    """What is known when the look that begins now has ended."""
    checks.look(names)
    for thread in threading.enumerate():
        if thread.name == "checkpoints":
            thread.join(DEADLINE_SECONDS)
    return checks.look(names)


def row(step: int) -> CheckpointRow:
    return CheckpointRow(written=fake.checkpoint(step), at_unix_seconds=1e9 + step, at_seconds=float(step))


def test_a_whole_folder_is_verified_and_measured(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 50)
    found = looked(CheckpointChecks(tmp_path), folder.name, until={folder.name: VERIFIED})[folder.name]
    assert found.num_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_a_flipped_byte_is_seen(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 50)
    (folder / "model.safetensors").write_bytes(b"w" * 999 + b"x")
    found = looked(CheckpointChecks(tmp_path), folder.name, until={folder.name: DAMAGED})[folder.name]
    assert "model.safetensors is damaged" in (found.why or "")
    assert str(tmp_path) not in (found.why or "")


def test_a_folder_that_was_removed_is_gone_and_one_to_come_is_not(tmp_path: Path) -> None:
    checks = CheckpointChecks(tmp_path)
    folders = [folder_of(tmp_path, step) for step in (50, 100)]
    names = (name_of(150), name_of(100), name_of(50))
    sealed_folder.remove(folders[0])
    looked(checks, *names, until={name_of(150): WRITTEN, name_of(100): VERIFIED, name_of(50): GONE})
    sealed_folder.remove(folders[1])
    looked(checks, *names, until={name_of(150): WRITTEN, name_of(100): GONE, name_of(50): GONE})


def test_the_newest_is_read_first_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [folder_of(tmp_path, step).name for step in (150, 100, 50)]
    read: list[str] = []

    def counted(folder: Path) -> Found:
        read.append(folder.name)
        return examined(folder)

    monkeypatch.setattr(checkpoint_checks, "examined", counted)
    checks = CheckpointChecks(tmp_path)
    looked(checks, *names, until=dict.fromkeys(names, VERIFIED))
    for _ in range(5):
        settled(checks, *names)
    assert read == names


def test_the_disk_has_peace_after_a_long_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [folder_of(tmp_path, step).name for step in (100, 50)]
    now = [0.0]

    def slow(folder: Path) -> Found:
        now[0] += 2.0
        return examined(folder)

    monkeypatch.setattr(checkpoint_checks, "examined", slow)
    checks = CheckpointChecks(tmp_path, now_seconds=lambda: now[0])
    looked(checks, *names, until={names[0]: VERIFIED})
    now[0] += 2.0 * PEACE_TIMES - 1.0
    for _ in range(5):
        assert settled(checks, *names)[names[1]].state == WRITTEN
    now[0] += 2.0
    looked(checks, *names, until={names[1]: VERIFIED})


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, 50)
    go_on = threading.Event()

    def hang(folder: Path) -> Found:
        go_on.wait(DEADLINE_SECONDS)
        return examined(folder)

    monkeypatch.setattr(checkpoint_checks, "examined", hang)
    checks, before = CheckpointChecks(tmp_path), threading.active_count()
    for _ in range(50):
        assert checks.look([folder.name]).get(folder.name, Found(state=WRITTEN)).state == WRITTEN
    assert threading.active_count() <= before + 1
    go_on.set()
    looked(checks, folder.name, until={folder.name: VERIFIED})


@pytest.mark.parametrize("name", ["../../etc", "/etc", "step-00000050.gen-1/../..", "", "x" * 5000])
def test_a_name_that_is_no_checkpoints_is_not_followed(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, 50)
    found = looked(CheckpointChecks(tmp_path), name, folder.name, until={folder.name: VERIFIED})
    assert set(found) == {folder.name}


def test_of_a_run_elsewhere_nothing_is_known(tmp_path: Path) -> None:
    assert CheckpointChecks(None).look([name_of(50)]) == {}
    checks = CheckpointChecks(tmp_path / "not-here")
    for _ in range(3):
        assert checks.look([name_of(50)]) == {}


STATES = st.sampled_from([WRITTEN, VERIFIED, DAMAGED, GONE])


@given(
    st.lists(st.tuples(st.booleans(), st.none() | STATES), max_size=6),
)
def test_what_is_there_is_never_gone_and_what_was_verified_stays_so(
    disk: list[tuple[bool, str | None]],
) -> None:
    names = [name_of(1000 - n) for n in range(len(disk))]
    before = {name: Found(state=state) for name, (_, state) in zip(names, disk, strict=True) if state}
    found = presence(names, {name: there for name, (there, _) in zip(names, disk, strict=True)}, before)
    assert list(found) == names
    for name, (there, state) in zip(names, disk, strict=True):
        assert not (there and found[name].state == GONE)
        assert there or found[name].state in (GONE, WRITTEN)
        if there and state in (VERIFIED, DAMAGED):
            assert found[name].state == state
        if not there and state in (VERIFIED, DAMAGED, GONE):
            assert found[name].state == GONE


def test_the_newest_folder_is_gone_only_if_it_was_ever_there() -> None:
    (name,) = names = [name_of(50)]
    to_come = presence(names, {name: False}, {})
    assert to_come[name].state == WRITTEN
    assert presence(names, {name: False}, to_come)[name].state == WRITTEN
    there = presence(names, {name: True}, to_come)
    assert presence(names, {name: False}, there)[name].state == GONE


def test_rows_are_newest_first_bounded_and_as_the_trainer_said_until_they_were_looked_at() -> None:
    rows: tuple[CheckpointRow, ...] = ()
    for step in range(0, 1000, 50):
        rows = with_row(rows, row(step))
    shown = checkpoint_rows(rows, {name_of(900): Found(state=DAMAGED, why="flipped")})
    assert [r["step"] for r in shown] == list(range(950, 350, -50))
    assert len(shown) == MAX_ROWS
    assert (shown[0]["state"], shown[0]["num_bytes"], shown[0]["why"]) == (WRITTEN, None, None)
    assert (shown[1]["state"], shown[1]["why"]) == (DAMAGED, "flipped")


def test_a_checkpoint_that_is_told_twice_is_one_row() -> None:
    rows = with_row(with_row((), row(50)), row(50))
    assert len(rows) == 1
