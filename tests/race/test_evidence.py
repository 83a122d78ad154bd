"""Committed evidence is read strictly, and docs/evidence.md says exactly what the files say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import SettingsError
from tests.race.synthetic_race import READ_MID_RUN, race_results, record
from trainer_node.race import evidence
from trainer_node.race.evidence import Evidence
from trainer_node.race.evidence_page import NOTHING, render
from trainer_node.race.figures import race_figures

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("adamw-decay", "adamw-decay-ema", "ours-fixed", "ours-unguarded", "ours-random", "ours")
REQUIRED = (
    "task", "rule", "target", "seeds", "trials", "machine", "date", "command", "base_steps", "arms",
)  # fmt: skip
REQUIRED_OF_ARMS = (
    "config", "passes_median", "seconds_median", "ratio_median", "ratio_low95", "ratio_high95",
    "final_quality_median", "misses",
)  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Evidence:
    figures = race_figures(record(ARMS), race_results(ARMS), read_mid_run=READ_MID_RUN)
    return evidence.evidence_of(figures)


def renamed(made: Evidence, task: str, rule: str = "decayed") -> Evidence:
    return dataclasses.replace(made, task=task, rule=rule)


def test_the_page_in_docs_is_what_the_files_render() -> None:
    """Otherwise: .venv/bin/python -m trainer_node.race.evidence"""
    rendered = render(ROOT / "docs" / "evidence")
    assert (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") == rendered


def test_without_evidence_the_page_claims_nothing(tmp_path: Path) -> None:
    page = render(tmp_path / "none")
    assert NOTHING in page
    assert "Met" not in page


def test_what_is_written_is_read_back_equal_and_has_every_promised_key(
    made: Evidence, tmp_path: Path
) -> None:
    path = evidence.write(tmp_path / "new", made)
    assert path.name == "python.decayed.json"
    assert evidence.read(path) == made
    values = json.loads(path.read_text())
    assert set(REQUIRED) <= values.keys()
    for arm in values["arms"].values():
        assert set(REQUIRED_OF_ARMS) <= arm.keys()
    lost = values["arms"]["ours-unguarded"]
    assert (lost["seconds_median"], lost["misses"]) == (None, 10)


def test_optional_keys_may_be_left_out(made: Evidence, tmp_path: Path) -> None:
    values = dataclasses.asdict(made)
    least = {key: values[key] for key in REQUIRED}
    least["arms"] = {
        name: {key: arm[key] for key in REQUIRED_OF_ARMS} for name, arm in values["arms"].items()
    }
    path = tmp_path / "python.decayed.json"
    path.write_text(json.dumps(least))
    assert evidence.read(path).arms["ours"].seconds_median == made.arms["ours"].seconds_median
    assert "## python, decayed" in render(tmp_path)


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(key)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.__setitem__(key, value)


def put_in_ours(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values["arms"]["ours"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop("target"), "lacks the key 'target'"),
        (put("speedup", 3), "unknown key 'speedup'"),
        (put("rule", "easy"), "rules: constant"),
        (put("target", "low"), "evidence.target is 'low', not float"),
        (put("target", float("nan")), "NaN is not a finite number"),
        (put("seeds", []), "seeds is empty"),
        (put("seeds", [1, 1]), "names a seed twice"),
        (put("seeds", 10), "evidence.seeds is 10"),
        (put("trials", True), "evidence.trials is True, not int"),
        (put("trials", 2.5), "evidence.trials is 2.5, not int"),
        (put("arms", {}), "evidence.arms lacks 'adamw-decay'"),
        (put("task", "deep"), "name it deep.decayed.json"),
        (put_in_ours("misses", 11), "misses is 11 of 10 seeds"),
        (put_in_ours("misses", None), "evidence.arms.ours.misses is None, not int"),
        (put_in_ours("ratio_median", "2x"), "evidence.arms.ours.ratio_median is '2x', not float"),
        (put_in_ours("seconds_median", None), "no seconds and no misses"),
        (put_in_ours("config", []), "evidence.arms.ours.config is []"),
    ],
)
def test_a_file_that_is_no_evidence_is_named_with_the_place(
    made: Evidence, tmp_path: Path, damage: Callable[[dict[str, Any]], object], said: str
) -> None:
    path = evidence.write(tmp_path, made)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(SettingsError) as raised:
        render(tmp_path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "3"])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.decayed.json").write_text(content)
    with pytest.raises(SettingsError, match=r"a\.decayed\.json"):
        evidence.read_all(tmp_path)


def test_every_file_is_on_the_page_with_its_command_and_figures(made: Evidence, tmp_path: Path) -> None:
    for task in ("python", "deep"):
        evidence.write(tmp_path, renamed(made, task))
    page = render(tmp_path)
    assert NOTHING not in page
    assert page.index("## deep, decayed") < page.index("## python, decayed")
    assert page.count(f"`{made.command}`") == 2
    assert page.count("| **ours** |") == 2
    assert "| never | never | never |" in page  # ours-unguarded
    assert "10 of 10" in page


def test_an_unfinished_race_is_marked_wherever_it_counts(made: Evidence, tmp_path: Path) -> None:
    evidence.write(tmp_path, dataclasses.replace(made, missing=("ours: still has runs to do",)))
    page = render(tmp_path)
    assert "python (unfinished)" in page
    assert "**Unfinished**: ours: still has runs to do." in page


def test_an_audit_is_shown_and_a_broken_one_is_named(made: Evidence, tmp_path: Path) -> None:
    from trainer_node.race.audit_table import calibration_of, cosines_of, gains_of, verdict_counts

    audit = {
        "schema": 1, "task": "python", "date": "2026-11-21", "machine": "made up", "seeds": [0],
        "command": "trainer-node race python --audit", "anatomy": [], "verdicts": verdict_counts([]),
        "gains": gains_of([]), "cosines": cosines_of([]), "calibration": calibration_of([]),
    }  # fmt: skip
    path = tmp_path / "python.audit.json"
    path.write_text(json.dumps(audit))
    page = render(tmp_path)
    assert "## Audit: the road not taken" in page
    assert "`trainer-node race python --audit`" in page
    path.write_text("{}")
    with pytest.raises(SettingsError, match=r"python\.audit\.json: not an audit"):
        render(tmp_path)


def test_the_command_writes_the_page_and_names_a_broken_file(
    made: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    evidence.write(evidence.FOLDER, made)
    assert evidence.main([]) == 0
    assert evidence.PAGE.read_text() == render(evidence.FOLDER)
    (evidence.FOLDER / "x.decayed.json").write_text("{}")
    assert evidence.main([]) == 2
    assert evidence.main(["--all"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
