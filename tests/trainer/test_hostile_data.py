"""Text, tokens and heartbeats of a stranger: bounded reading, nothing from outside the folder, one line."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bus import EntryId
from common.messages import Heartbeat, Metric
from trainer_node.corpus import collect
from trainer_node.retention import Retention
from trainer_node.tokens import read_sidecar

MIB = 1 << 20


def test_of_a_file_beyond_the_room_no_more_than_the_room_is_read(tmp_path: Path) -> None:
    """Sparse files: nothing on the disk, half a gigabyte for who reads them whole."""
    (tmp_path / "small.txt").write_text("text\n")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.write(b"a" * 4096)
        file.truncate(512 * MIB)
    tracemalloc.start()
    corpus = collect(str(tmp_path), max_bytes=64 * 1024)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.name for document in corpus.documents] == ["small.txt"]
    assert peak_bytes < MIB


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_an_index_of_a_stranger_leads_to_no_file_outside_the_folder(tmp_path: Path) -> None:
    """Tracked as `notes/secret.txt`; then the folder became a link to another one."""
    repository, outside = tmp_path / "repository", tmp_path / "outside"
    for folder in (repository / "notes", outside):
        folder.mkdir(parents=True)
        (folder / "secret.txt").write_text("secret\n")
    (repository / "a.txt").write_text("text\n")
    for arguments in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(repository), *arguments], check=True)
    shutil.rmtree(repository / "notes")
    os.symlink(outside, repository / "notes")
    corpus = collect(str(repository))
    assert [document.name for document in corpus.documents] == ["a.txt"]
    assert corpus.skipped == {"link out of the folder": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"{}",
        b"[]",
        b'{"train": 1}',
        b"1" * 5000,
        b'{"train":{},"validation":{}}',
        b"\xff",
        b"",
    ],
)
def test_a_damaged_sidecar_is_no_sidecar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokens.json").write_bytes(content)
    assert read_sidecar(tmp_path) is None


@given(
    st.lists(st.tuples(st.sampled_from(["saved_generation", "saved_sequence", "x"]), st.floats() | st.none()))
)
def test_no_heartbeat_breaks_the_account_of_what_is_saved(counters: list[tuple[str, float | None]]) -> None:
    retention = Retention()
    metrics = tuple(Metric(name=name, value=value, unit="1") for name, value in counters)
    retention.note(
        Heartbeat(
            node="predictor",
            generation=1,
            process_id=1,
            state="",
            step=0,
            uptime_seconds=math.nan,
            counters=metrics,
        )
    )
    retention.trim_below(EntryId(1, 10**6))
