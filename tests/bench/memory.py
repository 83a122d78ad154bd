"""Peak memory of the trainer with and without the basis: `python -m tests.bench.memory [--json FILE]`.

A 25M-parameter GPT on the default data, AdamW, CPU, 1024 tokens a step, jumps applied and judged,
snapshots on disk (the default on CPU) or in memory. Each case is a process of its own; its peak
resident set is compared with that of the same training without prediction, in units of the weights'
bytes. Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common.clock import SystemClock
from common.config import load_settings
from common.messages import Controls, Message, Observation, Phase, PhaseDecision, Verdict

SIZE = (
    "trainer.steps=24", "trainer.statistics_steps=8", "trainer.window_steps=4", "trainer.probation_steps=4",
    "trainer.schedule.warmup_steps=2", "trainer.model.layers=8", "trainer.model.width=512",
    "trainer.model.heads=8", "trainer.batch.sequences=8", "trainer.optimizer.name=adamw",
    "trainer.optimizer.rate=0.0003", "trainer.verify.tolerance=100.0",
)  # fmt: skip
CASES = {
    "prediction off": ("predictor.enabled=false",),
    "basis fp32, snapshot on disk": ("trainer.basis.dtype=fp32",),
    "basis bf16, snapshot on disk": ("trainer.basis.dtype=bf16",),
    "basis fp32, snapshot in memory": ("trainer.basis.dtype=fp32", "trainer.checkpoint.snapshot=memory"),
}


class AlwaysJump:
    """Proposes a short way along the drift at every decision point."""

    def __init__(self) -> None:
        self._newest: Observation | None = None

    def emit(self, message: Message) -> None:
        if isinstance(message, Observation):
            self._newest = message

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        newest = self._newest
        assert newest is not None
        assert newest.decision_point is not None
        groups = len(newest.gradient_norms)
        return PhaseDecision(
            decision_id=f"{step}.{attempt}",
            phase=Phase.PREDICT,
            horizon_steps=2,
            num_groups=groups,
            num_directions=4,
            coefficients=(0.1, 0.1, 0.05, 0.05) * groups,
            controls=Controls(),
            forecast=None,
            base_generation=1,
            base_step=step,
            base_attempt=attempt,
            base_fingerprint=newest.decision_point.fingerprint,
            valid_until_step=step,
            reason="bench",
        )

    def veto(self) -> str | None:
        return None

    def take_orders(self) -> list:
        return []


def run_case(overrides: list[str]) -> dict[str, float]:
    """In this process: train, and report the peak."""
    from trainer_node.assembly import build_loop, prepare_task

    settings = load_settings(preset="nano", overrides=overrides)
    links = AlwaysJump()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        loop = build_loop(
            prepare_task(settings.trainer),
            settings,
            links=links,
            emit=links.emit,
            housekeeping=lambda _: None,
            clock=SystemClock(),
            generation=1,
            snapshot_folder=Path(folder),
        )
        loop.run()
    return {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weights_bytes": sum(p.numel() * p.element_size() for p in loop.task.model.parameters()),
        "basis_bytes": loop.basis.bytes_held() if loop.basis else 0,
        "accepted": loop.ledger.verdicts[Verdict.ACCEPTED],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case([*SIZE, *CASES[arguments.case]])))
        return
    results = {}
    for case in CASES:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.memory", "--case", case],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        results[case] = json.loads(done.stdout.splitlines()[-1])
        base, now = results["prediction off"], results[case]
        more = (now["peak_bytes"] - base["peak_bytes"]) / now["weights_bytes"]
        print(
            f"{case:<32} peak {now['peak_bytes'] / 2**20:7.0f} MiB, {more:+.2f} x weights"
            f" ({now['weights_bytes'] / 2**20:.0f} MiB); basis {now['basis_bytes'] / 2**20:.0f} MiB;"
            f" {now['accepted']:.0f} jumps kept",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
