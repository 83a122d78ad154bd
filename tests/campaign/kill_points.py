"""kill -9 at random points of real runs: `python -m tests.campaign.kill_points [--points 50] [--seed 0]`.

One `trainer-node train` runs undisturbed. A second one with the same settings and a checkpoint at nearly
every step is killed so many times, trainer or checkpoint writer or both, and started again with --resume:
some checkpoints and up to 30 ms later, so that many kills fall into a save. At the end its weights, optimizer
state and random numbers must be those of the first, bit for bit. Prints a table of what was killed; exit code
1 if a bit differs, a checkpoint that was there is lost, or the run does not end.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from common import sealed_folder
from common.errors import CheckpointError
from tests.nodes import QUICK, command, metric_lines, wait_for

FILES = ("model", "optimizer", "random")
VICTIMS = ("trainer", "writer", "both")


def train(root: Path, run_id: str, steps: int) -> list[str]:
    overrides = (
        *QUICK, "trainer.checkpoint.every_steps=2", "trainer.checkpoint.keep=3", "predictor.enabled=false",
        "trainer.checkpoint.staging=memory", "trainer.model.channels=16",
    )  # fmt: skip
    settings = [part for text in overrides for part in ("--set", text)]
    return command(
        "trainer_node", "train", "--preset", "digits", "--steps", str(steps), "--runs-dir", str(root),
        "--run-id", run_id, "--redis", f"memory://{run_id}", "--resume", *settings,
    )  # fmt: skip


def start(root: Path, run_id: str, steps: int) -> subprocess.Popen[bytes]:
    log = (root / f"{run_id}.log").open("ab")
    with log:
        return subprocess.Popen(train(root, run_id, steps), stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def newest_good(folder: Path) -> tuple[int, int]:
    """(Generation, step) of the newest that verifies; (0, 0) for none."""
    for found in sealed_folder.folders(folder):
        with contextlib.suppress(CheckpointError):
            sealed_folder.verify(found)
            return sealed_folder.age_key(found.name)
    return 0, 0


def num_told(run: Path) -> int:
    return len(metric_lines(run, "CheckpointWritten"))


def kill_once(process: subprocess.Popen[bytes], run: Path, rng: random.Random) -> str:
    """Waits for 1 to 3 further checkpoints and up to 30 ms; what was killed, "" if the run ended before."""
    wanted = num_told(run) + rng.randint(1, 3)
    wait_for(lambda: process.poll() is not None or num_told(run) >= wanted)
    time.sleep(rng.uniform(0.0, 0.03))  # no wait for an event: the point is to be at any point
    victim = rng.choice(VICTIMS)
    if process.poll() is not None:
        return ""
    writers = psutil.Process(process.pid).children()
    if victim != "trainer":
        for writer in writers:
            with contextlib.suppress(psutil.NoSuchProcess):
                writer.kill()
    if victim != "writer":
        process.send_signal(signal.SIGKILL)
        process.wait()
        for writer in writers:  # it finishes the save that it has, and ends
            with contextlib.suppress(psutil.NoSuchProcess):
                writer.wait(60)
    return victim


def disturbed(root: Path, steps: int, points: int, rng: random.Random) -> tuple[Counter[str], list[str]]:
    run, seen, faults = root / "killed", Counter[str](), []
    folder = run / "checkpoints" / "trainer"
    best = (0, 0)
    process = start(root, "killed", steps)
    while sum(seen[victim] for victim in VICTIMS) < points:
        victim = kill_once(process, run, rng)
        if not victim:
            faults.append(f"the run ended after {sum(seen.values())} kills: give it more --steps")
            break
        seen[victim] += 1
        if victim != "writer":
            seen["within a save"] += any(folder.glob("*.tmp"))
            found = newest_good(folder)
            if found < best:
                faults.append(f"{best} was durable, {found} is the newest good one")
            best = max(best, found)
            process = start(root, "killed", steps)
    if process.wait(600) != 0:
        faults.append(f"exit code {process.returncode}: see {root / 'killed.log'}")
    return seen, faults


def differences(left: Path, right: Path) -> list[str]:
    newest = [sealed_folder.folders(run / "checkpoints" / "trainer")[0] for run in (left, right)]
    return [
        f"{name}.safetensors differs"
        for name in FILES
        if len({(folder / f"{name}.safetensors").read_bytes() for folder in newest}) != 1
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="default: 16 for each point")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    arguments = parser.parse_args()
    steps = arguments.steps or max(200, 16 * arguments.points)
    with contextlib.ExitStack() as at_the_end:
        root = arguments.folder or Path(at_the_end.enter_context(tempfile.TemporaryDirectory()))
        twin = start(root, "twin", steps)
        seen, faults = disturbed(root, steps, arguments.points, random.Random(arguments.seed))
        if twin.wait(600) != 0:
            faults.append(f"the twin ended with code {twin.returncode}: see {root / 'twin.log'}")
        if not faults:
            faults = differences(root / "twin", root / "killed")
        for what, count in sorted(seen.items()):
            print(f"{what:<16} {count:>4}")
        print("\n".join(faults) if faults else f"{steps} steps, equal bit for bit: {', '.join(FILES)}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
