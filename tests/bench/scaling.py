"""What grows with the model and what does not: `python -m tests.bench.scaling [--json FILE] [--sizes A,B]`.

GPT shapes from 1M to 1B parameters, AdamW, basis fp32, CPU. 1M, 10M and 100M are real: a model, its
optimizer's state, a basis, windows closed, jumps applied, snapshots taken and restored, each size in a
process of its own. 350M and 1B exist as shapes only (meta device): planned, nothing of them is run. Prints a
table as markdown; GB/s counts each tensor once that must be read or written, a lower bound of the traffic.
Asserts only the two claims it is about: bytes planned are bytes held, and message sizes do not grow.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.codec import encode
from common.config import load_settings
from common.memory_plan import BASIS
from common.message_bounds import RECORD_BYTES
from common.messages import DIRECTIONS, Controls, DecisionPoint, Forecast, Observation, Phase, PhaseDecision
from common.settings import RunSettings
from trainer_node.assembly import prepare_task
from trainer_node.basis import Basis
from trainer_node.delta import apply_delta
from trainer_node.dry_run import run_plan, size
from trainer_node.featurize import FeatureState
from trainer_node.fingerprint import fingerprint
from trainer_node.groups import parameter_groups
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.probe import Probe
from trainer_node.progress import first_progress, phase_rules, step_facts
from trainer_node.snapshot import DiskStore, MemoryStore, Snapshot, TensorStore
from trainer_node.step import StepTensors
from trainer_node.tasks import build_model

CPU = torch.device("cpu")
# layers, width, vocabulary; heads of 32 or 64
SHAPES = {
    "1M": (4, 128, 1024), "10M": (8, 288, 4096), "100M": (12, 768, 8192),
    "350M": (24, 1024, 24576), "1B": (24, 1792, 20480),
}  # fmt: skip
NOT_RUN = ("350M", "1B")
REPEATS, OBSERVATIONS = 3, 300
# Of the weights' bytes: weights, both moments, average, its value at the window's start and slow drift are
# read; closing a window writes the slow drift, a jump writes weights and averages.
CLOSE_PASSES, APPLY_PASSES, AVERAGE_PASSES = 7, 8, 3


def settings_of(name: str) -> RunSettings:
    layers, width, vocabulary = SHAPES[name]
    return load_settings(
        preset="nano",
        overrides=[
            f"trainer.model.layers={layers}", f"trainer.model.width={width}",
            f"trainer.model.heads={max(4, width // 64)}", f"trainer.model.vocabulary_size={vocabulary}",
            "trainer.optimizer.name=adamw", "trainer.device=cpu", "trainer.basis.average_every_steps=1",
        ],
    )  # fmt: skip


def seconds_of(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median of some calls, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def planned(name: str) -> dict[str, Any]:
    """Without a weight."""
    plan = run_plan(settings_of(name))
    memory = plan.memory
    return {
        "weights": memory.num_weights,
        "groups": len(plan.groups),
        "bound": asdict(plan.messages),
        "basis_planned": memory.basis_bytes,
        "basis_parked": sum(h.num_bytes for h in memory.holders if h.name in BASIS and h.place != "device"),
        "snapshot_planned": memory.of("snapshot"),
        "training_planned": memory.of("weights", "gradients", "optimizer"),
    }


class Job:
    """A model that has taken two steps along random gradients, so that every direction is there."""

    def __init__(self, settings: RunSettings, folder: Path) -> None:
        trainer = settings.trainer
        self.settings = settings
        self.model = build_model(trainer, CPU)
        self.groups = parameter_groups(self.model)
        self.optimizers = build_optimizers(self.model, trainer.optimizer, CPU)
        set_rates(self.optimizers, 1.0)
        self.basis = Basis(self.groups, self.optimizers, trainer.basis, seed=0, park=DiskStore(folder))
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for _ in range(2):
            self.basis.averages.begin_window()
            for optimizer in self.optimizers:
                optimizer.step()
            self.basis.averages.after_step()
        self.weights_bytes = sum(p.nbytes for p in self.model.parameters())

    def point(self) -> DecisionPoint:
        return self.basis.close_window(window=1, fingerprint=fingerprint(self.basis.parameters))

    def basis_bytes(self) -> int:
        """Held by the basis, wherever it is."""
        samples = [self.basis._former_GKm, self.basis._has_former]
        samples += [positions for _, _, positions in self.basis._sample._places]
        return sum(size for _, size in self.basis.averages.places()) + sum(t.nbytes for t in samples)


def observe(job: Job, point: DecisionPoint | None) -> Callable[[], Observation]:
    """What makes one observation of a step whose norms are known, encoded."""
    trainer = job.settings.trainer
    task = prepare_task(load_settings(preset="digits").trainer)  # for its names only
    phase = first_progress(phase_rules(trainer)).phase
    facts = partial(
        step_facts, phase, task, trainer, step=1, rate_factor=1.0, step_seconds=1.0, data_seconds=0.0,
        skipped_steps=0,
    )  # fmt: skip
    probe, state = Probe([], None), FeatureState()
    tensors = StepTensors(torch.tensor(3.0), torch.rand(len(job.groups)), torch.tensor(1.0))

    def make() -> Observation:
        probe.record(tensors, facts, 0)
        (observation,) = probe.collect(state, wait=True, decision_point=point)
        encode(observation)
        return observation

    return make


def decision_for(job: Job) -> PhaseDecision:
    num_groups = len(job.groups)
    return PhaseDecision(
        decision_id="123456.0", phase=Phase.PREDICT, horizon_steps=25, num_groups=num_groups,
        num_directions=len(DIRECTIONS), coefficients=(0.25,) * (num_groups * len(DIRECTIONS)),
        controls=Controls(), forecast=Forecast(loss=2.0, loss_without=2.1, spread=0.01), base_generation=1,
        base_step=123456, base_attempt=0, base_fingerprint="0123456789abcdef", valid_until_step=123456,
        reason="head:25, the best of 7 arms here", arm="head:25", next_window_steps=16,
    )  # fmt: skip


def snapshot_seconds(job: Job, store: TensorStore) -> tuple[float, float, int]:
    """Seconds to take and to restore one, fingerprints included, and its bytes."""
    basis, taken = job.basis, []

    def take() -> None:
        moving = basis.averages.moving_tensors()
        taken[:] = [Snapshot(store, basis.parameters, job.optimizers, moving)]

    take_seconds = seconds_of(take)
    restore_seconds = seconds_of(lambda: taken[0].restore())
    stored_bytes = store.stored_bytes
    store.close()
    return take_seconds, restore_seconds, stored_bytes


def measured(name: str) -> dict[str, Any]:
    """In this process."""
    result = planned(name)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        job = Job(settings_of(name), Path(folder))
        point = job.point()
        plain, at_point = observe(job, None), observe(job, point)
        plain_size, point_size = len(encode(plain())), len(encode(at_point()))
        coefficients_GK = torch.full((len(job.groups), len(DIRECTIONS)), 1e-4)
        result |= {
            "observation_bytes": plain_size + RECORD_BYTES,
            "point_bytes": point_size - plain_size,
            "decision_bytes": len(encode(decision_for(job))) + RECORD_BYTES,
            "observation_seconds": seconds_of(plain, OBSERVATIONS),
            "average_seconds": seconds_of(job.basis.averages.after_step),
            "close_seconds": seconds_of(job.point),
            "apply_seconds": seconds_of(lambda: apply_delta(job.basis, coefficients_GK)),
            "weights_bytes": job.weights_bytes,
            "basis_held": job.basis_bytes(),
        }
        for kind, store in (("memory", MemoryStore()), ("disk", DiskStore(Path(folder)))):
            take, restore, stored_bytes = snapshot_seconds(job, store)
            result |= {f"take_{kind}": take, f"restore_{kind}": restore, "snapshot_held": stored_bytes}
        job.basis.close()
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def copy_speed() -> float:
    """Bytes a second of a plain copy, read and written: what this machine can do."""
    source, target = torch.zeros(1 << 27), torch.zeros(1 << 27)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def with_speed(seconds: float, num_bytes: float) -> str:
    return f"{_seconds(seconds)}, {num_bytes / seconds / 1e9:.1f} GB/s"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def rows(found: dict[str, Any]) -> dict[str, str]:
    """Name of a row -> its cell for one size."""
    bound = found["bound"]
    of = {
        "parameters, groups": f"{found['weights']:,}, {found['groups']}",
        "observation, at most": f"{bound['observation']} B",
        "what a decision point adds, at most": f"{bound['decision_point']} B",
        "decision, at most": f"{bound['decision']} B",
        "start of a run, once": size(bound["run_started"]),
        "weights, gradients, optimizer: planned": size(found["training_planned"]),
        "basis: planned (parked)": f"{size(found['basis_planned'])} ({size(found['basis_parked'])})",
        "a snapshot: planned": size(found["snapshot_planned"]),
    }
    if "basis_held" not in found:
        return of
    weights, stored = found["weights_bytes"], found["snapshot_held"]
    return of | {
        "basis: held": _same(found["basis_held"], found["basis_planned"]),
        "a snapshot: held": _same(stored, found["snapshot_planned"]),
        "observation, decision point, decision: sent": (
            f"{found['observation_bytes']}, {found['point_bytes']}, {found['decision_bytes']} B"
        ),
        "an observation is made in": _seconds(found["observation_seconds"]),
        "averages take in the weights": with_speed(found["average_seconds"], AVERAGE_PASSES * weights),
        "a window is closed": with_speed(found["close_seconds"], CLOSE_PASSES * weights),
        "a delta is applied": with_speed(found["apply_seconds"], APPLY_PASSES * weights),
        "snapshot to memory": with_speed(found["take_memory"], stored),
        "restored from memory": with_speed(found["restore_memory"], stored),
        "snapshot to disk": with_speed(found["take_disk"], stored),
        "restored from disk": with_speed(found["restore_disk"], stored),
        "peak of the process": size(found["peak_bytes"]),
    }


def _same(held: int, planned_bytes: int) -> str:
    return "the same, to the byte" if held == planned_bytes else f"{held} B, planned {planned_bytes} B"


def table(found: dict[str, dict[str, Any]]) -> str:
    cells = {name: rows(result) for name, result in found.items()}
    names = list(dict.fromkeys(row for of in cells.values() for row in of))
    lines = ["| | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(of.get(row, "not run") for of in cells.values()) + " |" for row in names
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", default=",".join(SHAPES))
    parser.add_argument("--size", choices=SHAPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size:
        print(json.dumps(measured(arguments.size)))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.sizes.split(","):
        if name in NOT_RUN:
            found[name] = planned(name)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.scaling", "--size", name],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found[name] = json.loads(done.stdout.splitlines()[-1])
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; a plain copy of 0.5 GB: {copy_speed() / 1e9:.1f} GB/s\n")
    print(table(found))
    kinds = ("observation", "decision_point", "decision")
    sizes = {tuple(result["bound"][kind] for kind in kinds) for result in found.values()}
    assert len(sizes) == 1, f"message sizes grow with the model: {sizes}"
    real = [result for result in found.values() if "basis_held" in result]
    assert all(result["basis_held"] == result["basis_planned"] for result in real)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
