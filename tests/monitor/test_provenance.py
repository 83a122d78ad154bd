"""What a run is made with is read as data: bounded, strict, unknown where it is not as expected."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor_node.provenance import (
    MAX_CHARACTERS,
    MAX_FILE_BYTES,
    UNKNOWN,
    Provenance,
    ProvenanceReader,
    provenance_of,
    provenance_section,
)
from tests.faults import wait_until

TOLD = {"git_commit": "abc", "git_diff": "+x", "versions": {"python": "3.11", "torch": "2.13"}}


def test_the_start_of_a_run_tells_all(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps(TOLD))
    (tmp_path / "summary.json").write_text(json.dumps({"git_commit": "other"}))
    found = ProvenanceReader(tmp_path).look_now()
    assert found == Provenance(git_commit="abc", git_diff="+x", versions="python 3.11\ntorch 2.13")
    assert provenance_section(found, "[trainer]")["config_toml"] == "[trainer]"


def test_the_end_of_an_older_run_tells_all_but_the_difference(tmp_path: Path) -> None:
    reader = ProvenanceReader(tmp_path)
    assert reader.look_now() == UNKNOWN
    (tmp_path / "summary.json").write_text(json.dumps({"git_commit": "abc", "versions": {}}))
    assert reader.look_now() == Provenance(git_commit="abc")


def test_a_resumed_run_is_read_again(tmp_path: Path) -> None:
    path, reader = tmp_path / "provenance.json", ProvenanceReader(tmp_path)
    for place, commit in enumerate(("one", "two")):
        path.write_text(json.dumps({"git_commit": commit}))
        os.utime(path, (place, place))
        assert reader.look_now().git_commit == commit


def test_of_a_run_elsewhere_nothing_is_known(tmp_path: Path) -> None:
    assert ProvenanceReader(None).look_now() == UNKNOWN
    assert ProvenanceReader(tmp_path / "not-here").look_now() == UNKNOWN


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps(TOLD) + " " * MAX_FILE_BYTES)
    assert ProvenanceReader(tmp_path).look_now() == UNKNOWN


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "provenance.json")
    assert ProvenanceReader(tmp_path).look_now() == UNKNOWN


def test_a_disk_that_hangs_does_not_hold_up_the_monitor(tmp_path: Path) -> None:
    """Beside a run the node asks once a second, in the thread that guards memory."""
    is_back, answered = threading.Event(), threading.Event()

    class Hanging:
        def __truediv__(self, name: str) -> Path:
            is_back.wait(5.0)
            answered.set()
            return tmp_path / name

    reader = ProvenanceReader(Hanging())  # type: ignore[arg-type]
    assert [reader.look(), reader.look()] == [UNKNOWN, UNKNOWN]
    assert not answered.is_set()
    (tmp_path / "provenance.json").write_text(json.dumps(TOLD))
    is_back.set()
    wait_until(lambda: reader.look().git_commit == "abc")


def test_a_long_difference_is_cut_and_no_difference_is_not_unknown() -> None:
    long = provenance_of(json.dumps({"git_diff": "x" * (2 * MAX_CHARACTERS)})).git_diff
    assert long is not None
    assert len(long) < MAX_CHARACTERS + 100
    assert long.endswith("(cut off here)\n")
    assert provenance_of(json.dumps({"git_diff": ""})).git_diff == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["git_commit", "git_diff", "versions"]), JSON) | JSON)
def test_whatever_is_in_the_file_the_section_is_of_texts(told: Any) -> None:
    section = provenance_section(provenance_of(json.dumps(told)), None)
    assert set(section) == {"git_commit", "git_diff", "config_toml", "versions"}
    assert all(value is None or isinstance(value, str) for value in section.values())


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", "nan"])
def test_what_is_no_json_is_unknown(text: str) -> None:
    assert provenance_of(text) == UNKNOWN
