"""kill -9 at any line of a save: what was durable stays, and is what was saved under its name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import sealed_folder

KILLS = 140  # each line of a save at least once


def test_a_save_that_is_killed_at_any_line_loses_nothing_that_was_durable(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.common.kill_scene", str(tmp_path), "5", str(KILLS)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["lost"] == []
    assert found["cut_off"] > KILLS // 4, "hardly a save was cut off: this shows nothing"
    assert found["steps"] > KILLS // 4, "hardly a save came to its end: this shows nothing"
    assert found["lines"] <= KILLS, "more lines than kills: raise KILLS"
    newest = found["steps"] + 1
    assert found["left"] == [sealed_folder.folder_name(step, 1) for step in (newest - 1, newest)]
