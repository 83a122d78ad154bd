"""How long a checkpoint stops training: `python -m tests.bench.checkpoint_pause [--gpt2-small] [--json F]`.

The pause is what `Housekeeping.save` takes of the training thread. Four forms: files written by the training
thread and sealed by a thread of it (what there was before), the same sealed by the writer process, the buffer
and a thread, the buffer and the process (the default). In turns, each behind some real steps, the save before
long done. `nano` is trained; the 124M shapes are those of the preset gpt2-small with AdamW state of their own
and no basis, saved without a step (one takes minutes on a CPU): the share is stated for --step-seconds.
Also how much slower the step behind a save is, while the checkpoint is written. Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common.clock import SystemClock
from common.config import load_settings
from common.messages import Message
from trainer_node.assembly import build_loop, prepare_task
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_buffer import make_buffer
from trainer_node.housekeeping import Housekeeping
from trainer_node.links import NoDecisions
from trainer_node.loop import Loop

FORMS = {
    "files, thread (before)": ("disk", False),
    "files, process": ("disk", True),
    "buffer, thread": ("memory", False),
    "buffer, process": ("memory", True),
}
WARM_STEPS, STEPS_BETWEEN = 70, 8


def _ignore(_: Message) -> None:
    pass


class Saver:
    """The checkpoints of one form, in a folder of their own."""

    def __init__(self, form: str, root: Path, device: torch.device) -> None:
        staging, has_process = FORMS[form]
        self.checkpoints = Checkpoints(
            root,
            keep=1,
            on_failure=print,
            buffer=make_buffer(staging, device),
            has_process=has_process,
        )
        self.housekeeping = Housekeeping(_ignore, self.checkpoints)
        self.pauses: list[float] = []
        self.durable: list[float] = []

    def save(self, loop: Loop) -> None:
        self.checkpoints.wait()
        started = time.perf_counter()
        self.housekeeping.save(loop)
        self.pauses.append(time.perf_counter() - started)

    def wait(self) -> None:
        started = time.perf_counter()
        self.checkpoints.wait()
        self.durable.append(time.perf_counter() - started)


def facts_of(saver: Saver, step_seconds: float) -> dict[str, float]:
    pauses = sorted(saver.pauses[1:])  # the first one allocates and starts the process
    median = statistics.median(pauses)
    return {
        "first_ms": 1e3 * saver.pauses[0],
        "median_ms": 1e3 * median,
        "p90_ms": 1e3 * pauses[int(0.9 * (len(pauses) - 1))],
        "max_ms": 1e3 * pauses[-1],
        "share_of_step": median / step_seconds,
        "checkpoint_mb": (saver.checkpoints.newest_bytes or 0) / 1e6,
    }


def loop_of(preset: str, overrides: list[str], folder: Path, housekeeping: Any = _ignore) -> Loop:
    settings = load_settings(preset=preset, overrides=overrides)
    return build_loop(
        prepare_task(settings.trainer),
        settings,
        links=NoDecisions(),
        emit=_ignore,
        housekeeping=housekeeping,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=folder,
    )


def nano(rounds: int, folder: Path) -> dict[str, Any]:
    """Saved within a real run, in turns; the steps right behind a save are compared with the others."""
    device = torch.device("cpu")
    savers = {form: Saver(form, folder / str(i), device) for i, form in enumerate(FORMS)}
    order = [form for _ in range(rounds) for form in FORMS]
    step_seconds: list[float] = []
    behind: dict[str, list[float]] = {form: [] for form in FORMS}
    state: dict[str, Any] = {"ended": time.perf_counter(), "form": "", "saves": 0}

    def between(loop: Loop) -> None:
        seconds = time.perf_counter() - state["ended"]
        since = loop.progress.step - WARM_STEPS
        if since > 0:
            target = behind[state["form"]] if state["form"] else step_seconds
            target.append(seconds)
        state["form"] = ""
        if since > 0 and since % STEPS_BETWEEN == 0 and state["saves"] < len(order):
            form = order[state["saves"]]
            savers[form].save(loop)
            state["form"], state["saves"] = form, state["saves"] + 1
        state["ended"] = time.perf_counter()

    steps = WARM_STEPS + STEPS_BETWEEN * (len(order) + 2)
    loop_of("nano", [f"trainer.steps={steps}", "trainer.schedule.warmup_steps=4"], folder, between).run()
    usual = statistics.median(step_seconds)
    report: dict[str, Any] = {"step_ms": 1e3 * usual}
    for form, saver in savers.items():
        saver.checkpoints.close()
        slower = statistics.median(behind[form]) - usual if behind[form] else 0.0
        report[form] = {**facts_of(saver, usual), "next_step_slower_ms": 1e3 * slower}
    return report


def gpt2_small(rounds: int, folder: Path, step_seconds: float) -> dict[str, Any]:
    overrides = ["predictor.enabled=false", "trainer.device=cpu", "trainer.compile=false"]
    overrides += ["trainer.precision=fp32", "trainer.optimizer.name=adamw"]
    loop = loop_of("gpt2-small", overrides, folder)
    for optimizer in loop.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.tensor(1.0), **moments}
    report: dict[str, Any] = {
        "parameters": sum(p.numel() for p in loop.task.model.parameters()),
        "assumed_step_ms": 1e3 * step_seconds,
    }
    for i, form in enumerate(FORMS):  # one after the other: 1.5 GB each
        saver = Saver(form, folder / f"g{i}", loop.task.device)
        for _ in range(rounds):
            saver.save(loop)
            saver.wait()
        saver.checkpoints.close()
        behind_ms = 1e3 * statistics.median(saver.durable)
        report[form] = {**facts_of(saver, step_seconds), "durable_behind_ms": behind_ms}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--gpt2-small", action="store_true", help="also the 124M shapes: 5 GB of memory")
    parser.add_argument("--step-seconds", type=float, default=0.3, help="of a 124M step, for its share")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is to be measured")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found["nano"] = nano(arguments.rounds, Path(folder))
        if arguments.gpt2_small:
            found["gpt2-small"] = gpt2_small(5, Path(folder), arguments.step_seconds)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
