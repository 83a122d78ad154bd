"""A report says what the numbers say, also of a race that is not finished, and all of it is in the files."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.race.synthetic_race import SEEDS, TARGET, race_results, record, run
from trainer_node.race import evidence, plots
from trainer_node.race.figures import RaceFigures, race_figures
from trainer_node.race.plan import RaceRecord
from trainer_node.race.plots_ours import _lanes
from trainer_node.race.report import Report, number, write_report
from trainer_node.race.run_result import PhaseSpan, RunResult
from trainer_node.race.statistics import ratio_of
from trainer_node.race.words import comparison, ends, headline, reservations

ARMS = ("adamw-constant", "adamw-decay", "adamw-decay-ema", "ours-unguarded", "ours")
PICTURES = ("ratio", "loss-steps", "loss-seconds", "loss-passes", "timeline", "calibration")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out_dir = tmp_path_factory.mktemp("race")
    return out_dir, write_report(out_dir, record(ARMS), race_results(ARMS))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds."""
    monkeypatch.setattr(plots, "draw_all", lambda out_dir, figures: {})


def test_the_ends_of_an_interval_are_told_also_where_one_is_beyond_all_bounds() -> None:
    assert ends(ratio_of({0: 2.0, 1: math.inf}, {0: 1.0, 1: 1.0})) == "2.000 – ∞"
    assert ends(ratio_of({0: 2.0, 1: 2.0}, {0: 1.0, 1: 1.0})) == "2.000 – 2.000"


def figures_of(race: RaceRecord, results: list[RunResult]) -> RaceFigures:
    return race_figures(race, results, read_mid_run=frozenset({"adamw-constant"}))


