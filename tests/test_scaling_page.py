"""docs/scaling.md says what the code says: the example of a dry run, and the bounds of messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.config import load_settings
from trainer_node.dry_run import plan_lines, run_plan

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_example_on_the_page_is_what_the_command_prints() -> None:
    assert "\n".join(plan_lines(load_settings(preset="gpt2-small"))) in PAGE


@pytest.mark.parametrize(
    ("row", "bound"),
    [
        ("Observation", "observation"),
        ("what a decision point adds", "decision_point"),
        ("PhaseDecision", "decision"),
    ],
)
def test_the_bounds_on_the_page_are_those_of_the_code(row: str, bound: str) -> None:
    found = re.search(rf"^\| {row} \| (\d+) \+ (\d+) G \(", PAGE, re.MULTILINE)
    assert found is not None
    per_run, per_group = map(int, found.groups())
    for preset in ("gpt2-small", "nano"):
        plan = run_plan(load_settings(preset=preset))
        assert getattr(plan.messages, bound) == per_run + per_group * len(plan.groups)
