"""The bus tests on other versions of redis-py.

pip install --target /tmp/redis-6.4.0 redis==6.4.0
pip install --target /tmp/redis-7.4.0 redis==7.4.0
HPT_TEST_REDIS_VERSIONS=/tmp/redis-6.4.0:/tmp/redis-7.4.0 python -m pytest tests/common/test_redis_versions.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [folder for folder in os.environ.get("HPT_TEST_REDIS_VERSIONS", "").split(os.pathsep) if folder]
SUITES = (
    "test_bus_contract.py",
    "test_bus_groups.py",
    "test_bus_twins.py",
    "test_redis_findings.py",
    "test_redis_errors.py",
    "test_blobs.py",
    "test_outbox.py",
)


@pytest.fixture(scope="module")
def suites_running() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The bus tests of every folder, all at once: they mostly wait, for deadlines and for the server."""
    suites = [str(ROOT / "tests" / "common" / suite) for suite in SUITES]
    with ExitStack() as ending:
        started: dict[str, subprocess.Popen[str]] = {}
        for folder in FOLDERS:
            started[folder] = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites],
                env=environment_with(folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
            ending.enter_context(started[folder])
            ending.callback(started[folder].kill)
        yield started


def environment_with(folder: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("folder", FOLDERS or [None])
def test_bus_works_with_this_version_of_redis_py(
    folder: str | None, suites_running: dict[str, subprocess.Popen[str]]
) -> None:
    if folder is None:
        pytest.skip("set HPT_TEST_REDIS_VERSIONS to folders made by `pip install --target`")
    used = subprocess.run(
        [sys.executable, "-c", "import redis; print(redis.__file__)"],
        env=environment_with(folder), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(used.stdout.strip()).is_relative_to(Path(folder).resolve())
    told, _ = suites_running[folder].communicate()
    assert suites_running[folder].returncode == 0, told[-4000:]
