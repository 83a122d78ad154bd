"""How near a jump comes to the memory's own speed: `python -m tests.bench.apply_delta --parameters 1e6,1e7`.

Measured in one run, arms in turns: a plain copy (the machine's bandwidth); a delta made as a whole, and its
directions too, one operation after another; what a jump does (delta.py, with its sample and its norm); the
bare pass over memory (fused_apply.py, compiled_pass.py); the snapshot and the restore of weights, AdamW's
moments and averages, without and with the sums that prove them (a restore is only worth something with them,
so that is what a jump pays), and for comparison the fingerprint. Bandwidth counts what must be read and
written at least, the same bytes for all ways to apply. On a GPU a snapshot goes to pinned host memory, and
its bar is a plain copy over that bus. OMP_NUM_THREADS=1 counts the thread's own time and is the steadier way
on a shared CPU. Prints; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.messages import DIRECTIONS
from common.settings import BasisSettings
from trainer_node import compiled_pass, fused_apply
from trainer_node.basis import Basis
from trainer_node.delta import apply_delta, compile_pass, linear_deltas, move
from trainer_node.fingerprint import fingerprint
from trainer_node.fused_apply import Difference, Direction, bytes_moved
from trainer_node.groups import parameter_groups
from trainer_node.optim.state import optimizer_tensors
from trainer_node.race.machine import machine
from trainer_node.snapshot import MemoryStore, Snapshot

BAR_SHARE = 0.70  # of the bandwidth, issue 6
ROUNDS = 7
MATRICES = 8  # the weights are cut into as many
MIN_TIMED_BYTES = 64 << 20  # of a small size, as many calls together as move this much

Arms = dict[str, tuple[Callable[[], object], int]]  # name -> (work, bytes that it must move)


class Job:
    """A stack of matrices of `parameters` weights in all, one AdamW step old, and what prediction holds."""

    def __init__(self, parameters: int, device: torch.device) -> None:
        rows = max(1, round((parameters / MATRICES) ** 0.5))
        torch.manual_seed(0)
        with torch.device(device):
            self.model = nn.Sequential(*(nn.Linear(rows, rows, bias=False) for _ in range(MATRICES)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for weight in self.model.parameters():
            weight.grad = torch.randn_like(weight)
        groups = parameter_groups(self.model)
        self.basis = Basis(groups, [self.optimizer], BasisSettings(), seed=0)
        self.basis.averages.begin_window()
        self.optimizer.step()
        self.basis.averages.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        coefficients_GK = torch.full((len(groups), len(DIRECTIONS)), 1e-3)
        coefficients_GK[:, DIRECTIONS.index("momentum")] = 0.0  # made from the optimizer: another matter
        self.coefficients_GK = coefficients_GK
        self.scene = [self._directions(index) for index in range(len(self.basis.parameters))]
        tensors = [p.detach() for p in self.basis.parameters] + optimizer_tensors([self.optimizer])
        self.saved = [*tensors, *self.basis.averages.moving_tensors()]
        self.store, self._proved_store = MemoryStore(), MemoryStore()
        self.store.save(self.saved)
        self._take()

    def _directions(self, index: int) -> tuple[Tensor, list[Direction], Tensor]:
        """Copies of what the basis holds of one parameter: drift, slow drift, pull-back."""
        weights = self.basis.parameters[index].detach().clone()
        average = weights + self.basis.averages.pull_back(index)
        start = average - self.basis.averages.drift(index)
        slow = self.basis.averages.slow_drift(index).clone()
        return weights, [Difference(average, start), slow, Difference(average, weights)], average

    def _take(self) -> None:
        basis, store = self.basis, self._proved_store
        self._taken = Snapshot(store, basis.parameters, [self.optimizer], basis.averages.moving_tensors())

    def one_pass(self, move_along: Callable[..., Tensor]) -> Tensor:
        square = torch.zeros((), device=self.saved[0].device)
        for weights, directions, average in self.scene:
            square += move_along(weights, directions, [1e-3] * len(directions), along=[average])
        return square.sqrt().cpu()  # as delta.py, which tells the norm

    def jump(self, *, is_compiled: bool) -> object:
        self.basis.has_compiled_pass = is_compiled
        return apply_delta(self.basis, self.coefficients_GK)

    def in_wholes(self) -> object:
        return move(self.basis, linear_deltas(self.basis, self.coefficients_GK))

    def arms(self) -> Arms:
        apply_bytes = sum(bytes_moved(w, directions, [a]) for w, directions, a in self.scene)
        saved_bytes = 2 * sum(t.numel() * t.element_size() for t in self.saved)
        return {
            "apply: wholes": (self.in_wholes, apply_bytes),
            "apply: delta.py": (partial(self.jump, is_compiled=False), apply_bytes),
            "apply: blocks": (partial(self.one_pass, fused_apply.move_along), apply_bytes),
            "apply: delta.py, compiled": (partial(self.jump, is_compiled=True), apply_bytes),
            "apply: compiled": (partial(self.one_pass, compiled_pass.move_along), apply_bytes),
            "snapshot": (lambda: self.store.save(self.saved), saved_bytes),
            "restore": (lambda: self.store.load_into(self.saved), saved_bytes),
            "fingerprint": (lambda: fingerprint(self.saved), saved_bytes // 2),
            "snapshot, proved": (self._take, saved_bytes),
            "restore, proved": (lambda: self._taken.restore(), saved_bytes),
        }


def copies(count: int, device: torch.device) -> Arms:
    """Plain copies of `count` float32: within the device, and on a GPU to pinned memory and back."""
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    both_bytes = 2 * 4 * count
    arms: Arms = {"copy": (lambda: target.copy_(source), both_bytes)}
    if device.type == "cuda":
        host = torch.empty(count, pin_memory=True)
        arms["copy to host"] = (lambda: host.copy_(source, non_blocking=True), both_bytes)
        arms["copy from host"] = (lambda: target.copy_(host, non_blocking=True), both_bytes)
    return arms


def measure(arms: Arms, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """GB/s of each arm, one figure per round; the arms take turns."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    # One thread on a CPU: only the time that it had a core, so that neighbours cost nothing.
    is_one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    seconds_of = time.thread_time if is_one_thread else time.perf_counter
    for number in range(rounds + 1):
        for name, (work, num_bytes) in arms.items():
            repeats = max(1, MIN_TIMED_BYTES // num_bytes)
            _wait(device)
            started = seconds_of()
            for _ in range(repeats):
                work()
            _wait(device)
            seconds = (seconds_of() - started) / repeats
            if number > 0:  # the first round compiles, allocates and warms up
                found[name].append(num_bytes / seconds / 1e9)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(parameters: int, device: torch.device, rounds: int, *, compiles: bool = True) -> dict[str, Any]:
    job = Job(parameters, device)
    count = sum(w.numel() for w, _, _ in job.scene)
    arms = {**copies(count, device), **job.arms()}
    started = time.perf_counter()
    if compiles:
        compile_pass(job.basis)
    if job.basis.has_compiled_pass:  # also where no parameter is large enough for a jump to take it
        weights, directions, average = job.scene[0]
        compiled_pass.prepare(weights, directions, along=[average])
    compile_seconds = time.perf_counter() - started
    missing = "" if job.basis.has_compiled_pass else "nothing was compiled"
    if missing:
        del arms["apply: delta.py, compiled"], arms["apply: compiled"]
    found = measure(arms, device, rounds)
    bars = {}
    if device.type == "cuda":
        for proof in ("", ", proved"):
            bars |= {f"snapshot{proof}": "copy to host", f"restore{proof}": "copy from host"}
    lines = {}
    for name, speeds in found.items():
        against = found[bars.get(name, "copy")]
        shares = [speed / copy for speed, copy in zip(speeds, against, strict=True)]
        lines[name] = {
            "gigabytes_per_second": statistics.median(speeds),
            "share_of_copy": statistics.median(shares),
            "share_least": min(shares),
            "share_most": max(shares),
        }
    return {
        "parameters": count,
        "device": device.type,
        "compile_seconds": compile_seconds,
        "missing": missing,
        "arms": lines,
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['parameters']:,} parameters on {found['device']}, compiled in"
        f" {found['compile_seconds']:.1f} s; bar: {BAR_SHARE:.0%} of a copy; {found['missing']}".rstrip("; ")
    ]
    for name, arm in found["arms"].items():
        lines.append(
            f"  {name:<25} {arm['gigabytes_per_second']:8.1f} GB/s  {arm['share_of_copy']:6.0%} of a copy"
            f"  ({arm['share_least']:.0%} to {arm['share_most']:.0%})"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", default="1e6,1e7,1e8", help="weights in all, separated by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: all that are here")
    parser.add_argument("--no-compile", dest="compiles", action="store_false", help="leave that arm out")
    parser.add_argument("--json", type=Path, help="append one line per size and device")
    options = parser.parse_args(arguments)
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print(machine())
    for device in [options.device] if options.device else here:
        for size in options.parameters.split(","):
            found = report(int(float(size)), torch.device(device), options.rounds, compiles=options.compiles)
            print(table(found), flush=True)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"machine": machine(), **found}) + "\n")


if __name__ == "__main__":
    main()
