"""What this project does on a GPU, measured in pieces: `make gpu`, or `python -m tests.gpu.evidence`.

Runs the tests of tests/gpu, the benchmarks and the race of `gpt2-small`, each in a process of its own, until
`--minutes` (8) are spent. What was done is noted in runs/gpu (or $OUT): the same command goes on from there.
Exit code 0: all is done; 3: there is more to do; 1: a piece failed three times; 2: there is no GPU.
At the end of every call docs/evidence-gpu.md is written from the files (evidence_page.py). `--stand-in` does
the same with tiny models on a CPU and leaves docs/ alone: for trying the script, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tests.gpu import evidence_page
from trainer_node.race.machine import machine

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS_FOLDER, DOCS_PAGE = ROOT / "docs" / "evidence-gpu", ROOT / "docs" / "evidence-gpu.md"
LIMIT_MINUTES = 8.0
DONE, FAILED, NO_DEVICE, MORE_TO_DO = 0, 1, 2, 3
KILLED = 124
TIME_LEFT = "{minutes}"
MOST_FAILURES = 3
ATTEMPTS = "pieces.jsonl"
MADE_AS = {"race.json": "race/report.json"}  # where it has another name than among the evidence
BARE_LINES = 3  # bare_loop appends one per call: as many calls, so that each is short
RACE_ARMS = "adamw-decay,ours"
RACE_RUN_MINUTES = 5.0  # a run of `gpt2-small` with its compiling, both arms in turns: a guess, untested


@dataclass(frozen=True, kw_only=True)
class Piece:
    name: str
    command: tuple[str, ...]  # arguments of this Python
    least_minutes: float  # not begun with less time left
    kept_back_minutes: float = 0.0  # of what TIME_LEFT stands for in its command
    is_whole: Callable[[Path], bool]  # its results are there; looked at after every call
    good_codes: tuple[int, ...] = (0,)
    finish: Callable[[Path], None] | None = None
    # What a call that was cut short leaves for the next one: as long as it grows, no call has failed.
    progress: Callable[[Path], int] = lambda _: 0


def lines_in(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def race_is_whole(out: Path) -> bool:
    try:
        race = json.loads((out / "race" / "report.json").read_text(encoding="utf-8"))["race"]
    except (OSError, ValueError):
        return False
    return race["target"] is not None and not race["incomplete"]


def count_tests(out: Path) -> None:
    """tests.json of pytest's own report. Raises OSError, ParseError."""
    suite = ElementTree.parse(out / "tests.xml").getroot().find("testsuite")
    assert suite is not None, "no test suite in tests.xml"
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    values = {**counts, "seconds": float(suite.get("time", "0")), "machine": machine()}
    (out / "tests.json").write_text(json.dumps(values) + "\n", encoding="utf-8")


def pieces_of(out: Path, *, data: Path, stand_in: bool) -> tuple[Piece, ...]:
    """In the order in which they are run. `out` is where they write."""
    tiny = ["width=32", "heads=2", "layers=2", "context_tokens=32", "vocabulary_size=512"]
    bare = ["--preset", "gpt2-small", "--rounds", "2"]
    apply = ["--parameters", "1e6,1e7,1e8", "--device", "cuda"]
    race = [
        "gpt2-small",
        "--data",
        str(data),
        "--arms",
        RACE_ARMS,
        "--seeds",
        "3",
        "--trials",
        "1",
        "--coarse",
    ]
    run_minutes = 0.1 if stand_in else RACE_RUN_MINUTES
    if stand_in:
        bare = ["--rounds", "1", *(part for line in tiny for part in ("--set", f"trainer.model.{line}"))]
        apply = ["--parameters", "1e4", "--device", "cpu", "--rounds", "1"]
        race = ["digits", "--quick", "--seeds", "1"]
    report = str(out / "tests.xml")
    return (
        Piece(
            name="tests",
            command=("-m", "pytest", "-q", "tests/gpu", "-p", "no:cacheprovider", f"--junitxml={report}"),
            least_minutes=0.2 if stand_in else 3.0,
            is_whole=lambda folder: (folder / "tests.json").is_file(),
            good_codes=(0, 1),  # failed tests are a result
            finish=count_tests,
        ),
        Piece(
            name="apply_delta",
            command=("-m", "tests.bench.apply_delta", *apply, "--json", str(out / "apply_delta.jsonl")),
            least_minutes=0.2 if stand_in else 2.0,
            is_whole=lambda folder: lines_in(folder / "apply_delta.jsonl") >= len(apply[1].split(",")),
        ),
        Piece(
            name="bare_loop",
            command=("-m", "tests.bench.bare_loop", *bare, "--json", str(out / "bare_loop.jsonl")),
            least_minutes=0.2 if stand_in else 6.0,
            is_whole=lambda folder: lines_in(folder / "bare_loop.jsonl") >= (1 if stand_in else BARE_LINES),
        ),
        Piece(
            name="race",
            command=(
                *("-m", "trainer_node", "race", *race, "--out", str(out / "race")),
                *("--budget", TIME_LEFT, "--workers", "1"),
            ),
            least_minutes=run_minutes + 0.1,
            kept_back_minutes=run_minutes,
            is_whole=race_is_whole,
            progress=lambda folder: lines_in(folder / "race" / "results.jsonl"),
        ),
    )


