"""The evidence from a GPU: pieces resume, a failing piece ends, and page and files agree. Needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import apply_delta, bare_loop
from tests.gpu import evidence, evidence_page
from tests.gpu.evidence import DONE, FAILED, KILLED, MORE_TO_DO, Piece, go_on, pieces_of

MINUTES = 8.0


class World:
    """Pieces that take made-up minutes: each call of a piece writes one line, and needs `calls` lines."""

    def __init__(self, out: Path, **calls: int) -> None:
        self.out, self.seconds = out, 0.0
        self.run: list[str] = []
        self.said: list[str] = []
        self.code: Callable[[Piece], int] = lambda _: 0
        self.pieces = [self._piece(name, count) for name, count in calls.items()]

    def _piece(self, name: str, calls: int) -> Piece:
        def lines(folder: Path) -> int:
            return evidence.lines_in(folder / name)

        return Piece(
            name=name,
            command=(name,),
            least_minutes=3.0,
            is_whole=lambda folder: lines(folder) >= calls,
            progress=lines,
        )

    def run_piece(self, piece: Piece, most_seconds: float) -> int:
        assert most_seconds >= 60.0 * piece.least_minutes
        self.run.append(piece.name)
        self.seconds += 180.0
        code = self.code(piece)
        if code != 1:
            with (self.out / piece.name).open("a") as file:
                file.write("one\n")
        return code

    def call(self) -> int:
        return go_on(
            self.pieces,
            self.out,
            minutes=MINUTES,
            run_piece=self.run_piece,
            now_seconds=lambda: self.seconds,
            say=self.said.append,
        )


def test_a_call_ends_within_its_minutes_and_the_next_one_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, first=1, second=3, third=1)
    codes = [world.call() for _ in range(3)]
    assert codes == [MORE_TO_DO, MORE_TO_DO, DONE]
    assert world.run == ["first", "second", "second", "second", "third"]
    assert "left to do: second, third" in world.said[2]
    assert world.call() == DONE
    assert len(world.run) == 5


def test_a_piece_that_fails_three_times_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    world = World(tmp_path, bad=1, good=1)
    world.code = lambda piece: 1 if piece.name == "bad" else 0
    while (code := world.call()) == MORE_TO_DO:
        assert len(world.run) < 10
    assert code == FAILED
    assert world.run == ["bad", "bad", "bad", "good"]


def test_a_piece_that_is_cut_short_goes_on_as_long_as_it_gets_further(tmp_path: Path) -> None:
    world = World(tmp_path, long=6)
    world.code = lambda _: KILLED
    while world.call() == MORE_TO_DO:
        assert len(world.run) < 10
    assert world.run == ["long"] * 6


def test_without_a_gpu_nothing_is_run_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evidence.main(["--out", str(tmp_path / "gpu")]) == evidence.NO_DEVICE
    assert "nothing was run" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()


def test_a_race_that_is_not_finished_is_published_and_said_to_be_unfinished(tmp_path: Path) -> None:
    arm = {"misses": 1, "seconds_median": 12.0}
    race = {
        "target": 3.2, "incomplete": ["ours"], "seeds": [0, 1], "trials": 1, "command": "trainer-node race",
        "machine": "a card", "date": "2026-11-21",
    }  # fmt: skip
    report = tmp_path / "out" / "race" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"race": race, "arms": {"adamw-decay": arm}, "pairs": []}))
    assert not evidence.race_is_whole(tmp_path / "out")
    evidence.publish(tmp_path / "out", tmp_path / "docs", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| adamw-decay | 12 s | 1 of 2 |" in page
    assert "**Not finished**" in page
    report.write_text(json.dumps({"race": {**race, "incomplete": []}, "arms": {}, "pairs": []}))
    assert evidence.race_is_whole(tmp_path / "out")


@pytest.mark.parametrize("stand_in", [False, True])
def test_every_piece_fits_into_a_call_and_is_not_whole_before_it_ran(stand_in: bool, tmp_path: Path) -> None:
    pieces = pieces_of(tmp_path, data=tmp_path, stand_in=stand_in)
    assert [piece.name for piece in pieces] == ["tests", "apply_delta", "bare_loop", "race"]
    for piece in pieces:
        assert piece.least_minutes < evidence.LIMIT_MINUTES
        assert not piece.is_whole(tmp_path)


def test_the_tests_own_report_is_counted(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" time="4.5"/>'
        "</testsuites>"
    )
    evidence.count_tests(tmp_path)
    assert "4 passed, 3 failed, 3 skipped, 4 s" in evidence_page.render(tmp_path)
    assert "**Not all pass.**" in evidence_page.render(tmp_path)


# ---- the page --------------------------------------------------------------------------------


def test_the_committed_page_is_that_of_the_committed_files() -> None:
    page = evidence.DOCS_PAGE.read_text(encoding="utf-8")
    assert page == evidence_page.render(evidence.DOCS_FOLDER)


def test_a_page_without_files_says_that_nothing_was_run(tmp_path: Path) -> None:
    page = evidence_page.render(tmp_path)
    assert "**Nothing was run**" in page
    assert not any(character.isdigit() for character in page.replace("at most 8 minutes", ""))


def test_a_part_that_was_not_run_says_so_beside_one_that_was(tmp_path: Path) -> None:
    (tmp_path / "pieces.jsonl").write_text(
        json.dumps({"date": "2026-11-21", "piece": "tests", "seconds": 3.0, "code": KILLED}) + "\n"
    )
    page = evidence_page.render(tmp_path)
    assert page.count("Not run.") == 4
    assert "| 2026-11-21 | tests | 3 s | 124 |" in page


def apply_line(share: float) -> dict[str, Any]:
    arm = {"gigabytes_per_second": 10.0, "share_of_copy": share, "share_least": 0.5, "share_most": 0.9}
    return {"parameters": 1000, "machine": "a card", "arms": {"apply: compiled": arm, "fingerprint": arm}}


@pytest.mark.parametrize(("share", "verdict"), [(0.70, "| yes |"), (0.69, "| **missed** |")])
def test_a_bar_that_is_missed_is_said_to_be_missed(share: float, verdict: str, tmp_path: Path) -> None:
    (tmp_path / "apply_delta.jsonl").write_text(json.dumps(apply_line(share)) + "\n")
    page = evidence_page.render(tmp_path)
    assert page.count(verdict) == 1


def bare_line(overhead: float) -> dict[str, Any]:
    spread = {"median": overhead, "least": overhead - 0.5, "most": overhead + 0.5}
    arm = {"wall_overhead_percent": spread, "tokens_per_second": 1e6, "mfu": 0.4}
    return {
        "preset": "gpt2-small", "machine": "a card", "clock": "wall", "rounds": 2, "steps_per_round": 32,
        "peak_flops": 1e15, "measured_peak_flops": 7e14, "peak_is": "data sheet", "bar_percent": 1.0,
        "arms": {"trainer, prediction off": arm},
    }  # fmt: skip


def test_calls_of_the_bare_loop_are_put_together(tmp_path: Path) -> None:
    lines = [bare_line(overhead) for overhead in (0.2, 5.0, 0.8)]
    (tmp_path / "bare_loop.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = evidence_page.render(tmp_path)
    assert "| trainer, prediction off | +0.80 % | -0.30 to +5.50 | 1,000,000 | 40.0% | yes |" in page
    assert "6 rounds of 32 steps" in page


def test_what_the_benchmark_of_a_jump_writes_is_what_the_page_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply_delta, "MIN_TIMED_BYTES", 1)
    file = tmp_path / "apply_delta.jsonl"
    command = ["--parameters", "1e4", "--rounds", "1", "--device", "cpu", "--no-compile", "--json", str(file)]
    apply_delta.main(command)
    page = evidence_page.render(tmp_path)
    for name in ("copy", "apply: delta.py", "apply: blocks", "snapshot", "restore"):
        assert f"| {name} |" in page


def test_the_bare_loop_counts_the_products_of_the_model_alone() -> None:
    settings = bare_loop.settings_of("nano", 1, ["trainer.model.tied_head=true"]).trainer
    shape = settings.model
    per_block = 12 * shape.width * shape.width + 2 * shape.width
    count = shape.vocabulary_size * shape.width + shape.layers * per_block + shape.width
    attention = 12 * shape.layers * shape.width * shape.context_tokens
    assert bare_loop.flops_per_token(settings) == 6 * count + attention
    untied = bare_loop.settings_of("nano", 1, ["trainer.model.tied_head=false"]).trainer
    assert bare_loop.flops_per_token(untied) == bare_loop.flops_per_token(settings)
