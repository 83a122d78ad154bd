"""summary.json is strict JSON, whatever happened, and its lines say what to do next."""

from __future__ import annotations

import json
from pathlib import Path

from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings
from trainer_node.housekeeping import Housekeeping
from trainer_node.provenance import provenance
from trainer_node.summary import build_summary, summary_lines, write_summary

KEYS = (
    "run_id", "seed", "git_commit", "versions", "real_steps", "virtual_steps", "proposals", "accepted",
    "refused", "vetoed", "stale", "val_loss_first", "val_loss_last", "seconds_total", "seconds_in_steps",
    "seconds_in_verification", "seconds_waiting", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip


def summary_of_a_run(tmp_path: Path, *, status: str, last_loss: float | None = None) -> dict:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.2))
    housekeeping = Housekeeping(links.emit, None)
    loop = tiny_loop(links, tiny_settings(), housekeeping=housekeeping)
    housekeeping.begin(loop)
    loop.run()
    housekeeping.end(loop, emergency=False)
    if last_loss is not None:
        housekeeping.last_loss = last_loss
    summary = build_summary(loop, housekeeping, run_id="x", status=status, late=3, made_with=provenance())
    write_summary(tmp_path / "summary.json", summary)

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return json.loads((tmp_path / "summary.json").read_text(), parse_constant=no_constant)


def test_every_promised_key_is_there_and_the_numbers_agree(tmp_path: Path) -> None:
    summary = summary_of_a_run(tmp_path, status="finished")
    assert [key for key in KEYS if key not in summary] == []
    assert summary["real_steps"] == 60
    assert summary["stale"] == 3
    assert summary["applied"] == summary["accepted"] + summary["refused"] > 0
    assert 0 < summary["seconds_in_steps"] < summary["seconds_total"]
    assert summary["peak_memory_bytes"] > 1 << 20


def test_a_lost_run_still_has_a_strict_summary(tmp_path: Path) -> None:
    summary = summary_of_a_run(tmp_path, status="finished", last_loss=float("nan"))
    assert summary["val_loss_last"] == "nan"
    assert any("nan" in line for line in summary_lines(tmp_path / "summary.json", tmp_path))


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    summary_of_a_run(tmp_path, status="stopped")
    assert f"trainer-node resume {tmp_path}" in summary_lines(tmp_path / "summary.json", tmp_path)[-1]