# ---- going on --------------------------------------------------------------------------------


RunPiece = Callable[[Piece, float], int]  # piece, seconds at most -> exit code


def attempts_in(out: Path) -> list[dict[str, Any]]:
    path = out / ATTEMPTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def is_given_up(piece: Piece, attempts: Sequence[Mapping[str, Any]]) -> bool:
    own = [attempt for attempt in attempts if attempt["piece"] == piece.name]
    return sum(a["code"] not in piece.good_codes and not a["has_grown"] for a in own) >= MOST_FAILURES


def go_on(
    pieces: Sequence[Piece],
    out: Path,
    *,
    minutes: float,
    run_piece: RunPiece,
    now_seconds: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> int:
    """Piece after piece until the time is spent. An exit code."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = now_seconds() + 60.0 * minutes
    for piece in pieces:
        while not piece.is_whole(out) and not is_given_up(piece, attempts_in(out)):
            left_seconds = deadline - now_seconds()
            if left_seconds < 60.0 * piece.least_minutes:
                say(f"left to do: {', '.join(left(pieces, out))}; the same command goes on")
                return MORE_TO_DO
            say(f"{piece.name}: {' '.join(piece.command)}")
            started, before = now_seconds(), piece.progress(out)
            code = run_piece(piece, left_seconds)
            if code in piece.good_codes and piece.finish is not None:
                piece.finish(out)
            note: dict[str, Any] = {
                "piece": piece.name,
                "code": code,
                "seconds": round(now_seconds() - started, 1),
            }
            note |= {"has_grown": piece.progress(out) > before, "date": date.today().isoformat()}
            with (out / ATTEMPTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(note) + "\n")
    failed = left(pieces, out)
    if failed:
        say(f"failed {MOST_FAILURES} times: {', '.join(failed)}; look at what they printed")
    return FAILED if failed else DONE


def left(pieces: Sequence[Piece], out: Path) -> list[str]:
    return [piece.name for piece in pieces if not piece.is_whole(out)]


def in_a_process(piece: Piece, most_seconds: float) -> int:
    """Of its own session, so that what it started ends with it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    minutes = f"{max(0.1, most_seconds / 60.0 - piece.kept_back_minutes):.2f}"
    command = [minutes if part == TIME_LEFT else part for part in piece.command]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(most_seconds)
    except subprocess.TimeoutExpired:
        return KILLED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # a race writes its report
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def publish(out: Path, folder: Path, page: Path) -> None:
    """The results into `folder`, and the page that is made of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in evidence_page.FILES:
        made = out / MADE_AS.get(name, name)
        if made.is_file():
            shutil.copyfile(made, folder / name)
    page.write_text(evidence_page.render(folder), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=LIMIT_MINUTES, help="of this call; default 8")
    parser.add_argument("--all", action="store_true", help="call after call of so many minutes, to the end")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs")) / "gpu")
    parser.add_argument(
        "--data", type=Path, default=Path(sysconfig.get_path("stdlib")), help="text to race on"
    )
    parser.add_argument("--stand-in", action="store_true", help="tiny models on a CPU: tries the script only")
    options = parser.parse_args(arguments)
    if not options.stand_in and not torch.cuda.is_available():
        print("no CUDA device is visible to torch: nothing was run; --stand-in tries the script on a CPU")
        return NO_DEVICE
    out = options.out.absolute()
    pieces = pieces_of(out, data=options.data, stand_in=options.stand_in)
    if (least := max(piece.least_minutes for piece in pieces)) > options.minutes:
        parser.error(f"--minutes {options.minutes:g}: the longest piece needs {least:g}")
    code = MORE_TO_DO
    while code == MORE_TO_DO:
        code = go_on(pieces, out, minutes=options.minutes, run_piece=in_a_process)
        if options.stand_in:
            publish(out, out / "published", out / "evidence-gpu.md")
        else:
            publish(out, DOCS_FOLDER, DOCS_PAGE)
        if not options.all:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
