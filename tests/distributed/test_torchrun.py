"""A law of a run under torchrun: a rank that dies costs a restart; a stop ends all ranks together."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil

from common import sealed_folder
from tests.distributed.launch import free_port
from tests.nodes import children_of, running, wait_for
from trainer_node.run_folder import RunFolder

SETTINGS = (
    "trainer.threads=1", "trainer.batch.sequences=16", "trainer.model.channels=4",
    "trainer.statistics_steps=8", "trainer.checkpoint.every_steps=8", "trainer.checkpoint.keep=1000",
    "trainer.parallel.kind=ddp",
    "trainer.evaluate_every_steps=1000", "trainer.decision_wait_share=0.0", "monitor.http=",
)  # fmt: skip
DEADLINE_SECONDS = 120.0


def torchrun(runs: Path, steps: int, *, max_restarts: int) -> list[str]:
    settings = [part for text in SETTINGS for part in ("--set", text)]
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts",
        str(max_restarts), "--monitor-interval", "0.1", "--master-port", str(free_port()),
        "-m", "trainer_node", "train", "--redis", f"memory://{runs}", "--preset", "digits",
        "--steps", str(steps),
        "--runs-dir", str(runs), "--run-id", "run", "--resume", *settings,
    ]  # fmt: skip


def rank(process_id: int, number: int) -> psutil.Process | None:
    for child in children_of(process_id):
        try:
            if child.environ().get("RANK") == str(number):
                return child
        except psutil.Error:
            continue
    return None


def saved(runs: Path) -> list[str]:
    return [folder.name for folder in sealed_folder.folders(RunFolder(runs / "run").trainer_checkpoints)]


def test_a_rank_that_is_killed_costs_a_restart_from_the_newest_checkpoint(tmp_path: Path) -> None:
    with running(torchrun(tmp_path, 4000, max_restarts=1)) as agent:
        wait_for(lambda: saved(tmp_path) or None, DEADLINE_SECONDS)
        victim = rank(agent.pid, 1)
        assert victim is not None
        victim.kill()
        wait_for(lambda: [n for n in saved(tmp_path) if ".gen-2" in n] or None, DEADLINE_SECONDS)
        before = max(sealed_folder.age_key(n)[1] for n in saved(tmp_path) if ".gen-1" in n)
        after = min(sealed_folder.age_key(n)[1] for n in saved(tmp_path) if ".gen-2" in n)
        # The next is due 8 steps on, and waits for the end of a probation that is under way.
        assert before + 8 <= after <= before + 8 + 16
        agent.send_signal(signal.SIGTERM)
        agent.wait(DEADLINE_SECONDS)
    newest = saved(tmp_path)[0]
    assert newest.endswith(".gen-2.emergency")
    sealed_folder.verify(RunFolder(tmp_path / "run").trainer_checkpoints / newest)
