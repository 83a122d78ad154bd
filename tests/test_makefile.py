"""The set-up logic of the Makefile, without installing anything: what make would do, and its error lines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "pip install"
LOCKS = ("requirements.lock", "requirements-dev.lock")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make on PATH")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What make reads, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", *LOCKS):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    ours = ("MAKE", "TORCH_INDEX", "ARGS")  # an outer make exports what it was given
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environment = {"PYTHON": sys.executable, **inherited, "LC_ALL": "C"}  # saves the search for one
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def pretend_ready(folder: Path) -> None:
    """Leave the stamps of a finished set-up for the folder as it is now."""
    plan = make(folder, "-n", "setup-dev").stdout
    (folder / ".venv").mkdir(exist_ok=True)
    stamps = re.findall(r"touch (\.venv/\S+)", plan)
    assert len(stamps) == 2
    for stamp in stamps:
        (folder / stamp).touch()


def test_make_alone_lists_every_target(clone: Path) -> None:
    result = make(clone)
    assert result.returncode == 0
    assert re.findall(r"^make (\S+)", result.stdout, re.MULTILINE) == [
        *("help", "up", "test", "lint", "gpu", "docs", "lock", "clean")
    ]


@pytest.mark.parametrize("target", ["up", "test", "lint"])
def test_a_fresh_clone_is_set_up_first_and_a_ready_one_is_not(clone: Path, target: str) -> None:
    assert INSTALL in make(clone, "-n", target).stdout
    pretend_ready(clone)
    os.utime(clone / "pyproject.toml")  # a checkout touches files without changing them
    assert INSTALL not in make(clone, "-n", target).stdout


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", *LOCKS])
def test_a_changed_requirement_repeats_the_set_up(clone: Path, name: str) -> None:
    pretend_ready(clone)
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    assert INSTALL in make(clone, "-n", "test").stdout


def test_a_moved_folder_repeats_the_set_up(clone: Path) -> None:
    pretend_ready(clone)
    moved = clone.parent / "moved"
    shutil.copytree(clone, moved)
    assert INSTALL in make(moved, "-n", "up").stdout


def test_the_torch_index_is_empty_unless_given(clone: Path) -> None:
    assert "--extra-index-url" not in make(clone, "-n", "up").stdout
    plan = make(clone, "-n", "up", "TORCH_INDEX=https://example.org/cpu").stdout
    assert "--extra-index-url https://example.org/cpu torch" in plan


def test_a_missing_or_old_python_is_one_clear_line(clone: Path) -> None:
    for python in ("", "no-such-python", "false"):
        result = make(clone, "up", f"PYTHON={python}")
        assert result.returncode != 0
        assert "Python 3.11 or newer is needed" in result.stderr
        assert not (clone / ".venv").exists()


def test_a_python_without_venv_is_one_clear_line(clone: Path) -> None:
    """Debian's python3 without python3-venv passes the version check and then fails."""
    fake = clone / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    result = make(clone, "up", f"PYTHON={fake}")
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr
    assert not (clone / ".venv").exists()


def test_every_direct_requirement_is_pinned_to_a_version_it_allows() -> None:
    from packaging.requirements import Requirement

    pins = constraints()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]:
        requirement = Requirement(text)
        assert plain(requirement.name) in pins, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[plain(requirement.name)])


# --- the files, by their hashes ------------------------------------------------------------------


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        plain(line.partition("==")[0]): line.partition("==")[2] for line in lines if line[:1] not in ("", "#")
    }


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Of a lock: package -> (version, number of hashes)."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(
                r"([A-Za-z0-9._-]+)==([^ ;]+)( ;[^-]*?)?((?: +--hash=sha256:[0-9a-f]{64})+)", line.strip()
            )
            assert match, line
            found[plain(match[1])] = (match[2], match[4].count("--hash="))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_every_package_to_files_and_to_the_version_of_the_constraints(name: str) -> None:
    pins = constraints()
    for package, (version, hashes) in locked(name).items():
        assert hashes >= 1
        if package not in ("colorama", "httpx2-jsfetch"):  # of Windows and of the browser: not installed here
            assert pins[package] == version, package


def test_only_torch_and_what_its_cuda_build_brings_are_in_no_lock() -> None:
    assert constraints().keys() - locked("requirements-dev.lock").keys() == {"torch"}
    assert locked("requirements.lock").items() <= locked("requirements-dev.lock").items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {plain(re.match(r"[\w.-]+", text)[0]) for text in project["dependencies"]}  # type: ignore[index]
    assert needed - locked("requirements.lock").keys() == {"torch"}


def test_what_is_installed_is_checked_against_its_hash_but_for_torch_and_ourselves(clone: Path) -> None:
    plan = make(clone, "-n", "setup-dev").stdout.replace("\\\n", " ")
    installs = [line for line in plan.splitlines() if INSTALL in line]
    hashed = [line for line in installs if "--require-hashes" in line]
    assert [line.split()[-1] for line in hashed] == list(LOCKS)
    assert [line.split()[-1] for line in installs if line not in hashed] == ["torch", ".", "'.[dev]'"]
    assert all("-c constraints.txt" in line for line in installs if line not in hashed)
