"""The bus tests on other versions of redis-py.

pip install --target /tmp/redis-6.4.0 redis==6.4.0
pip install --target /tmp/redis-7.4.0 redis==7.4.0
HPT_TEST_REDIS_VERSIONS=/tmp/redis-6.4.0:/tmp/redis-7.4.0 python -m pytest tests/common/test_redis_versions.py
"""

from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("folder", FOLDERS or [None])
def test_bus_works_with_this_version_of_redis_py(folder: str | None) -> None:
    if folder is None:
        pytest.skip("set HPT_TEST_REDIS_VERSIONS to folders made by `pip install --target`")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
    used = subprocess.run(
        [sys.executable, "-c", "import redis; print(redis.__file__)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(used.stdout.strip()).is_relative_to(Path(folder).resolve())
    suites = [str(ROOT / "tests" / "common" / suite) for suite in SUITES]
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-4000:]
