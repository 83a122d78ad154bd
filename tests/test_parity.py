"""docs/parity.md keeps its promise: 69 rows in order, none empty, every file and test named in it exists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_ROWS = 69
STATE = re.compile(r"(here|replaced|not built|later \(issue [4-7]\))(, later \(issue [4-7]\))?")


@dataclass(frozen=True, kw_only=True)
class Row:
    number: str
    capability: str
    state: str
    place: str  # where it lives, what replaces it and why, or what will bring it
    tests: str  # `tests/x.py::test_y`, or a dash for what is only later


def rows_of(page: str) -> list[Row]:
    rows = []
    for line in page.splitlines():
        if not re.match(r"\| *\d", line):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) != 5:
            raise ValueError(f"not five cells: {line}")
        rows.append(Row(number=cells[0], capability=cells[1], state=cells[2], place=cells[3], tests=cells[4]))
    return rows


def faults_of(row: Row, root: Path) -> list[str]:
    """What is wrong with one row, in words."""
    faults = []
    if not row.capability or len(row.place) < 20:
        faults.append(f"row {row.number} says too little")
    if not STATE.fullmatch(row.state):
        faults.append(f"row {row.number}: unknown state {row.state!r}")
    named = re.findall(r"`([^`]+)`", row.tests)
    if row.state.startswith("later"):
        if row.tests != "—":
            faults.append(f"row {row.number} is for later and yet names {row.tests}")
    elif not named:
        faults.append(f"row {row.number} names no test")
    for name in named:
        file, _, function = name.partition("::")
        if not function:
            faults.append(f"row {row.number}: {name} is not of the form tests/x.py::test_y")
        elif not (root / file).is_file():
            faults.append(f"row {row.number}: {file} does not exist")
        elif not re.search(
            rf"^\s*(async )?def {re.escape(function)}\(", (root / file).read_text(), re.MULTILINE
        ):
            faults.append(f"row {row.number}: {name} does not exist")
    paths = re.findall(r"`([\w./-]+/[\w./-]*)`", row.place)
    faults += [f"row {row.number}: {path} does not exist" for path in paths if not (root / path).exists()]
    return faults


ROWS = rows_of((ROOT / "docs" / "parity.md").read_text(encoding="utf-8"))


def test_every_row_of_the_study_is_there_once_and_in_order() -> None:
    assert [row.number for row in ROWS] == [str(number) for number in range(1, NUM_ROWS + 1)]


def test_no_row_is_empty_and_all_that_is_named_exists() -> None:
    faults = [fault for row in ROWS for fault in faults_of(row, ROOT)]
    assert not faults, "\n" + "\n".join(faults)


GOOD = Row(
    number="1",
    capability="phases",
    state="here",
    place="`common/messages/` holds the four of them",
    tests="`tests/test_parity.py::test_a_sound_row_has_no_fault`",
)


def test_a_sound_row_has_no_fault() -> None:
    assert faults_of(GOOD, ROOT) == []


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("place", "", "too little"),
        ("capability", "", "too little"),
        ("state", "soon", "unknown state"),
        ("state", "later (issue 3)", "unknown state"),
        ("state", "later (issue 4)", "for later and yet"),
        ("place", "`common/nothing.py` holds the four of them", "does not exist"),
        ("tests", "—", "names no test"),
        ("tests", "`tests/nothing.py::test_x`", "does not exist"),
        ("tests", "`tests/test_parity.py::test_nothing`", "does not exist"),
        ("tests", "`tests/test_parity.py`", "not of the form"),
    ],
)
def test_a_faulty_row_is_named(field: str, value: str, fault: str) -> None:
    values = {name: getattr(GOOD, name) for name in ("number", "capability", "state", "place", "tests")}
    assert any(fault in found for found in faults_of(Row(**{**values, field: value}), ROOT))