class _Page(HTMLParser):
    """Collects what a page would load, and whether its tags close."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def strict(path: Path) -> Any:
    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text(), parse_constant=no_constant)


def test_report_json_is_strict_sorted_and_has_every_figure(finished: tuple[Path, Report]) -> None:
    out_dir, _ = finished
    values = strict(out_dir / "report.json")
    assert values["schema"] == 1
    assert list(values) == sorted(values)
    assert set(values["arms"]) == set(ARMS)
    lost = values["arms"]["ours-unguarded"]
    assert (lost["misses"], lost["seconds_median"], lost["ratio"]["median"]) == (len(SEEDS), None, 0.0)
    assert values["arms"]["adamw-decay-ema"]["ratio"]["median"] == 1.0
    assert len(values["pairs"]) == len(ARMS) * (len(ARMS) - 1)
    assert values["arms"]["ours"]["ratio_free_core"]["median"] > values["arms"]["ours"]["ratio"]["median"]


def test_the_table_is_aligned_and_the_fastest_arm_is_on_top(finished: tuple[Path, Report]) -> None:
    out_dir, report = finished
    assert (out_dir / "table.txt").read_text() == report.text + "\n"
    lines = report.text.splitlines()
    rows = lines[2 : lines.index(lines[1], 2)]
    assert [row.split()[0] for row in rows] == [
        "ours", "adamw-decay-ema", "adamw-decay", "adamw-constant", "ours-unguarded",
    ]  # fmt: skip
    # Right-aligned columns end where their heading ends.
    end_of_seconds = lines[0].index("seconds") + len("seconds")
    assert all(row[end_of_seconds - 1] != " " and row[end_of_seconds] == " " for row in rows)


def test_all_pictures_are_drawn_and_none_is_blank(finished: tuple[Path, Report]) -> None:
    out_dir, report = finished
    assert report.notes == ()
    import matplotlib.image as image

    for name in PICTURES:
        pixels = image.imread(out_dir / f"{name}.png")
        assert pixels.shape[1] >= 1000  # twice the density of a page
        assert 0.005 < (pixels[..., :3].min(axis=-1) < 0.95).mean() < 0.5


def test_the_page_is_one_file_that_loads_nothing(finished: tuple[Path, Report]) -> None:
    _, report = finished
    page = _Page()
    page.feed(report.page.read_text())
    assert page.open == []
    assert len(page.loads) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert "<script" not in report.page.read_text()
    race = report.figures.race
    for part in (
        headline(report.figures),
        *reservations(report.figures),
        race.command,
        race.machine,
        race.date,
    ):
        assert part in page.text


def test_the_page_says_how_many_trials_each_kind_of_arm_had(tmp_path: Path, no_pictures: None) -> None:
    for trials, said in ((16, "16 trials an arm, at T0"), (32, "32 trials a plain arm; one around another")):
        race = record(ARMS, total_trials=trials)
        assert said in write_report(tmp_path, race, race_results(ARMS)).page.read_text()


def test_what_the_user_named_cannot_break_the_page(tmp_path: Path, no_pictures: None) -> None:
    race = record(ARMS, command="race '<script>alert(1)</script>' & more", machine="<b>")
    page = write_report(tmp_path, race, race_results(ARMS)).page.read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_same_results_write_the_same_numbers(tmp_path: Path, no_pictures: None) -> None:
    results = race_results(ARMS)
    write_report(tmp_path / "a", record(ARMS), results)
    write_report(tmp_path / "b", record(ARMS), list(reversed(results)))
    for name in ("report.json", "table.txt", "index.html", "python.decayed.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("race", "results", "said"),
    [
        (record(ARMS, target=None, reference_arm="", tuned={}), [], "the target is not known yet"),
        (record(ARMS, tuned={}), [], "ours: not tuned yet"),
        (record(ARMS), [], "ours: no runs yet"),
        (record(ARMS, incomplete=("ours",)), race_results(ARMS), "ours: still has runs to do"),
        (record(ARMS, notes=("ours: out of memory",)), race_results(ARMS), "ours: out of memory"),
        (record(ARMS), [run("ours", 400, 3)], "ours: 400 steps, seeds 0, 1, 2, 4, 5, 6, 7, 8, 9: no run yet"),
    ],
)
def test_of_an_unfinished_race_it_says_what_is_missing(
    race: RaceRecord, results: list[RunResult], said: str, tmp_path: Path, no_pictures: None
) -> None:
    report = write_report(tmp_path, race, results)
    assert said in report.text
    page = _Page()
    page.feed(report.page.read_text())
    assert said in page.text
    strict(tmp_path / "report.json")


def test_pictures_are_drawn_of_whatever_is_there(tmp_path: Path) -> None:
    assert write_report(tmp_path, record(ARMS), [run("adamw-decay", 400, 3)]).notes == ()
    assert not (tmp_path / "ratio.png").exists()
    assert (tmp_path / "loss-steps.png").exists()


def test_a_picture_of_an_earlier_report_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "ratio.png").write_bytes(b"of other results")
    write_report(tmp_path, record(ARMS), [])
    assert not (tmp_path / "ratio.png").exists()


def test_without_matplotlib_the_numbers_are_there_and_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = write_report(tmp_path, record(ARMS), race_results(ARMS, seeds=range(2)))
    (note,) = report.notes
    assert "pip install 'hybrid-predict-trainer[race]'" in note
    assert "\n" not in note
    assert (tmp_path / "report.json").exists()
    assert "pip install" in report.page.read_text()


def test_a_race_that_shows_nothing_is_not_called_a_win() -> None:
    """Ours wins on six of ten seeds, by as much as it loses on the others."""
    arms = ("adamw-decay-ema", "ours")
    results = race_results(arms[:1])
    for seed in SEEDS:
        seconds = 0.09 if seed < 6 else 0.12
        results += [run("ours", n, seed, seconds_per_step=seconds) for n in (300, 400, 500)]
    figures = figures_of(record(arms), results)
    ratio = figures.pair("ours", "adamw-decay-ema")
    assert ratio is not None
    assert ratio.median > 1
    assert "no difference between ours and adamw-decay-ema could be shown" in headline(figures)


@pytest.mark.parametrize(("seconds", "word"), [(0.05, "faster than"), (0.2, "slower than")])
def test_the_sentence_follows_the_interval(seconds: float, word: str) -> None:
    arms = ("adamw-decay-ema", "ours")
    results = race_results(arms[:1])
    results += [run("ours", n, seed, seconds_per_step=seconds) for n in (300, 400, 500) for seed in SEEDS]
    figures = figures_of(record(arms), results)
    ratio = figures.pair("ours", "adamw-decay-ema")
    assert ratio is not None
    assert word in comparison("ours", "adamw-decay-ema", ratio)
    assert word in headline(figures)


def test_two_seeds_decide_nothing_however_clear_they_are() -> None:
    arms = ("adamw-decay-ema", "ours")
    results = race_results(arms[:1], seeds=(0, 1))
    results += [run("ours", n, seed, seconds_per_step=0.01) for n in (300, 400) for seed in (0, 1)]
    assert "too few seeds" in headline(figures_of(record(arms, seeds=(0, 1)), results))


def test_an_arm_that_missed_is_not_given_a_number() -> None:
    arms = ("adamw-decay-ema", "ours")
    results = race_results(arms[:1]) + [run("ours", 400, seed, losses=[9.0]) for seed in SEEDS]
    assert "ours missed the target on half or more of the seeds" in headline(
        figures_of(record(arms), results)
    )


def test_few_seeds_little_tuning_and_easy_rules_are_said() -> None:
    arms = ("adamw-constant", "ours")
    race = record(arms, seeds=(0, 1, 2), trials=1, rule="constant", in_distribution=("ours",))
    said = " ".join(reservations(figures_of(race, race_results(arms))))
    for words in ("3 seeds", "covers at most 75 %", "nothing was tuned", "constant rate", "in-distribution"):
        assert words in said


def test_steps_of_an_undone_probation_are_told_from_kept_ones() -> None:
    def span(phase: str, verdict: str = "") -> PhaseSpan:
        return PhaseSpan(phase=phase, first_step=1, last_step=2, verdict=verdict)

    lived = [
        span("full"), span("predict", "refused"), span("correct"), span("full"), span("predict", "accepted"),
        span("correct"), span("predict", "ruined"), span("full"), span("correct"),
    ]  # fmt: skip
    undone = [i for i, (_, kept) in enumerate(_lanes(lived)) if not kept]
    assert undone == [2]
    for verdict, worse in (("accepted", [2]), ("refused", [1]), ("aborted", [1, 2])):
        beside_twin = [span("predict", verdict), span("correct"), span("correct"), span("full")]
        assert [i for i, (_, kept) in enumerate(_lanes(beside_twin)) if not kept] == worse


def test_the_evidence_of_a_race_lies_beside_its_report(finished: tuple[Path, Report]) -> None:
    out_dir, report = finished
    found = evidence.read(out_dir / "python.decayed.json")
    assert found == evidence.evidence_of(report.figures)
    assert found.target == TARGET


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "–"), (math.inf, "never"), (1234.5, "1,234"), (0.12345, "0.1235")]
)
def test_unknown_and_never_are_told_apart(value: float, text: str) -> None:
    assert re.sub(r"\s", "", number(value)) in (text, "0.1234")
