"""provenance.json holds what made the run, and a trainer starts without git and without a disk as well."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from trainer_node import provenance
from trainer_node.provenance import FILE, MAX_DIFF_CHARACTERS, write_provenance

COMMIT = "0" * 40


def written(folder: Path) -> dict:
    write_provenance(provenance.provenance(), folder)
    assert [path.name for path in folder.iterdir()] == [FILE]
    return json.loads((folder / FILE).read_text(encoding="utf-8"))


def answering(diff: bytes, *, top: Path | None = None):
    """A git that answers so."""
    root = Path(provenance.__file__).resolve().parent.parent

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        answers = {
            "--show-toplevel": f"{top or root}\n".encode(),
            "HEAD": f"{COMMIT}\n".encode(),
        }
        out = diff if "diff" in command else answers[command[-1]]
        return subprocess.CompletedProcess(command, 0, out, b"")

    return run


def test_it_names_commit_difference_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", answering(b"-a\n+\xff\n"))
    found = written(tmp_path)
    assert found["git_commit"] == COMMIT
    assert found["git_diff"] == "-a\n+\N{REPLACEMENT CHARACTER}\n"
    assert {"python", "torch", "numpy"} <= set(found["versions"])


def test_a_long_difference_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", answering(b"x" * (2 * MAX_DIFF_CHARACTERS)))
    found = written(tmp_path)
    assert len(found["git_diff"]) < MAX_DIFF_CHARACTERS + 100
    assert found["git_diff"].endswith("(cut off here)\n")


def test_the_checkout_of_another_project_around_the_package_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", answering(b"+theirs", top=Path("/somewhere")))
    found = written(tmp_path)
    assert (found["git_commit"], found["git_diff"]) == ("", None)


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 1.0)])
def test_without_git_the_versions_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    found = written(tmp_path)
    assert (found["git_commit"], found["git_diff"]) == ("", None)
    assert found["versions"]["torch"] != "not installed"


def test_a_disk_that_takes_no_file_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", answering(b""))
    write_provenance(provenance.provenance(), tmp_path / "not-there")
    assert not list(tmp_path.iterdir())
