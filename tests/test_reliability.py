"""docs/reliability.md names tests that exist, and no promise stands there without one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def names_in(page: str) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", page))


def known_tests() -> set[str]:
    found: set[str] = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        found.update(
            re.findall(r"^\s*(?:async )?def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
        )
    return found


def test_every_test_that_the_page_names_exists() -> None:
    assert names_in(PAGE) - known_tests() == set()
    assert len(names_in(PAGE)) > 50
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/[\w/]+\.py)`", PAGE))


def test_every_promise_names_a_test() -> None:
    tables = [part for part in PAGE.split("\n\n") if part.startswith("| promise | tests |")]
    rows = [row for table in tables for row in table.splitlines()[2:]]
    assert len(rows) > 30
    assert [
        row for row in rows if not re.search(r"`(test_\w+|tests/[\w/]+\.py)`", row.split(" | ")[-1])
    ] == []
