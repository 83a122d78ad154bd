"""`monitor-node status` with the folder of a run: its code, and whether its checkpoints are whole."""

from __future__ import annotations

import json
from pathlib import Path

from common.clock import FakeClock
from common.memory_bus import MemoryBus, MemoryServer
from common.streams import TRAINER
from monitor_node.checkpoint_checks import DAMAGED, GONE, VERIFIED, WRITTEN
from monitor_node.serve import read_run
from monitor_node.snapshot import as_dict
from tests.monitor import fake_run as fake
from tests.monitor.test_checkpoint_checks import folder_of


def page_of(run_folder: Path | None) -> dict:
    bus = MemoryBus(MemoryServer(), "run")
    publisher = fake.publisher_of(bus, TRAINER, generation=1)
    for message in (fake.started(), *(fake.checkpoint(step) for step in (10, 20, 30))):
        publisher.send([publisher.prepare(message)], give_up_seconds=0.0)
    return as_dict(read_run(bus, "run", FakeClock(), run_folder=run_folder), now_seconds=0.0)


def test_every_checkpoint_is_read_and_the_code_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path, 30)
    file = folder_of(tmp_path, 20) / "model.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    (tmp_path / "provenance.json").write_text(json.dumps({"git_commit": "abc"}))
    page = page_of(tmp_path)
    assert [row["state"] for row in page["checkpoints"]] == [VERIFIED, DAMAGED, GONE]
    assert page["provenance"]["git_commit"] == "abc"


def test_without_the_folder_nothing_is_claimed_of_the_disk() -> None:
    page = page_of(None)
    assert {row["state"] for row in page["checkpoints"]} == {WRITTEN}
    assert page["provenance"]["git_commit"] is None
